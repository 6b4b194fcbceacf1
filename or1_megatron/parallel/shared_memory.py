"""Memory that several processes of one host map. It has no name once all have it, so no crash leaves it behind."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from or1_megatron.errors import UserError

_DIRECTORY = Path("/dev/shm")


def create(size: int, otherwise: str = "set rollout.transport=ray") -> Path:
    """A file of `size` bytes of shared memory for `attach`; the caller unlinks it when all processes have attached.

    The bytes are reserved now: without that, a full /dev/shm would kill the process that first writes to it. Raises
    UserError when there is no room, with `otherwise` as the advice.
    """
    handle, name = tempfile.mkstemp(prefix="or1-weights-", dir=_DIRECTORY)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        os.unlink(name)
        raise UserError(
            f"{_DIRECTORY} has no room for {size / 2**20:.0f} MiB of weights ({error.strerror}); make it larger, or "
            f"{otherwise}"
        ) from None
    finally:
        os.close(handle)
    return Path(name)


def attach(path: Path) -> np.ndarray:
    """The bytes, uint8; writable by every process that attaches."""
    handle = os.open(path, os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(handle, 0), dtype=np.uint8)
    finally:
        os.close(handle)
