"""A tensor as torch.save writes it into a file of many: written in small pieces, read as a view of the mapped file.

torch.save writes a zip whose members are stored as they are: `data.pkl` names dtype, shape and strides, `data/0` is the
bytes. torch.save would hand them over at once, and torch.load copy them.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import zipfile
from dataclasses import dataclass
from io import BufferedRandom
from typing import Any

import torch

from or1_megatron.parallel.hf_files import map_numbers, write_numbers

_DTYPES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}
UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError)
_HEADER, _ENTRY = 30, 46  # bytes of a member's header in a zip and of its entry in the directory, before its name


@dataclass(frozen=True)
class _Description:
    dtype: torch.dtype
    member: str
    count: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def map_tensor(mapped: mmap.mmap, start: int, length: int) -> torch.Tensor:
    """The tensor in `length` bytes from `start`.

    Raises one of UNREADABLE where there is no float tensor.
    """
    section: Any = _Section(mapped, start, length)
    with zipfile.ZipFile(section) as members:
        described = [name for name in members.namelist() if name.endswith("/data.pkl")]
        if len(described) != 1:
            raise zipfile.BadZipFile("it holds no data.pkl")
        saved = _Unpickler(io.BytesIO(members.read(described[0]))).load()
        if not isinstance(saved, _Description):
            raise pickle.UnpicklingError(f"it holds a {type(saved).__name__} instead of a tensor")
        member = members.getinfo(described[0].removesuffix(".pkl") + "/" + saved.member)
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != saved.count * saved.dtype.itemsize:
        raise zipfile.BadZipFile(f"{member.filename} does not hold {saved.count} numbers of {saved.dtype}")
    header = start + member.header_offset
    first = header + _header_length(mapped[header : header + _HEADER])
    flat = map_numbers(mapped, first, saved.dtype, saved.count)
    return flat.as_strided(saved.shape, saved.strides, saved.offset)


def save_tensor(tensor: torch.Tensor, file: BufferedRandom) -> None:
    """Appends what torch.save writes of a contiguous tensor that fills its storage. Raises OSError."""
    try:
        with torch.serialization.skip_data():
            torch.save(tensor, file)
        file.flush()
    except RuntimeError as error:  # torch hides a failed write behind its own complaint about the file's end
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    end, descriptor = file.tell(), file.fileno()
    with zipfile.ZipFile(file) as members:  # the last one in the file
        (member,) = [member for member in members.infolist() if member.filename.endswith("/data/0")]
        directory = members.start_dir
    first = member.header_offset + _header_length(os.pread(descriptor, _HEADER, member.header_offset))
    crc = write_numbers(descriptor, tensor, first, crc=True).to_bytes(4, "little")
    name = directory + os.pread(descriptor, end - directory, directory).index(member.filename.encode())
    os.pwrite(descriptor, crc, first + member.file_size + 4)  # after the mark of the descriptor behind the numbers
    os.pwrite(descriptor, crc, name - _ENTRY + 16)
    file.seek(end)


def _header_length(header: bytes) -> int:
    """With name and extra field, whose lengths are at 26 and 28."""
    return _HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


class _Unpickler(pickle.Unpickler):
    """Reads a tensor's description; knows no other classes, so it can run nothing."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a plain float tensor")

    def persistent_load(self, pid: Any, /) -> Any:
        return pid


def _describe(storage: tuple, offset: int, shape: tuple, strides: tuple, *_: object) -> _Description:
    _, dtype, member, _, count = storage
    return _Description(dtype, member, count, offset, shape, strides)


class _Section(io.RawIOBase):
    """`length` bytes of a mapped file from `start`, as a file."""

    def __init__(self, mapped: mmap.mmap, start: int, length: int):
        super().__init__()
        self._mapped, self._start, self._length, self._position = mapped, start, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        size = max(0, min(len(buffer), self._length - self._position))
        begin = self._start + self._position
        buffer[:size] = self._mapped[begin : begin + size]
        self._position += size
        return size
