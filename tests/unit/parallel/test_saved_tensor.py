"""Tensors inside a file of several torch.save: the same bits as torch.load gives, wherever they lie."""

from __future__ import annotations

import errno
import io
import mmap
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from or1_megatron.parallel.saved_tensor import UNREADABLE, map_tensor, save_tensor

TENSORS = [
    torch.randn(3, 5),
    torch.randn(7, 2).to(torch.bfloat16).t(),
    torch.randn(4, 6).half()[1:3, ::2],  # a view: the whole storage is saved
    torch.tensor([float("nan"), -0.0, float("inf")]),
]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def map_of(path: Path, content: bytes) -> mmap.mmap:
    path.write_bytes(content)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.mark.parametrize("first", [0, 1, 63])
def test_same_bits_as_torch_load(first: int, tmp_path: Path) -> None:
    parts = [saved(tensor) for tensor in TENSORS]
    mapped = map_of(tmp_path / "file", b"x" * first + b"".join(parts))
    start = first
    for tensor, part in zip(TENSORS, parts, strict=True):
        found = map_tensor(mapped, start, len(part))
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert found.data_ptr() % found.element_size() == 0, "not aligned"
        assert pickle.dumps(found.tolist()) == pickle.dumps(tensor.tolist())
        start += len(part)


@pytest.mark.parametrize("count", [0, 1, 2**20 // 4, 2**20 // 2 + 3])  # a piece has 2**20 bytes
def test_what_is_written_is_what_torch_would_write(count: int, tmp_path: Path) -> None:
    """But for the id in it, which torch makes of the checksums: several after each other, each a sound zip."""
    tensors = [torch.randn(count), torch.randn(2, 3), torch.randn(count, 1).to(torch.bfloat16)]
    places = []
    with (tmp_path / "file").open("w+b") as file:
        for tensor in tensors:
            start = file.seek(file.tell() + 5)
            save_tensor(tensor, file)
            places.append((start, file.tell() - start))
    content = (tmp_path / "file").read_bytes()
    for (start, length), tensor in zip(places, tensors, strict=True):
        ours, theirs = (zipfile.ZipFile(io.BytesIO(part)) for part in (content[start : start + length], saved(tensor)))
        assert ours.testzip() is None and ours.namelist() == theirs.namelist()
        for one, other in zip(ours.infolist(), theirs.infolist(), strict=True):
            assert (one.header_offset, one.file_size) == (other.header_offset, other.file_size)
            assert one.filename.endswith("serialization_id") or ours.read(one) == theirs.read(other)
        loaded = torch.load(io.BytesIO(content[start : start + length]), weights_only=True)
        assert torch.equal(loaded, tensor) and loaded.dtype == tensor.dtype


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"a": torch.ones(2)}, pickle.UnpicklingError),
        (torch.ones(2, dtype=torch.int64), pickle.UnpicklingError),
        (torch.nn.Linear(1, 1), pickle.UnpicklingError),
        (torch.ones(2).to_sparse(), pickle.UnpicklingError),
    ],
    ids=["dict", "integers", "module", "sparse"],
)
def test_anything_else_is_refused(value: object, error: type[Exception], tmp_path: Path) -> None:
    content = saved(value)
    with pytest.raises(error):
        map_tensor(map_of(tmp_path / "file", content), 0, len(content))


def test_torn_bytes_are_refused(tmp_path: Path) -> None:
    content = saved(torch.randn(100))
    mapped = map_of(tmp_path / "file", content)
    for start, length in ((0, len(content) - 40), (9, len(content) - 9)):
        with pytest.raises(UNREADABLE):
            map_tensor(mapped, start, length)


@pytest.mark.parametrize(("compression", "fewer"), [(zipfile.ZIP_DEFLATED, 0), (zipfile.ZIP_STORED, 4)])
def test_numbers_that_are_packed_or_too_few_are_refused(compression: int, fewer: int, tmp_path: Path) -> None:
    """What stands there instead would be read as numbers."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.randn(100)))) as whole, zipfile.ZipFile(buffer, "w") as made:
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith("/data/0"):
                made.writestr(name, content[: len(content) - fewer], compression)
            else:
                made.writestr(name, content)
    content = buffer.getvalue()
    with pytest.raises(zipfile.BadZipFile, match="does not hold 100 numbers"):
        map_tensor(map_of(tmp_path / "file", content), 0, len(content))


def test_failed_write_is_told_as_such() -> None:
    """torch.save by itself complains about the position in the file instead."""

    class FullDisk(io.BytesIO):
        def write(self, data, /) -> int:
            if self.tell() > 500:
                raise OSError(errno.ENOSPC, "No space left")
            return super().write(data)

    with pytest.raises(OSError, match="No space left"):
        save_tensor(torch.ones(1000), FullDisk())  # pyright: ignore[reportArgumentType]
