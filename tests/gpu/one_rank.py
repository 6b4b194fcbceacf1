"""One rank in a fresh process, on the CPU or on the GPU: the same function in both is what the tests here compare."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
_CONTEXT = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


def run_on(where: str, function: Callable[..., Any], *args: Any, compiled: bool = False, timeout_s: float = 240) -> Any:
    """function(*args) in a world of one rank with the device seam installed; a CPU rank sees no GPU.

    `function` is importable by name; what it returns is picklable, its tensors on the CPU. Raises RuntimeError with the
    rank's traceback.
    """
    # Megatron compiles some of its own where there is a GPU, whatever ours does.
    environment = {"OR1_COMPILE": str(int(compiled)), "TORCHDYNAMO_DISABLE": str(int(not compiled))}
    if where == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    ours, theirs = _CONTEXT.Pipe()
    with _environment(environment):
        process = _CONTEXT.Process(target=_rank, args=(theirs, function, args))
        process.start()
    theirs.close()
    try:
        if not ours.poll(timeout_s):
            raise TimeoutError(f"{function.__name__} on {where} did not finish in {timeout_s} s")
        raised, result = pickle.loads(ours.recv_bytes())
    except EOFError:
        process.join()
        raise RuntimeError(f"the rank on {where} died, exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if raised:
        raise RuntimeError(result)
    return result


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        from or1_megatron.parallel import device

        device.install()
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as scratch:
            device.init_process_group(f"file://{scratch}/store", 0, 1, 120)
            result = (False, function(*args))
            torch.distributed.destroy_process_group()
    except BaseException:  # whatever a rank dies of is its result
        result = (True, traceback.format_exc())
    # Plain bytes: the pickler of multiprocessing would hand over tensors in memory that dies with this process.
    pipe.send_bytes(pickle.dumps(result))
