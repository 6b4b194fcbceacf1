"""Writing weights as a Megatron dist_checkpointing directory, without Megatron; the format is in megatron_files.py.

What is written here loads at any tp, pp and dp. Nothing but one chunk per thread is ever in memory: torch's own writer
would keep what it has written until the file ends, and lose the errors of its threads.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from or1_megatron.architecture import Architecture
from or1_megatron.errors import UserError
from or1_megatron.parallel.hf_files import HFWeights, run_all, write_synced
from or1_megatron.parallel.layout import hf_shapes, shard, stored_entries
from or1_megatron.parallel.megatron_files import key_of
from or1_megatron.parallel.saved_tensor import save_tensor

_ALIGNMENT = 64  # bytes, torch.save's own within a chunk, so that a chunk can be used where it lies
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class _Chunk:
    """A box of a key's global tensor, and what makes it."""

    key: str
    layer: tuple[int, ...]  # its index in the stack; () outside of the layers
    row: int  # first row in the parameter of tp = 1
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    drop: Callable[[], None]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def stored(self) -> ChunkStorageMetadata:
        offsets = (*self.layer, self.row, *(0 for _ in self.shape[1:]))
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size((*(1 for _ in self.layer), *self.shape)))


def _chunks(architecture: Architecture, weights: HFWeights) -> Iterator[_Chunk]:
    """Every stored chunk. Only the QKV matrices are built; all others are views of the mapped file."""
    shapes = hf_shapes(architecture)
    for entry in stored_entries(architecture, fused_norms=True):
        key, layer = key_of(entry), () if entry.layer is None else (entry.layer,)
        dtype = weights.dtypes[entry.hf[0]]
        if entry.arrangement == "qkv":
            rows = sum(shapes[name][0] for name in entry.hf)
            yield _Chunk(
                key,
                layer,
                0,
                (rows, *shapes[entry.hf[0]][1:]),
                dtype,
                lambda entry=entry: shard(entry, weights.read, architecture, tp=1, rank=0),
                lambda entry=entry: weights.drop(*entry.hf),
            )
            continue
        row = 0
        for name in entry.hf:
            yield _Chunk(
                key,
                layer,
                row,
                shapes[name],
                dtype,
                lambda name=name: weights.read(name),
                lambda name=name: weights.drop(name),
            )
            row += shapes[name][0]


def write_megatron(
    directory: Path,
    architecture: Architecture,
    weights: HFWeights,
    *,
    num_threads: int,
    advance: Callable[[int], None],
) -> None:
    """Writes and syncs the weights as a dist_checkpointing checkpoint, one file per thread.

    advance: called with the bytes written after each chunk. Raises UserError, before writing, when the tensors that
    Megatron stacks differ in dtype.
    """
    _check_dtypes(architecture, weights)
    chunks = list(_chunks(architecture, weights))
    total = sum(chunk.num_bytes for chunk in chunks)
    ends = accumulate(chunk.num_bytes for chunk in chunks)
    files: list[list[_Chunk]] = [[] for _ in range(num_threads)]
    for chunk, end in zip(chunks, ends, strict=True):
        files[min(num_threads - 1, (end - chunk.num_bytes) * num_threads // total)].append(chunk)
    stored: dict[MetadataIndex, _StorageInfo] = {}

    def write(index: int) -> None:
        name = f"__0_{index}.distcp"
        with (directory / name).open("w+b") as file:
            for chunk in files[index]:
                start = file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                tensor = chunk.make().view(chunk.stored.sizes)
                assert tensor.untyped_storage().nbytes() == chunk.num_bytes, chunk
                save_tensor(tensor, file)
                del tensor
                chunk.drop()
                place = MetadataIndex(chunk.key, chunk.stored.offsets)
                stored[place] = _StorageInfo(name, start, file.tell() - start)
                advance(chunk.num_bytes)
            file.flush()
            os.fsync(file.fileno())

    run_all(write, range(num_threads), num_threads)
    common = io.BytesIO()
    torch.save({}, common)
    write_synced(directory / "common.pt", common.getvalue())
    write_synced(directory / "metadata.json", json.dumps(_FORMAT).encode())
    write_synced(directory / ".metadata", pickle.dumps(_metadata(architecture, chunks, stored)))


def _check_dtypes(architecture: Architecture, weights: HFWeights) -> None:
    found: dict[str, set[torch.dtype]] = {}
    for entry in stored_entries(architecture, fused_norms=True):
        found.setdefault(key_of(entry), set()).update(weights.dtypes[name] for name in entry.hf)
    mixed = [f"{key} ({', '.join(sorted(map(str, kinds)))})" for key, kinds in found.items() if len(kinds) > 1]
    if mixed:
        raise UserError(
            f"tensors that Megatron keeps as one differ in dtype: {', '.join(mixed)}; "
            "save the Hugging Face checkpoint in one dtype first"
        )


def _metadata(architecture: Architecture, chunks: list[_Chunk], stored: dict[MetadataIndex, _StorageInfo]) -> Metadata:
    described: dict[str, TensorStorageMetadata] = {}
    for chunk in chunks:
        last = [offset + size for offset, size in zip(chunk.stored.offsets, chunk.stored.sizes, strict=True)]
        known = described.setdefault(
            chunk.key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(last), [])
        )
        known.size = torch.Size(max(pair) for pair in zip(known.size, last, strict=True))
        known.chunks.append(chunk.stored)
    return Metadata(state_dict_metadata=dict(described), storage_data=stored)
