"""When two directories hold the same model: bits, types, NaNs, and logits within the rounding of their size."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from or1_megatron import compare
from or1_megatron.convert import hf_to_megatron
from or1_megatron.errors import RunFailure
from tests.tiny_models import copy_of, tensors_of, write_tiny_model

Weights = dict[str, torch.Tensor]


def models(root: Path, change: Callable[[str, Weights], Weights] = lambda _, tensors: tensors) -> tuple[Path, Path]:
    """Two directories; `change` is made to the tensors of `a` and of `b`."""
    made = []
    for name in ("a", "b"):
        path = write_tiny_model(root / name, "llama", tied=True, hidden=32, head_dim=16)
        tensors = load_file(path / "model.safetensors")
        save_file(change(name, tensors), path / "model.safetensors")
        made.append(path)
    return made[0], made[1]


def test_equal_bits_are_equal_whatever_number_they_are(tmp_path: Path):
    def change(_: str, tensors: Weights) -> Weights:
        tensors["model.norm.weight"][:2] = torch.tensor([float("nan"), -0.0])
        return tensors

    a, b = models(tmp_path, change)
    compare.verify(a, b, logits=False)
    weights = load_file(b / "model.safetensors")
    weights["model.norm.weight"][1] = 0.0
    save_file(weights, b / "model.safetensors")
    with pytest.raises(RunFailure, match=r"tensors model.norm.weight"):
        compare.verify(a, b, logits=False)


def test_equal_bits_of_another_type_differ(tmp_path: Path):
    def change(model: str, tensors: Weights) -> Weights:
        dtype = torch.float16 if model == "a" else torch.bfloat16
        return {name: tensor.half().view(dtype) for name, tensor in tensors.items()}

    with pytest.raises(RunFailure, match=r"\(float16 and bfloat16\).* and 15 more"):
        compare.verify(*models(tmp_path, change), logits=False)


def test_another_architecture_is_told_before_its_weights_are_read(tmp_path: Path):
    a, b = models(tmp_path)
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(RunFailure, match=r"are different architectures: norm_eps 1e-06 and 0.5$"):
        compare.verify(a, b, logits=False)


@pytest.mark.parametrize(("error", "same"), [(0.09, True), (0.11, False)])
def test_logits_may_differ_by_a_ten_thousandth_of_the_largest(
    error: float, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    a, b = models(tmp_path)

    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, _: Any, path: Path, tokens: list[int]) -> Future[np.ndarray]:
            logits: Future[np.ndarray] = Future()
            logits.set_result(np.array([[-1000.0, 1.0 + error * (path == b)]]))
            return logits

    monkeypatch.setattr(compare, "ProcessPoolExecutor", Pool)
    if same:
        compare.verify(a, b)
    else:
        with pytest.raises(RunFailure, match="logits, max"):
            compare.verify(a, b)
    monkeypatch.setattr(
        compare, "load_tokenizer", lambda path, _: SimpleNamespace(encode=lambda *_, **__: [path == str(a)])
    )
    with pytest.raises(RunFailure, match="differ: the prompt's tokens"):
        compare.verify(a, b)


def test_verify_sees_one_changed_bit(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny", "llama", tied=False)
    other = copy_of(tiny, tmp_path / "other")
    tensors = tensors_of(tiny)
    tensors["model.layers.1.self_attn.k_proj.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, other / "model.safetensors")
    hf_to_megatron(other, tmp_path / "megatron")
    compare.verify(other, tmp_path / "megatron", logits=False)
    with pytest.raises(RunFailure, match=r"tensors model.layers.1.self_attn.k_proj.weight \(max \|difference\|"):
        compare.verify(tiny, tmp_path / "megatron", logits=False)


def test_verify_sees_what_only_logits_tell(tmp_path: Path) -> None:
    """The rotary base is no tensor."""
    tiny = write_tiny_model(tmp_path / "tiny", "llama", tied=False)
    hf_to_megatron(tiny, tmp_path / "megatron")
    config = json.loads((tiny / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 10_000.0
    config["rope_parameters"]["rope_theta"] = 5_000.0
    (tmp_path / "megatron" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunFailure, match=r"differ: logits, max \|difference\|"):
        compare.verify(tiny, tmp_path / "megatron", prompt="What is 3 + 4? I think it is")
