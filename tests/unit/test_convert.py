"""Conversion: bit-exact round trips, what is refused, what an interrupted or full disk leaves, and how much memory."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from or1_megatron import cli, convert
from or1_megatron.architecture import parse_architecture
from or1_megatron.convert import hf_to_megatron, megatron_to_hf, parse_size
from or1_megatron.errors import RunFailure, UserError
from or1_megatron.parallel.layout import hf_shapes
from or1_megatron.parallel.saved_tensor import save_tensor
from tests.tiny_models import write_tiny_model

MODELS = {
    "llama": {"tied": True, "vocab": 301},
    "qwen2": {"tied": False, "vocab": 384},
    "qwen3": {"tied": True, "vocab": 259, "head_dim": 16},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "llama", tied=False, vocab=301, hidden=64)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, Any], torch.dtype, int]:
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = draw(st.integers(1, 4)) * 2
    config = {
        "model_type": family,
        "hidden_size": heads * head_dim if family == "qwen2" else draw(st.integers(1, 30)),
        "head_dim": head_dim,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": draw(st.integers(1, 400)),
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()),
    }
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return config, dtype, draw(st.sampled_from([1, 5_000, 10**9]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=checkpoints(), seed=st.integers(0, 2**32))
def test_any_checkpoint_comes_back_bit_for_bit(case: tuple, seed: int, tmp_path_factory) -> None:
    """Random bits, NaNs among them, in one file or in many."""
    config, dtype, shard_bytes = case
    root = tmp_path_factory.mktemp("round")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator, dtype=torch.uint8)
        for name, shape in hf_shapes(parse_architecture(config, "test")).items()
    }
    tensors = {name: tensor.view(dtype) for name, tensor in tensors.items()}
    (root / "hf").mkdir()
    (root / "hf" / "config.json").write_text(json.dumps(config))
    save_file(tensors, root / "hf" / "model.safetensors")
    hf_to_megatron(root / "hf", root / "megatron")
    megatron_to_hf(root / "megatron", root / "megatron", root / "back", max_shard_size=f"{shard_bytes / 1000}KB")
    assert_same_bits(tensors, tensors_of(root / "back"))
    assert (root / "back" / "config.json").read_bytes() == (root / "hf" / "config.json").read_bytes()
    files = len(list((root / "back").glob("*.safetensors")))
    assert files == (1 if shard_bytes == 10**9 else files) and (files == len(tensors) or shard_bytes > 1)


@pytest.mark.parametrize("family", MODELS)
def test_output_is_a_hugging_face_directory(family: str, tmp_path: Path) -> None:
    """transformers loads it, sharded and cast, and everything beside the weights is there."""
    hf = write_tiny_model(tmp_path / "hf", family, **MODELS[family])
    (hf / "generation_config.json").write_text('{"temperature": 0.6}')
    (hf / "pytorch_model.bin").write_bytes(b"old weights")
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back", dtype="bf16", max_shard_size="100KB")
    beside = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    made = {name for name in left_in(tmp_path / "back") if "safetensors" not in name}
    assert made == beside == {name for name in left_in(hf) if name in beside}
    for name in beside - {"config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    original, back = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (hf, tmp_path / "back"))
    assert back.dtype == torch.bfloat16 and back.config.dtype == torch.bfloat16
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter.to(torch.bfloat16), back.get_parameter(name)), name
    assert AutoTokenizer.from_pretrained(tmp_path / "back").encode("a b") == [97, 32, 98]
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert all((tmp_path / "back" / file).stat().st_size < 120_000 for file in index["weight_map"].values()) or (
        family == "qwen2"
    )  # its untied embedding alone is larger


def test_header_of_any_length_and_stored_heads_and_buffers(tiny: Path, tmp_path: Path) -> None:
    """A file whose tensors are not aligned, with a copy of the tied head and rotary buffers as some exporters write."""
    hf = write_tiny_model(tmp_path / "hf", "llama", tied=True, vocab=259, hidden=64)
    tensors = tensors_of(hf)
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "model.rotary_emb.inv_freq": torch.ones(3)}
    save_file({**tensors, **extra}, hf / "model.safetensors")
    whole = (hf / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    (hf / "model.safetensors").write_bytes(
        (length + 3).to_bytes(8, "little") + whole[8 : 8 + length] + b"   " + whole[8 + length :]
    )
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    assert_same_bits(tensors, tensors_of(tmp_path / "back"))


def test_nothing_is_overwritten(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(UserError, match=r"--out .*out exists; nothing is overwritten"):
        hf_to_megatron(tiny, out)
    with pytest.raises(UserError, match="no .metadata"):
        megatron_to_hf(tiny, tiny, tmp_path / "other")
    assert left_in(tmp_path) == ["out"] and left_in(out) == ["mine"]


BAD: dict[str, tuple[Any, str]] = {
    "missing, extra and mis-shaped, all at once": (
        lambda t: {
            **{n: v for n, v in t.items() if n != "model.norm.weight"},
            "model.extra": torch.zeros(1),
            "lm_head.weight": torch.zeros(3, 64),
        },
        r"missing: model.norm.weight; not known: model.extra; wrong shape: lm_head.weight \(3, 64\) instead of \(301,",
    ),
    "dtype": (
        lambda t: {**t, "model.norm.weight": t["model.norm.weight"].to(torch.int8)},
        r"wrong dtype \(only F32, BF16, F16 are read\): model.norm.weight I8",
    ),
    "dtypes of one stack": (
        lambda t: {n: v.half() if "layers.1.mlp.up" in n else v for n, v in t.items()},
        r"mlp.linear_fc1.weight \(torch.float16, torch.float32\); save the Hugging Face checkpoint in one dtype",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_tensors_are_named(what: str, tiny: Path, tmp_path: Path) -> None:
    change, message = BAD[what]
    hf = copy_of(tiny, tmp_path / "hf")
    save_file(change(tensors_of(tiny)), hf / "model.safetensors")
    with pytest.raises(UserError, match=message):
        hf_to_megatron(hf, tmp_path / "out")
    assert left_in(tmp_path) == ["hf"]


def test_bad_files_are_named(tiny: Path, tmp_path: Path) -> None:
    hf = copy_of(tiny, tmp_path / "hf")
    weights, config = hf / "model.safetensors", json.loads((hf / "config.json").read_text())
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        hf_to_megatron(hf, tmp_path / "out")
    weights.write_bytes(whole)
    (hf / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="is not a readable index"):
        hf_to_megatron(hf, tmp_path / "out")
    (hf / "model.safetensors.index.json").unlink()
    (hf / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
    with pytest.raises(UserError, match="'mixtral' is not supported; known families: llama, qwen2, qwen3"):
        hf_to_megatron(hf, tmp_path / "out")
    (hf / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    save_file({n: t[:200].clone() if "embed" in n or "head" in n else t for n, t in tensors_of(tiny).items()}, weights)
    with pytest.raises(UserError, match="tokenizer has 259 tokens but config.json says vocab_size=200"):
        hf_to_megatron(hf, tmp_path / "out")
    assert left_in(tmp_path) == ["hf"]


def test_bad_megatron_directories_are_named(tiny: Path, tmp_path: Path) -> None:
    good = tmp_path / "megatron"
    hf_to_megatron(tiny, good)
    deeper = copy_of(tiny, tmp_path / "deeper")
    config = json.loads((tiny / "config.json").read_text())
    (deeper / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 3, "hidden_size": 32, "head_dim": 16})
    )
    with pytest.raises(UserError, match=r"wrong shape: .*word_embeddings.weight \(301, 64\) instead of \(301, 32\)"):
        megatron_to_hf(good, deeper, tmp_path / "out")
    (deeper / "config.json").write_text(json.dumps({**config, "model_type": "qwen3"}))
    with pytest.raises(UserError, match="missing: decoder.layers.self_attention.k_layernorm.weight"):
        megatron_to_hf(good, deeper, tmp_path / "out")
    torn = copy_of(good, tmp_path / "torn")
    file = max(torn.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"distcp cannot be read"):
        megatron_to_hf(torn, torn, tmp_path / "out")
    # What is no pickle, and pickles that call os.system: by name, and through a module that is allowed.
    through = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x04true\x85R."
    # And what is not whole: an unknown protocol, a text that is no UTF-8, an index of the memo that is empty.
    for text in (b"no pickle", b"cos\nsystem\n(Vtrue\ntR.", through, b"\x80\x7f", b"\x8c\x01\xff.", b"h\x07."):
        (torn / ".metadata").write_bytes(text)
        with pytest.raises(UserError, match=r"\.metadata cannot be read"):
            megatron_to_hf(torn, torn, tmp_path / "out")
    assert left_in(tmp_path) == ["deeper", "megatron", "torn"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["to-hf", "--megatron", "none"], "--megatron none does not exist; give a Megatron checkpoint directory"),
        (
            ["to-hf", "--megatron", "bare"],
            "--megatron bare holds no config.json; give the model's directory with --hf-",
        ),
        (["to-hf", "--megatron", "bare", "--hf-config", "none"], "--hf-config none does not exist; give a model"),
        (["to-megatron", "--hf", "none"], "--hf none does not exist; give a model directory"),
        (["to-megatron", "--hf", "file"], "--hf file is a file; give a model directory"),
        (["verify", "bare", "none"], "bare holds no config.json; give a model directory that has one"),
    ],
)
def test_messages_name_what_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "file").touch()
    assert cli.main(["convert", *words, *([] if words[0] == "verify" else ["--out", "out"])]) == 2
    assert capsys.readouterr().err.startswith(f"or1: error: {said}")


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0", "0GB", "5", "5B"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="--max-shard-size"):
        parse_size(text)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5mb", "0.7 KB")] == [5 * 10**9, 1_500_000, 700]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """1 MiB of file system: less than the tiny model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_full_disk(foreseen: bool, tiny: Path, small_disk: Path, tmp_path: Path, monkeypatch) -> None:
    """Told before anything is written; and when another process takes the space meanwhile."""
    hf_to_megatron(tiny, tmp_path / "megatron")
    if not foreseen:
        monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**12}))
    for run in (
        lambda: hf_to_megatron(tiny, small_disk / "out"),
        lambda: megatron_to_hf(tmp_path / "megatron", tiny, small_disk / "out"),
    ):
        with pytest.raises(UserError, match=r"--out .*out: disk full"):
            run()
        assert left_in(small_disk) == []


