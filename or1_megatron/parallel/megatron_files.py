"""The weights in a Megatron dist_checkpointing directory, under their HF names, read without Megatron.

The format (`torch_dist`) is torch's distributed checkpoint: `.metadata` (pickled Metadata: per key its dtype, global
shape and chunks, and where each chunk lies), `*.distcp` (one torch.save after the other), `common.pt` and
`metadata.json`. Keys are the TransformerEngine spec's names, which Megatron writes for every spec, without the
layer's number: all layers of a parameter are stacked along a first axis. The global tensor is that of tp = 1. A tied
head is not stored. The directory may be a converted one or come from a run at any tp and pp.
"""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from or1_megatron.architecture import Architecture
from or1_megatron.errors import UserError
from or1_megatron.parallel.hf_files import DTYPES, HFWeights, raise_differences
from or1_megatron.parallel.layout import Entry, hf_shapes, stored_entries, unshard
from or1_megatron.parallel.saved_tensor import UNREADABLE, map_tensor

FORMAT_FILES = (".metadata", "common.pt", "metadata.json")
_WEIGHTS = ("embedding.", "decoder.", "output_layer.")  # the rest is a run's: optimizer, generators


def is_megatron(path: Path) -> bool:
    """Whether `path` is a dist_checkpointing directory."""
    return (path / ".metadata").is_file() and (path / "metadata.json").is_file()


def key_of(entry: Entry) -> str:
    """Name in the checkpoint: that of an entry of the TransformerEngine spec, without the layer's number."""
    return entry.megatron if entry.layer is None else entry.megatron.replace(f".{entry.layer}.", ".", 1)


