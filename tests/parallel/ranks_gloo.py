"""What the ranks of test_gloo.py run: well and badly behaved."""

from __future__ import annotations

import os
import subprocess
import time

import torch
import torch.distributed as dist


def sums(rank: int, world_size: int, values_T: torch.Tensor) -> dict[str, object]:
    total_T = values_T * (rank + 1)
    dist.all_reduce(total_T)
    return {"rank": rank, "world_size": world_size, "total": total_T, "threads": torch.get_num_threads()}


def raise_on(rank: int, world_size: int, culprit: int) -> None:
    if rank == culprit:
        raise ValueError(f"{culprit} is the culprit")
    dist.barrier()


def die_on(rank: int, world_size: int, culprit: int) -> None:
    if rank == culprit:
        os._exit(7)
    dist.barrier()


def return_what_cannot_be_pickled(rank: int, world_size: int) -> object:
    return lambda: rank


def wait_for_nobody(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(1000)


def leave_a_child(rank: int, world_size: int) -> tuple[int, int]:
    return os.getpid(), subprocess.Popen(["sleep", "1000"]).pid
