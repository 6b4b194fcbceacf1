"""driver.lock of a run folder: the one process that may write there, as itself and others see it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from or1_megatron.errors import UserError
from or1_megatron.parallel.file_sums import take_lock

NAME = "driver.lock"
_LEAVE_S = 180.0
_GLANCE_S = 0.2  # longer than driver_of has the lock


class Driver(NamedTuple):
    """The process that runs a run, as its lock has it."""

    host: str
    process: int
    job: str  # Slurm's; empty outside of one

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}" + (f" of job {self.job}" if self.job else "")


def _read(lock: TextIO) -> Driver:
    lock.seek(0)
    try:
        return Driver(*json.loads(lock.read()))
    except (ValueError, TypeError):  # it has only just begun
        return Driver("an unknown host", 0, "")


def driver_of(run: Path) -> Driver | None:
    """Who runs it now; None: nobody. Raises OSError where the file system has no locks."""
    path = run / NAME
    if not path.is_file():
        return None
    with path.open() as lock:
        try:
            # Shared, and let go at once: a driver that begins in this instant tries again, see held.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(lock)
    return None


@contextmanager
def held(run: Path) -> Iterator[None]:
    """For the one process that may write in this run folder. Raises UserError while there is another.

    One on another host gets _LEAVE_S to go: that node may be dead, and the file server has not noticed yet. After that
    one of the same Slurm job is taken for dead, as a job that has been requeued has no other. Where a file system has
    no locks nothing is refused.
    """
    path, me = run / NAME, Driver(platform.node(), os.getpid(), os.environ.get("SLURM_JOB_ID", ""))
    with path.open("a+") as file:
        begun = time.monotonic()
        while not take_lock(file):
            other, waited = _read(file), time.monotonic() - begun
            here, late = other.host == me.host, waited > _LEAVE_S
            if late and me.job and other.job == me.job:
                break
            if late or (here and waited >= _GLANCE_S):
                raise UserError(f"{run} belongs to {other}; wait for its end, or remove {path} if that is surely dead")
            if not here:
                print(f"waiting for {other}, to which {run} belongs", file=sys.stderr, flush=True)
            time.sleep(_GLANCE_S if here else 10)
        file.truncate(0)
        file.write(json.dumps(me))
        file.flush()
        yield
