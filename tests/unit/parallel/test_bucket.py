"""Weight buckets: the round trip is bit-exact, sizes are bounded, nothing is copied on the way out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from or1_megatron.errors import RunFailure
from or1_megatron.parallel.bucket import (
    ALIGNMENT,
    checksum,
    compare_checksums,
    pack_buckets,
    plan_buckets,
    slot_view,
    unpack_bucket,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits, so that NaNs and infinities are among the values."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


tensor_specs = st.lists(
    st.tuples(st.lists(st.integers(1, 7), max_size=3), st.sampled_from(DTYPES), st.booleans()), max_size=12
)


@settings(deadline=None)
@given(tensor_specs, st.integers(1, 2000))
def test_round_trip_is_bit_exact_and_bounded(specs, bucket_bytes):
    tensors = []
    for seed, (shape, dtype, transpose) in enumerate(specs):
        tensor = random_tensor(shape, dtype, seed)
        tensors.append((f"w{seed}", tensor.transpose(0, -1) if transpose and shape else tensor))

    buckets = list(pack_buckets(iter(tensors), bucket_bytes))
    unpacked = [pair for bucket in buckets for pair in unpack_bucket(bucket)]

    assert [name for name, _ in unpacked] == [name for name, _ in tensors]
    for (_, got), (_, expected) in zip(unpacked, tensors, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert bits(got) == bits(expected)
    for bucket in buckets:
        assert len(bucket.data) <= bucket_bytes or len(bucket.slots) == 1
        assert all(slot.offset % ALIGNMENT == 0 for slot in bucket.slots)


def test_source_memory_may_be_reused_while_packing():
    def gathered():
        scratch = torch.empty(4)
        for value in range(3):
            yield f"w{value}", scratch.fill_(value)

    (bucket,) = pack_buckets(gathered(), 1 << 20)
    assert [tensor.tolist() for _, tensor in unpack_bucket(bucket)] == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


def test_small_tensors_share_a_bucket_and_a_large_one_travels_alone():
    sizes = {"a": 8, "b": 8, "large": 300, "c": 8}
    buckets = list(pack_buckets(((name, torch.zeros(size)) for name, size in sizes.items()), 1024))
    assert [[slot.name for slot in bucket.slots] for bucket in buckets] == [["a", "b"], ["large"], ["c"]]


def test_unpacking_read_only_memory_copies_nothing():
    (bucket,) = pack_buckets([("w", torch.arange(6.0).view(2, 3))], 1024)
    bucket.data.flags.writeable = False
    ((_, tensor),) = unpack_bucket(bucket)
    assert tensor.data_ptr() == bucket.data.ctypes.data


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=2), min_size=1, max_size=12), st.integers(1, 200))
def test_planned_slots_do_not_overlap_and_keep_the_order(shapes: list[list[int]], bucket_bytes: int) -> None:
    named = {f"w{i}": tuple(shape) for i, shape in enumerate(shapes)}
    buckets, size = plan_buckets(named, torch.bfloat16, bucket_bytes)
    slots = [slot for bucket in buckets for slot in bucket]
    assert [slot.name for slot in slots] == list(named)
    data = np.zeros(size, np.uint8)
    for i, slot in enumerate(slots):
        assert slot.offset % ALIGNMENT == 0
        view = slot_view(data, slot)
        assert view.shape == named[slot.name] and not view.any()
        view.fill_(i + 1)
    for i, slot in enumerate(slots):
        assert (slot_view(data, slot) == i + 1).all()
    for bucket in buckets:
        held = sum(-(-2 * slot_view(data, slot).numel() // ALIGNMENT) * ALIGNMENT for slot in bucket)
        assert len(bucket) == 1 or held <= bucket_bytes + ALIGNMENT, held


def test_checksums_of_parts_add_up() -> None:
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    parts = checksum(tensor[:, :2]) + checksum(tensor[:3, 2:]) + checksum(tensor[3:, 2:])
    assert (parts - checksum(tensor)) % 2**64 == 0
    changed = tensor.clone()
    changed[3, 3] += 1e-3
    assert checksum(changed) != checksum(tensor)


def test_what_fits_exactly_is_in_the_same_bucket():
    names = ["a", "b", "c", "d", "e"]
    planned, _ = plan_buckets(dict.fromkeys(names, (32,)), torch.bfloat16, 128)
    packed = list(pack_buckets([(name, torch.zeros(16)) for name in names], 128))
    for buckets in (planned, [bucket.slots for bucket in packed]):
        assert [[slot.name for slot in slots] for slots in buckets] == [["a", "b"], ["c", "d"], ["e"]]


def test_checksums_are_compared_modulo_2_to_the_64_and_none_may_be_missing():
    compare_checksums({"a": 2**63 - 1, "b": 5}, {"a": -(2**63) - 1, "b": 5 + 2**64, "more": 1})
    for arrived in ({"a": 3}, {"a": 3, "b": 4}):
        with pytest.raises(RunFailure, match="b arrived with another checksum"):
            compare_checksums({"a": 3, "b": 5}, arrived)
