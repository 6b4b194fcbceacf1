"""Time and memory of work on this process's device: CUDA events on a GPU, the host's clock without one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from benchmarks.harness import Benchmark, Case, Kind
from or1_megatron.parallel import device

# Registers cases and marks that take turns; their tensors are freed before the next part's.
Part = Callable[[Benchmark], None]
_QUEUED_CYCLES = 2_000_000  # about a millisecond


def seconds(work: Callable[[], Any]) -> float:
    """Of one run of `work`, from the first kernel's start to the last one's end."""
    if not device.has_cuda():
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_QUEUED_CYCLES)  # meanwhile the host submits kernels ahead, as in a run
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def extra_bytes(work: Callable[[], Any]) -> int:
    """Most memory that `work` held beyond what there was before it; on the host, what its resident set grew by."""
    free_memory()
    device.take_peak_memory()
    before = torch.cuda.memory_allocated() if device.has_cuda() else psutil.Process().memory_info().rss
    seconds(work)
    return max(0, device.take_peak_memory() - before)


def used_memory() -> int:
    """Bytes of the GPU that anyone uses; on the host, this process's resident set."""
    if not device.has_cuda():
        return psutil.Process().memory_info().rss
    free, total = torch.cuda.mem_get_info()
    return total - free


def free_memory() -> None:
    gc.collect()
    device.release_memory()


def attempt(
    bench: Benchmark, label: str, run: Callable[[], float], kind: Kind, amount: float, unit: str
) -> Case | None:
    """Registers the case if it runs once; else a row says why not. A peer may fail, ours may only lack memory.

    Raises whatever ours raised.
    """
    try:
        run()
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # whatever a peer can lack here
        if kind != "peer":
            raise
        reason = f"fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
    else:
        return bench.case(label, run, kind, amount, unit)
    free_memory()
    bench.note(f"{label}: {reason}")
    return None
