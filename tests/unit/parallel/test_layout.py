"""The layout table: cutting and joining are inverse, every HF tensor is covered, files are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from or1_megatron.architecture import Architecture, read_architecture
from or1_megatron.errors import UserError
from or1_megatron.parallel.hf_files import HFWeights
from or1_megatron.parallel.layout import entries, hf_shapes, shard, unshard
from tests.tiny_models import write_tiny_model


@st.composite
def cases(draw: st.DrawFn) -> tuple[Architecture, int]:
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = tp * draw(st.integers(1, 2))
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    return (
        Architecture(
            family=family,
            num_layers=2,
            hidden_size=draw(st.integers(1, 9)) * 2,
            ffn_hidden_size=tp * draw(st.integers(1, 5)),
            num_heads=kv_heads * draw(st.integers(1, 3)),
            num_kv_heads=kv_heads,
            head_dim=draw(st.sampled_from([2, 4])),
            vocab_size=draw(st.integers(1, 300)),
            norm_eps=1e-6,
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied=draw(st.booleans()),
            max_positions=64,
            rope_type="default",
        ),
        tp,
    )


@settings(max_examples=60)
@given(cases(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_shard_then_unshard_is_the_identity_and_covers_everything(case: tuple[Architecture, int], dtype) -> None:
    architecture, tp = case
    shapes = hf_shapes(architecture)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    assert sum(tensor.numel() for tensor in tensors.values()) == architecture.num_parameters
    back: dict[str, torch.Tensor] = {}
    for entry in entries(architecture).values():
        pieces = [shard(entry, tensors.__getitem__, architecture, tp=tp, rank=rank) for rank in range(tp)]
        assert len({piece.shape for piece in pieces}) == 1
        back |= dict(unshard(entry, pieces, architecture))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model", "llama", tied=True)
    architecture = read_architecture(path)
    with HFWeights(path, architecture) as weights:
        assert weights.read("model.norm.weight").shape == (architecture.hidden_size,)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        HFWeights(path, architecture)
    file.unlink()
    with pytest.raises(UserError, match="holds neither model.safetensors"):
        HFWeights(path, architecture)


def test_tensors_that_do_not_match_are_named_at_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_tiny_model(tmp_path / "model", "llama", tied=True)
    architecture = read_architecture(path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.extra"] = tensors.pop("model.norm.weight")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: model.norm.weight; not known: model.extra; wrong shape: .*up_proj"):
        HFWeights(path, architecture)
