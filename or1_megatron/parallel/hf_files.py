"""The safetensors files of an HF checkpoint directory: reading them mapped and checked, writing them in parallel.

A safetensors file is the header's length (8 bytes, little endian), the header (JSON: name -> dtype, shape and the
tensor's byte range), then the bytes. All offsets are known before the first tensor is, so every tensor is written to
its place by whichever thread has it.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from or1_megatron.architecture import Architecture
from or1_megatron.errors import UserError
from or1_megatron.parallel.layout import Entry, hf_shapes, stored_entries

INDEX = "model.safetensors.index.json"
_PIECE = 1 << 20  # bytes
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that some exporters store
_MOST_NAMED = 5

# Mapped files are read-only, and so are the tensors on them.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


@dataclass(frozen=True)
class _Place:
    """One tensor of a mapped file."""

    file: mmap.mmap
    offset: int
    dtype: str
    shape: tuple[int, ...]


class HFWeights:
    """Context manager; `read(name)` returns a whole tensor, a view of the mapped file.

    Opening checks that every tensor the architecture needs is there with its shape and a float type, and that nothing
    unknown is; raises UserError naming all that is missing, extra, mis-shaped or mis-typed, or the corrupt file.
    """

    def __init__(self, path: Path, architecture: Architecture):
        self._places: dict[str, _Place] = {}
        for file in _files(path):
            self._places |= _map(file)
        expected = hf_shapes(architecture)
        alias = {"lm_head.weight"} if architecture.tied else set()
        found = {n: p.shape for n, p in self._places.items() if not n.endswith(_IGNORED) and n not in alias}
        wrong = [f"{n} {p.dtype}" for n, p in self._places.items() if n in expected and p.dtype not in DTYPES]
        raise_differences(path, found, expected, {f"wrong dtype (only {', '.join(DTYPES)} are read)": wrong})
        self.dtypes = {name: DTYPES[self._places[name].dtype] for name in expected}

    def read(self, name: str) -> torch.Tensor:
        place = self._places[name]
        return map_numbers(place.file, place.offset, DTYPES[place.dtype], prod(place.shape)).view(place.shape)

    def tensors(self, entry: Entry) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor) of one parameter, one after the other; a tensor's pages are dropped after its turn."""
        for name in entry.hf:
            yield name, self.read(name)
            self.drop(name)

    def drop(self, *names: str) -> None:
        """Takes the tensors' pages out of this process; reading them again brings them back."""
        for name in names:
            place = self._places[name]
            start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
            end = place.offset + prod(place.shape) * DTYPES[place.dtype].itemsize
            place.file.madvise(mmap.MADV_DONTNEED, start, end - start)

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._places.clear()  # each mapping goes with the last tensor on it


