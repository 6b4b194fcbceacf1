"""glibc's malloc: when freed memory goes back to the machine. Other C libraries keep their own counsel.

Left alone, malloc maps every large tensor anew and unmaps it when it is freed, so that each one's pages are faulted in
and zeroed again at every update. A rank keeps them instead, and gives them back at the times when others want the
memory.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """From now on this process keeps what it frees for its next tensors, until `trim_host_memory`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_ARENA_MAX, 1)  # the heaps of other threads would be unmapped all the same


def trim_host_memory() -> None:
    """Hands freed host memory back to the machine: without a GPU, ranks and engines share it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
