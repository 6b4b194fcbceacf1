"""Runs a function on N gloo ranks, each a process of its own; no Ray.

Ranks are forked from a server that has imported torch and Megatron once, so they start in milliseconds; on a machine
with a GPU each is a new interpreter. Whatever happens, none of them outlives the call, nor does a process that one of
them started.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from or1_megatron.parallel import device
from or1_megatron.reward.isolation import die_with_parent

# What has asked for a GPU cannot be forked and use one.
_CONTEXT: Any = multiprocessing.get_context("spawn" if device.has_cuda() else "forkserver")
if not device.has_cuda():
    _CONTEXT.set_forkserver_preload(["tests.parallel.preload"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 180) -> list[Any]:
    """function(rank, world_size, *args) on every rank; the results in rank order.

    `function` is importable by name; arguments and results are picklable, tensors are copied. The first rank that
    raises or dies ends the call with RuntimeError and its traceback; after timeout_s TimeoutError says where each
    unfinished rank stands.
    """
    # Plain bytes: the pickler of multiprocessing would hand over descriptors of tensors that die with their process.
    task = pickle.dumps((function, args))
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        try:
            for rank in range(world_size):
                ours, theirs = _CONTEXT.Pipe()
                process = _CONTEXT.Process(target=_rank, args=(theirs, scratch, rank, world_size, task, timeout_s))
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            return _results(pipes, processes, scratch, timeout_s)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):  # not yet the leader of its group, or gone
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()


def _results(pipes: list[Any], processes: list[Any], scratch: Path, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        waiting = [rank for rank in range(len(pipes)) if rank not in results]
        left = max(0.0, deadline - time.monotonic())
        # A rank's own children may hold its pipe open for a while after its death.
        watched = [end for rank in waiting for end in (pipes[rank], processes[rank].sentinel)]
        ready = multiprocessing.connection.wait(watched, timeout=left)
        if not ready:
            raise TimeoutError(
                f"ranks {waiting} did not finish in {timeout_s} s\n{_stacks(waiting, processes, scratch)}"
            )
        for rank in (rank for rank in waiting if pipes[rank] in ready or processes[rank].sentinel in ready):
            raised, results[rank] = True, "died"
            with contextlib.suppress(EOFError, ConnectionResetError):
                if pipes[rank].poll():
                    raised, results[rank] = pickle.loads(pipes[rank].recv_bytes())
            if raised:
                raise RuntimeError(_reason(rank, results[rank], processes))
    return [results[rank] for rank in range(len(pipes))]


def _reason(rank: int, story: str, processes: list[Any]) -> str:
    """The failure of `rank`, or the death of the rank that caused it: a rank that lives stays until it is killed."""
    sentinels = [process.sentinel for process in processes]
    for sentinel in multiprocessing.connection.wait(sentinels, timeout=0.5):
        process = processes[sentinels.index(sentinel)]  # type: ignore[arg-type]
        process.join()
        return f"rank {processes.index(process)} died, exit code {process.exitcode}"
    return f"rank {rank}:\n{story}"


def _stacks(waiting: list[int], processes: list[Any], scratch: Path) -> str:
    for rank in waiting:
        os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(0.5)
    paths = {rank: scratch / f"stack-{rank}" for rank in waiting}
    return "\n".join(
        f"rank {rank}:\n{path.read_text() if path.exists() else 'not started'}" for rank, path in paths.items()
    )


def _rank(pipe: Any, scratch: Path, rank: int, world_size: int, task: bytes, timeout_s: float) -> None:
    die_with_parent()  # also where that is killed
    os.setsid()  # leads a group of its own: what it starts can be ended with it
    faulthandler.register(signal.SIGUSR1, file=(scratch / f"stack-{rank}").open("w"))
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        import torch

        device.install()
        torch.set_num_threads(1)
        device.init_process_group(f"file://{scratch / 'store'}", rank, world_size, timeout_s)
        function, args = pickle.loads(task)
        result = pickle.dumps((False, function(rank, world_size, *args)))
    except BaseException:  # whatever a rank dies of is its result
        result = pickle.dumps((True, traceback.format_exc()))
    pipe.send_bytes(result)
    # Stays until it is killed: peers may still need it, and must not fail of its failure and be reported first.
    with contextlib.suppress(EOFError):
        pipe.recv_bytes()
    os._exit(0)
