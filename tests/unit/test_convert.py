"""Conversion: bit-exact round trips, what is refused, what an interrupted or full disk leaves, and how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from or1_megatron import cli
from or1_megatron.architecture import parse_architecture
from or1_megatron.convert import hf_to_megatron, megatron_to_hf, parse_size
from or1_megatron.errors import UserError
from or1_megatron.parallel.layout import hf_shapes
from tests.tiny_models import tensors_of, write_tiny_model

MODELS = {
    "llama": {"tied": True, "vocab": 301},
    "qwen2": {"tied": False, "vocab": 384},
    "qwen3": {"tied": True, "vocab": 259, "head_dim": 16},
}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


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
    made = {name for name in os.listdir(tmp_path / "back") if "safetensors" not in name}
    assert made == beside == {name for name in os.listdir(hf) if name in beside}
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


def test_header_of_any_length_and_stored_heads_and_buffers(tmp_path: Path) -> None:
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
