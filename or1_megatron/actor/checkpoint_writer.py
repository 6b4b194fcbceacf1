"""Writes one rank's files of a checkpoint in a process of its own, while the rank goes on.

The process is forked when the state has been gathered (on a GPU: copied to the host), so it holds the state of that
moment for nothing but the pages that the rank changes meanwhile. Megatron plans the files and writes the metadata in
the end (`AsyncRequest`); its own writers are not used: their results go through a manager process that takes 5 to
20 s to start, and they wait forever for a writer that was killed.
"""

from __future__ import annotations

import ctypes
import errno
import inspect
import multiprocessing
import os
import pickle
import queue
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from or1_megatron.errors import DISK_FULL, UserError
from or1_megatron.parallel.device import has_cuda
from or1_megatron.parallel.file_sums import FileSums, file_sum

_FORK = multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG = 1
_REFUSALS = (*DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM)


class CheckpointWriter:
    """One checkpoint on its way to `directory`, which exists and is empty. Making it and `finish` are collective."""

    def __init__(self, directory: Path, state: dict[str, Any]):
        self._directory = directory
        self._results = _Results()
        filesystem_async._results_queue = self._results  # else Megatron starts its manager
        # From 0.19 on Megatron's default is another package's writer; this is its own, all that 0.16 has.
        named = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
        strategy: Any = {"async_strategy": "mcore"} if named else {}
        request: Any = dist_checkpointing.save(state, str(directory), async_sharded_save=True, **strategy)
        self._finalize: list[Callable[[], None]] = request.finalize_fns
        self._process: Any = None
        if request.async_fn is not None:
            buckets = request.async_fn_args[1]
            staged = request.preload_fn()
            # On a GPU pinned memory, which a fork shares: once let go of, it would be given out and written over.
            self._staged = staged if has_cuda() else None
            arguments = (request.async_fn.args[0], staged, self._results, os.getpid())
            self._process = _FORK.Process(target=_write, args=arguments, daemon=True)
            self._process.start()
            # Only their number is still asked for, and they hold copies of the weights.
            buckets[:] = [(path, name, ([], [])) for path, name, _ in buckets]

    @property
    def written(self) -> float | None:
        """Seconds that this rank's files took; None: `finish` would have to wait for them."""
        if self._process is None:
            return 0.0
        if self._process.is_alive():
            return None
        return self._results.read()[2] if self._process.exitcode == 0 else 0.0

    def finish(self) -> FileSums:
        """Waits, writes the metadata; this rank's files. Raises on all ranks when one could not write: UserError where
        the disk is full or refuses, else RuntimeError, as for a writer that was killed."""
        if self._process is not None:
            self._process.join()
            self._staged = None
            self._results.exit_code = self._process.exitcode
        try:
            for finalize in self._finalize:
                finalize()
        except CheckpointException as error:
            mine = {str(failure[0]) for failure in error.failures.values()}  # Megatron tells one rank alone
            told: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(told, (mine, self._results.refused))
            reasons = sorted(set().union(*(some for some, _ in told)))
            problem = f"the checkpoint {self._directory} could not be written: {'; '.join(reasons)}"
            if any(refused for _, refused in told):
                problem += "; make room there, or move the run folder elsewhere and resume that"
                raise UserError(problem) from None
            raise RuntimeError(problem) from None
        return self._results.sums


class _Results:
    """Memory that the writing process shares with its rank; in the place of Megatron's queue."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("or1-checkpoint"), "w+b")
        self.sums: FileSums = {}
        self.refused = False  # by a disk that a new start would find the same
        self.exit_code: int | None = None

    def put(self, results: Any, sums: FileSums, seconds: float) -> None:
        pickle.dump((results, sums, seconds), self._file)
        self._file.flush()

    def read(self) -> tuple[Any, FileSums, float]:
        """What the other process put. Not before it has ended well."""
        self._file.seek(0)
        return pickle.load(self._file)

    def get_nowait(self) -> Any:
        """What Megatron takes for the outcome: results per file, or the exception that prevented them."""
        if self.exit_code:
            return RuntimeError(f"the writing process ended with exit code {self.exit_code}")
        results, self.sums, _ = self.read()
        self.refused = isinstance(results, OSError) and results.errno in _REFUSALS
        return results


def _write(transforms: list[Any], buckets: list[Any], results: _Results, parent: int) -> None:
    """The forked process: one file after another, each synced."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # no writer outlives its rank
    if os.getppid() != parent:
        return
    begun, found, sums = time.monotonic(), {}, {}
    for index, bucket in enumerate(buckets):
        outcome: Any = queue.SimpleQueue()  # Megatron says multiprocessing's, but nothing leaves this process
        running: Any = queue.Queue()
        running.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, running, use_fsync=True)
        _, found[index] = outcome.get()
        if isinstance(found[index], Exception):
            results.put(found[index], {}, 0.0)
            return
        path = Path(bucket[0])
        sums[path.name] = file_sum(path)
    results.put(found, sums, time.monotonic() - begun)
