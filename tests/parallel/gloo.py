"""Runs a function on N gloo ranks, each a process of its own; no Ray.

Ranks are forked from a server that has imported torch and Megatron once, so they start in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.parallel.preload"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 180) -> list[Any]:
    """function(rank, world_size, *args) on every rank; the results in rank order.

    `function` is importable by name; results are picklable. The first rank that raises, dies or outlasts the
    timeout fails the call with its traceback, and all ranks are ended.
    """
    with tempfile.TemporaryDirectory() as scratch:
        store = f"file://{Path(scratch) / 'store'}"
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_rank, args=(theirs, store, rank, world_size, function, args))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _results(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(pipes: list[multiprocessing.connection.Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {[r for r in range(len(pipes)) if r not in results]} did not finish in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failed, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {rank} died") from None
            if failed:
                raise RuntimeError(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Any, store: str, rank: int, world_size: int, function: Callable[..., Any], args: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from or1_megatron.parallel import device

    device.install()
    torch.set_num_threads(1)
    device.init_process_group(store, rank, world_size, 120)
    try:
        result = (False, function(rank, world_size, *args))
    except BaseException:  # whatever a rank dies of is its result
        result = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(result))  # plain bytes: torch would hand over descriptors that die with this process
    pipe.close()
    os._exit(0)  # peers may still be busy: no collective tear-down
