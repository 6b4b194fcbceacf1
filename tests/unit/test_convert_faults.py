"""What a conversion refuses, and what an interrupted one or a full disk leaves."""

from __future__ import annotations

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
from safetensors.torch import save_file

from or1_megatron import convert
from or1_megatron.convert import hf_to_megatron, megatron_to_hf
from or1_megatron.errors import UserError
from tests.tiny_models import copy_of, tensors_of, write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "llama", tied=False, vocab=301, hidden=64)


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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