def test_failed_write_is_told_as_such() -> None:
    """torch.save by itself complains about the position in the file instead."""

    class FullDisk(io.BytesIO):
        def write(self, data, /) -> int:
            if self.tell() > 500:
                raise OSError(errno.ENOSPC, "No space left")
            return super().write(data)

    with pytest.raises(OSError, match="No space left"):
        save_tensor(torch.ones(1000), FullDisk())  # pyright: ignore[reportArgumentType]


def test_killed_conversion_leaves_nothing_that_looks_complete(tiny: Path, tmp_path: Path) -> None:
    """Killed between two tensors; the next one starts anew and ends well."""
    code = (
        "import os, sys, time, pathlib; from or1_megatron.parallel import megatron_writer as m; import torch\n"
        "save, saved = torch.save, []\n"
        "def stuck(*a):\n"
        "    save(*a); saved.append(0)\n"
        "    if len(saved) > 4: os.write(1, b'stuck\\n'); time.sleep(600)\n"
        "m.torch.save = stuck\n"
        "from or1_megatron.convert import hf_to_megatron\n"
        "hf_to_megatron(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
    )
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", code, str(tiny), str(out)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"stuck\n"
            with pytest.raises(UserError, match="another process is writing"):
                hf_to_megatron(tiny, out)
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert left_in(tmp_path) == [".out.partial"]
    assert not (tmp_path / ".out.partial" / ".metadata").exists()
    hf_to_megatron(tiny, out)
    assert left_in(tmp_path) == ["out"]