@dataclass(frozen=True)
class _Piece:
    """A stored chunk in its parameter's own dimensions."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    place: _StorageInfo


class MegatronWeights:
    """Context manager; the weights of a dist_checkpointing directory, whole, under their HF names.

    Opening checks keys, shapes and types against the architecture; raises UserError naming all that is missing, extra,
    mis-shaped or mis-typed, or what cannot be read.
    """

    def __init__(self, path: Path, architecture: Architecture):
        self._path, self._architecture = path, architecture
        self._shapes = hf_shapes(architecture)
        metadata = _read_metadata(path)
        tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and key.startswith(_WEIGHTS)
        }
        self._check(tensors)
        self.dtypes: dict[str, torch.dtype] = {}
        self._pieces: dict[str, list[_Piece]] = {}  # by a parameter's first HF name, the same under either spec
        for entry in stored_entries(architecture, fused_norms=True):
            value = tensors[key_of(entry)]
            self.dtypes |= {name: value.properties.dtype for name in entry.hf}
            chunks = [c for c in value.chunks if entry.layer is None or c.offsets[0] == entry.layer]
            self._pieces[entry.hf[0]] = [self._piece(entry, chunk, metadata.storage_data) for chunk in chunks]
        names = {piece.place.relative_path for pieces in self._pieces.values() for piece in pieces}
        self._files = {name: _map(path / name) for name in sorted(names)}

    def _check(self, tensors: dict[str, TensorStorageMetadata]) -> None:
        a = self._architecture
        expected: dict[str, tuple[int, ...]] = {}
        for entry in stored_entries(a, fused_norms=True):
            rows, *others = (sum(self._shapes[name][0] for name in entry.hf), *self._shapes[entry.hf[0]][1:])
            stack = () if entry.layer is None else (a.num_layers,)
            expected[key_of(entry)] = (*stack, rows, *others)
        found = {key: tuple(value.size) for key, value in tensors.items()}
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if key in found and key in expected and found[key][0] >= expected[key][0]:
                found[key] = (expected[key][0], *found[key][1:])  # padded rows
        wrong = [f"{k} {v.properties.dtype}" for k, v in tensors.items() if v.properties.dtype not in DTYPES.values()]
        raise_differences(self._path, found, expected, {"wrong dtype": wrong})

    def _piece(self, entry: Entry, chunk: ChunkStorageMetadata, places: dict[MetadataIndex, _StorageInfo]) -> _Piece:
        key, skipped = key_of(entry), 0 if entry.layer is None else 1
        place = places.get(MetadataIndex(key, chunk.offsets))
        if place is None:
            raise UserError(f"{self._path}: .metadata does not say where {key} at {tuple(chunk.offsets)} lies")
        return _Piece(tuple(chunk.offsets[skipped:]), tuple(chunk.sizes[skipped:]), place)

    def tensors(self, entry: Entry) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor) of one parameter, under either spec's name; each until the next one is asked for."""
        if entry.arrangement == "qkv":
            rows = sum(self._shapes[name][0] for name in entry.hf)
            yield from unshard(entry, [self._rows(entry, 0, rows)], self._architecture)
        else:
            row = 0
            for name in entry.hf:
                yield name, self._rows(entry, row, self._shapes[name][0])
                row += self._shapes[name][0]
        self._drop(entry)

    def _rows(self, entry: Entry, first: int, count: int) -> torch.Tensor:
        """Rows of one parameter of tp = 1; without a copy where one chunk holds them."""
        shape = (count, *self._shapes[entry.hf[0]][1:])
        whole: torch.Tensor | None = None
        filled = 0
        for piece in self._pieces[entry.hf[0]]:
            begin, end = max(first, piece.start[0]), min(first + count, piece.start[0] + piece.shape[0])
            if begin >= end:
                continue
            part = self._load(piece).narrow(0, begin - piece.start[0], end - begin)
            if tuple(part.shape) == shape:
                return part
            if whole is None:
                whole = torch.empty(shape, dtype=part.dtype)
            target = whole.narrow(0, begin - first, end - begin)
            if len(shape) > 1:
                target = target.narrow(1, piece.start[1], piece.shape[1])
            target.copy_(part)
            filled += part.numel()
        if whole is None or filled != whole.numel():
            raise UserError(f"{self._path}: {entry.megatron} is stored only in part; save the checkpoint again")
        return whole

    def _load(self, piece: _Piece) -> torch.Tensor:
        place = piece.place
        try:
            return map_tensor(self._files[place.relative_path], place.offset, place.length).view(piece.shape)
        except (*UNREADABLE, RuntimeError) as error:
            file, reason = self._path / place.relative_path, str(error).splitlines()[0]
            raise UserError(f"{file} cannot be read ({reason}); copy or save the checkpoint again") from None

    def _drop(self, entry: Entry) -> None:
        """Takes a parameter's pages out of this process; reading it again brings them back."""
        for piece in self._pieces[entry.hf[0]]:
            place = piece.place
            start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._files[place.relative_path].madvise(mmap.MADV_DONTNEED, start, place.offset + place.length - start)

    def __enter__(self) -> MegatronWeights:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _map(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy or save the checkpoint again") from None


def _read_metadata(path: Path) -> Metadata:
    if not is_megatron(path):
        raise UserError(f"{path} is not a Megatron checkpoint: it holds no .metadata and metadata.json")
    file = path / ".metadata"
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except (*UNREADABLE, AttributeError, ImportError, IndexError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy or save the checkpoint again") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{file} holds a {type(metadata).__name__}, not a checkpoint's metadata")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Checkpoints come from elsewhere, and a pickle can name any function to be called: only plain records pass."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a checkpoint's metadata")


_METADATA = "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties"
_RECORDS = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (*_METADATA.split(), "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData".split(),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}


def all_tensors(weights: HFWeights | MegatronWeights, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (HF name, tensor), in the order of a forward pass; a tensor is valid until the next one is asked for."""
    for entry in stored_entries(architecture):
        yield from weights.tensors(entry)


def open_weights(path: Path, architecture: Architecture) -> HFWeights | MegatronWeights:
    """The weights of either kind of directory, checked. Raises UserError."""
    return MegatronWeights(path, architecture) if is_megatron(path) else HFWeights(path, architecture)
