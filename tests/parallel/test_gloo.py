"""The harness itself: it reports the rank at fault, never hangs and leaves nothing behind."""

from __future__ import annotations

import time

import psutil
import pytest
import torch

from tests.parallel import ranks_gloo
from tests.parallel.gloo import run_ranks


@pytest.mark.parametrize("world_size", [1, 3])
def test_results_come_in_rank_order(world_size: int):
    values_T = torch.tensor([1.0, -2.0])
    results = run_ranks(world_size, ranks_gloo.sums, values_T)
    assert [result["rank"] for result in results] == list(range(world_size))
    for result in results:
        assert result["world_size"] == world_size and result["threads"] == 1
        assert torch.equal(result["total"], values_T * (world_size * (world_size + 1) / 2))


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_the_rank_that_raises_is_reported(culprit: int):
    with pytest.raises(RuntimeError, match=rf"(?s)^rank {culprit}:.*in raise_on.*ValueError: {culprit} is the culprit"):
        run_ranks(3, ranks_gloo.raise_on, culprit)


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_rank_that_dies_is_reported(culprit: int):
    with pytest.raises(RuntimeError, match=f"^rank {culprit} died, exit code 7"):
        run_ranks(2, ranks_gloo.die_on, culprit)


def test_a_result_that_cannot_be_pickled_is_reported():
    with pytest.raises(RuntimeError, match="(?s)^rank 0:.*pickle"):
        run_ranks(1, ranks_gloo.return_what_cannot_be_pickled)


def test_a_rank_that_hangs_is_reported_with_its_stack():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)^ranks \[1\] did not finish.*wait_for_nobody"):
        run_ranks(2, ranks_gloo.wait_for_nobody, timeout_s=8)
    assert time.monotonic() - started < 60


def test_nothing_outlives_the_call():
    pids = [pid for result in run_ranks(2, ranks_gloo.leave_a_child) for pid in result]
    assert len(pids) == 4
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