def test_interrupted_conversion_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hf_to_megatron(tiny, tmp_path / "megatron")
    monkeypatch.setattr(convert, "_set_dtype", interrupt)
    for out in ("out", "new/newer/out"):
        with pytest.raises(KeyboardInterrupt):
            megatron_to_hf(tmp_path / "megatron", tiny, tmp_path / out)
        assert left_in(tmp_path) == ["megatron"]


def test_a_folder_that_another_has_used_meanwhile_stays(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(convert, "write_megatron", lambda *_, **__: (tmp_path / "new" / "mine").touch() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf_to_megatron(tiny, tmp_path / "new" / "newer" / "out")
    assert left_in(tmp_path) == ["new"] and left_in(tmp_path / "new") == ["mine"]


def test_a_folder_that_cannot_be_made(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--out .*x+ cannot be made: File name too long"):
        hf_to_megatron(tiny, tmp_path / "new" / ("x" * 300))
    assert left_in(tmp_path) == []


def write_large_model(path: Path) -> tuple[int, int]:
    """About 400 MB in bf16; its bytes and those of its largest tensor."""
    config = {
        "model_type": "qwen2",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 10,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 20_001,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(parse_architecture(config, "test"))
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors")
    sizes = [tensor.numel() * 2 for tensor in tensors.values()]
    return sum(sizes), max(sizes)


def test_memory_is_that_of_the_largest_tensors(tmp_path: Path) -> None:
    """Resident set, mapped file pages included, at its highest: 2 x the largest tensor + 1 GB at most is promised."""
    total, largest = write_large_model(tmp_path / "hf")
    code = (
        "import sys, pathlib, re; from or1_megatron.convert import hf_to_megatron, megatron_to_hf\n"
        "import torch.distributed.checkpoint, rich.progress\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "for work in (lambda: hf_to_megatron(root / 'hf', root / 'megatron'),\n"
        "             lambda: megatron_to_hf(root / 'megatron', root / 'megatron', root / 'back')):\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    before = peak(); work(); print('grew', peak() - before, before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    grew = [[int(word) for word in line.split()[1:]] for line in done.stdout.splitlines() if line.startswith("grew")]
    for growth, before in grew:
        assert growth < 2 * largest + 50 * 10**6 < 0.5 * total, (growth, largest, total)
        assert before + growth < 2 * largest + 10**9


def test_verify_sees_one_changed_bit(tiny: Path, tmp_path: Path) -> None:
    from or1_megatron.compare import verify

    other = copy_of(tiny, tmp_path / "other")
    tensors = tensors_of(tiny)
    tensors["model.layers.1.self_attn.k_proj.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, other / "model.safetensors")
    hf_to_megatron(other, tmp_path / "megatron")
    verify(other, tmp_path / "megatron", logits=False)
    with pytest.raises(RunFailure, match=r"tensors model.layers.1.self_attn.k_proj.weight \(max \|difference\|"):
        verify(tiny, tmp_path / "megatron", logits=False)


def test_verify_sees_what_only_logits_tell(tiny: Path, tmp_path: Path) -> None:
    """The rotary base is no tensor."""
    from or1_megatron.compare import verify

    hf_to_megatron(tiny, tmp_path / "megatron")
    config = json.loads((tiny / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 10_000.0
    config["rope_parameters"]["rope_theta"] = 5_000.0
    (tmp_path / "megatron" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunFailure, match=r"differ: logits, max \|difference\|"):
        verify(tiny, tmp_path / "megatron", prompt="What is 3 + 4? I think it is")


@pytest.mark.parametrize("tool", ["hf_to_megatron", "megatron_to_hf", "verify"])
def test_tools_run(tool: str) -> None:
    done = subprocess.run(
        [sys.executable, f"tools/convert/{tool}.py", "--help"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: or1 convert" in done.stdout
