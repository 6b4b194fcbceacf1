"""Files that are there in full or not at all, and for one process at a time; size and CRC-32 of those of a checkpoint,
which tell a damaged one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

FileSums = dict[str, tuple[int, int]]  # path below the checkpoint -> bytes, CRC-32

_BLOCK_BYTES = 1 << 24
_THREADS = 8  # zlib lets go of the interpreter


def file_sum(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of one file."""
    size, value = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size, value = size + len(block), zlib.crc32(block, value)
    return size, value


def damage(directory: Path, sums: Mapping[str, tuple[int, int]]) -> str:
    """The first of the files that is not as `sums` says, and how it differs; empty when all of them are."""

    def differs(name: str) -> str:
        path, (size, value) = directory / name, sums[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        return "" if file_sum(path) == (size, value) else f"the bytes of {name} are not those that were written"

    with ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(differs, sums)), "")


def sync(path: Path) -> None:
    """Has the machine write a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to; afterwards syncs the bytes, then renames, then syncs the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def publish_text(path: Path, text: str) -> None:
    """The file with this text, see published."""
    with published(path) as temporary:
        temporary.write_text(text)


def take_lock(file: IO) -> bool:
    """Whether nobody else has the lock of this open, writable file: no other process, and on file systems of several
    hosts (where the lock of a folder would hold on one host only) of no other host. True where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
