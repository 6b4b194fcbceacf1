"""Packed buckets: every element of every tensor comes back, bit for bit, from stretches that do not overlap."""

from __future__ import annotations

import pytest
import torch

from or1_megatron.architecture import Architecture
from or1_megatron.parallel.bucket import ALIGNMENT
from or1_megatron.parallel.layout import hf_shapes
from or1_megatron.parallel.packed_weights import (
    PackedBucket,
    box_view,
    copy_all,
    names,
    packed_views,
    plan_packed,
    unpack,
)


def architecture(family: str, *, tied: bool) -> Architecture:
    return Architecture(
        family=family,
        num_layers=4,
        hidden_size=12,
        ffn_hidden_size=24,
        num_heads=8,
        num_kv_heads=4,
        head_dim=3,
        vocab_size=101,
        norm_eps=1e-6,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=tied,
        max_positions=64,
        rope_type="default",
    )


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator) -> torch.Tensor:
    size = dtype.itemsize * int(torch.Size(shape).numel())
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw).view(dtype).view(shape)


def packed_by_all(bucket: PackedBucket, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    packed = torch.full((bucket.packed_bytes,), 255, dtype=torch.uint8)
    for sender, boxes in enumerate(bucket.boxes):
        begin, end = bucket.stretches[sender]
        assert all(begin <= box.offset < end and box.offset % ALIGNMENT == 0 for box in boxes)
        copy_all(packed_views(bucket, sender, packed), [box_view(tensors[b.name], b.start, b.size) for b in boxes])
    return packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_every_bit_comes_back(family: str, tied: bool, tp: int, pp: int, dtype: torch.dtype) -> None:
    a, draw = architecture(family, tied=tied), torch.Generator().manual_seed(1)
    tensors = {name: random_bits(shape, dtype, draw) for name, shape in hf_shapes(a).items()}
    plan = plan_packed(a, tp=tp, pp=pp, dtype=dtype, bucket_bytes=4000)
    assert len(plan) > 3 and list(names(plan)) == list(tensors)
    senders = set()
    for bucket in plan:
        edges = [edge for stretch in bucket.stretches for edge in stretch]
        assert edges == sorted(edges) and edges[0] == 0 and edges[-1] == bucket.packed_bytes
        senders |= {sender for sender, boxes in enumerate(bucket.boxes) if boxes}
        packed = packed_by_all(bucket, tensors)
        arrived = unpack(bucket, packed)
        packed.zero_()  # as the next bucket would
        for name, tensor in arrived:
            assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8)), name
    assert senders == set(range(tp * pp)), "a rank sends nothing"


def test_a_sender_is_a_tensor_rank_of_a_stage() -> None:
    """Sender s holds the part s % tp of what lies on stage s // tp."""
    columns, stages = {}, {}
    for bucket in plan_packed(architecture("llama", tied=False), tp=2, pp=2, dtype=torch.bfloat16, bucket_bytes=4000):
        for sender, boxes in enumerate(bucket.boxes):
            for box in boxes:
                stages.setdefault(box.name, set()).add(sender // 2)
                columns[box.name, sender] = box.start[1]
    layer = "model.layers.{}.mlp.down_proj.weight"
    assert [stages[layer.format(i)] for i in range(4)] == [{0}, {0}, {1}, {1}]
    assert [columns[layer.format(i // 2 * 2), i] for i in range(4)] == [0, 12, 0, 12]