def map_numbers(mapped: mmap.mmap, offset: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """`count` numbers of a mapped file; a view, or a copy where they are not aligned, which no format promises."""
    if offset % dtype.itemsize:
        raw = torch.frombuffer(mapped, dtype=torch.uint8, offset=offset, count=count * dtype.itemsize)
        return raw.clone().view(dtype)
    return torch.frombuffer(mapped, dtype=dtype, offset=offset, count=count)


def raise_differences(
    path: Path,
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    others: dict[str, list[str]],
) -> None:
    """UserError naming all that is missing, unknown or mis-shaped in `path`, and `others` (what -> names)."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "not known": sorted(found.keys() - expected.keys()),
        "wrong shape": [f"{n} {found[n]} instead of {s}" for n, s in expected.items() if n in found and found[n] != s],
        **others,
    }
    told = [
        f"{what}: {', '.join(names[:_MOST_NAMED])}"
        + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")
        for what, names in problems.items()
        if names
    ]
    if told:
        raise UserError(f"{path}: the tensors do not match config.json; {'; '.join(told)}")


def _map(file: Path) -> dict[str, _Place]:
    """The tensors of one file, mapped; its header is checked by safetensors itself."""
    try:
        with safe_open(file, framework="pt"), file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}); copy or download it again") from None
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    header.pop("__metadata__", None)
    return {
        name: _Place(mapped, start + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index} is not a readable index; copy or download it again") from None
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            raise UserError(f"{path}: {', '.join(absent)} named in {index.name} is missing; copy or download it again")
        return [path / name for name in names]
    single = path / "model.safetensors"
    if not single.is_file():
        raise UserError(f"{path} holds neither model.safetensors nor {index.name}; convert the weights to safetensors")
    return [single]


@dataclass(frozen=True)
class _Slot:
    """Where one tensor goes."""

    descriptor: int
    offset: int
    dtype: torch.dtype


def write_hf(
    directory: Path,
    architecture: Architecture,
    dtypes: dict[str, torch.dtype],
    tensors: Callable[[Entry], Iterable[tuple[str, torch.Tensor]]],
    *,
    max_shard_bytes: int,
    num_threads: int,
    advance: Callable[[int], None],
) -> None:
    """Writes and syncs the safetensors files of a model into `directory`.

    dtypes: HF name -> type to write; `tensors` yields an entry's (HF name, tensor), which are cast where they differ.
    advance: called with the bytes written after each tensor. One tensor per thread is in memory.
    """
    shapes = hf_shapes(architecture)
    table = stored_entries(architecture)
    order = [name for entry in table for name in entry.hf]
    bytes_of = {name: prod(shapes[name]) * dtypes[name].itemsize for name in order}
    files = _cut(order, bytes_of, max_shard_bytes)
    slots: dict[str, _Slot] = {}
    descriptors = []
    try:
        for file, names in files.items():
            header, offsets = _header(names, shapes, dtypes, bytes_of)
            descriptor = os.open(directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            descriptors.append(descriptor)
            _write_at(descriptor, memoryview(header), 0)
            slots |= {name: _Slot(descriptor, offsets[name], dtypes[name]) for name in names}

        def write(entry: Entry) -> None:
            for name, tensor in tensors(entry):
                slot = slots[name]
                write_numbers(slot.descriptor, tensor.to(slot.dtype).contiguous(), slot.offset)
                advance(bytes_of[name])

        run_all(write, table, num_threads)
        run_all(os.fsync, descriptors, num_threads)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": weight_map}
        write_synced(directory / INDEX, json.dumps(index, indent=2).encode() + b"\n")


def run_all(work: Callable, items: Iterable, num_threads: int) -> None:
    """work(item) for every item; the first failure ends the rest and is raised."""
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for future in [pool.submit(work, item) for item in items]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _cut(order: list[str], bytes_of: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> tensors, in order; a file exceeds `limit` only by a single tensor that does."""
    groups: list[list[str]] = []
    used = limit
    for name in order:
        if not groups or used + bytes_of[name] > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += bytes_of[name]
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _header(
    names: list[str], shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], bytes_of: dict[str, int]
) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor begins in the file."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, {}
    for name in names:
        starts[name] = position
        position += bytes_of[name]
        table[name] = {
            "dtype": _NAMES[dtypes[name]],
            "shape": list(shapes[name]),
            "data_offsets": [starts[name], position],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + start for name, start in starts.items()}


def write_numbers(descriptor: int, tensor: torch.Tensor, offset: int, *, crc: bool = False) -> int:
    """Writes a contiguous tensor's bytes; their CRC-32, or 0 where nobody asks.

    By way of a small buffer: a mapped file's page that must be fetched during a write would hold up the other threads,
    which write to the same file, and large writes are at times three times as slow as small ones.
    """
    flat, value = tensor.view(-1).view(torch.uint8), 0
    buffer = torch.empty(min(_PIECE, flat.numel()), dtype=torch.uint8)
    for piece in flat.split(_PIECE):
        data = buffer[: piece.numel()].copy_(piece).numpy().data
        value = zlib.crc32(data, value) if crc else 0
        _write_at(descriptor, data, offset)
        offset += piece.numel()
    return value


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)  # Linux writes at most 2 GiB a call
        data, offset = data[written:], offset + written
