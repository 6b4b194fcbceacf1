"""Named tensors packed into flat byte buffers: weights on their way from the actor to the engines.

A bucket is a numpy uint8 array plus the table of what lies where, so that it travels through shared memory without
a copy. Invariants: offsets are multiples of 64; slots do not overlap; packing copies every byte once and
unpacking none; pack then unpack is bit-exact for every dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

ALIGNMENT = 64  # bytes; a cache line, and enough for every dtype

# Buffers from shared memory are read-only, and unpacked tensors are only read.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies in a bucket."""

    name: str
    dtype: str  # as torch spells it: "bfloat16"
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the bucket


@dataclass(frozen=True, eq=False)
class Bucket:
    slots: tuple[TensorSlot, ...]
    data: np.ndarray  # uint8, one axis


def pack_buckets(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Packs in order; each bucket holds at most `bucket_bytes`, except that a larger tensor gets its own bucket.

    Each tensor is copied as soon as it comes, so the source may reuse its memory. Any device, any strides; not empty.
    """
    assert bucket_bytes > 0
    slots: list[TensorSlot] = []
    data = np.empty(0, dtype=np.uint8)
    used = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        assert size > 0, f"{name} is empty"
        offset = -(-used // ALIGNMENT) * ALIGNMENT
        if offset + size > len(data):
            if slots:
                yield Bucket(tuple(slots), data[:used])
            slots, offset = [], 0
            data = np.empty(max(bucket_bytes, size), dtype=np.uint8)
        slot = TensorSlot(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset)
        _view(data, slot, size).copy_(tensor)
        slots.append(slot)
        used = offset + size
    if slots:
        yield Bucket(tuple(slots), data[:used])


def unpack_bucket(bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) in packing order. The tensors are views of `bucket.data`: keep it alive, do not write."""
    for slot in bucket.slots:
        element_size = getattr(torch, slot.dtype).itemsize
        yield slot.name, _view(bucket.data, slot, element_size * int(np.prod(slot.shape, dtype=np.int64)))


def _view(data: np.ndarray, slot: TensorSlot, size: int) -> torch.Tensor:
    flat = torch.from_numpy(data[slot.offset : slot.offset + size])
    return flat.view(getattr(torch, slot.dtype)).view(slot.shape)
