"""What becomes of a wait when the process that was asked fails in one way or another."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from or1_megatron.cluster import joining
from or1_megatron.cluster.cluster import check_cuda
from or1_megatron.cluster.workers import Workers
from or1_megatron.errors import RunFailure, UserError, WorkerDied


@ray.remote(num_cpus=0)
class Asked:
    def ping(self) -> int:
        return os.getpid()

    def fails(self, error: BaseException) -> None:
        raise error

    def streams(self, count: int, error: BaseException | None = None) -> Iterator[int]:
        yield from (number for number in range(count))
        if error:
            raise error


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    joining.enter(1 << 27)
    yield
    ray.shutdown()


@pytest.fixture
def workers(running: None, tmp_path: Path) -> tuple[Workers, list[Any]]:
    some = Workers(60.0)
    asked = [Asked.remote() for _ in range(2)]  # type: ignore[attr-defined]
    for number, worker in enumerate(asked):
        some.add(worker, tmp_path / f"engine{number}.log")
    return some, asked


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: uncorrectable ECC error encountered"), TimeoutError("no answer in 300 s")]
)
def test_a_fault_is_the_death_of_the_one_that_was_asked(workers: tuple[Workers, list[Any]], error: Exception) -> None:
    some, (_, second) = workers
    with pytest.raises(WorkerDied, match=r"engine1 failed: (RuntimeError|TimeoutError)\(") as raised:
        some.wait([second.fails.remote(error)])
    assert raised.value.workers == [second] and str(error) in raised.value.log_tail


def test_a_mistake_ends_the_run(workers: tuple[Workers, list[Any]]) -> None:
    some, (first, _) = workers
    with pytest.raises(RunFailure, match="AssertionError") as raised:
        some.wait([first.fails.remote(AssertionError("shapes"))])
    assert not isinstance(raised.value, WorkerDied)


@pytest.mark.parametrize(
    "error", [UserError("the disk is full"), RunFailure("sums differ"), OSError(errno.ENOSPC, "No space left")]
)
def test_what_a_process_says_itself_is_passed_on(workers: tuple[Workers, list[Any]], error: Exception) -> None:
    some, (first, _) = workers
    with pytest.raises(type(error), match=str(error).partition("]")[2].strip() or str(error)) as raised:
        some.wait([first.fails.remote(error)])
    assert not isinstance(raised.value, WorkerDied)


def test_a_stream_that_fails_is_replaced_and_the_others_go_on(workers: tuple[Workers, list[Any]]) -> None:
    some, (first, second) = workers
    told: list[WorkerDied] = []

    def stream(worker: Any, *arguments: Any) -> dict[Any, Any]:
        return {worker.streams.options(num_returns="streaming").remote(*arguments): worker}

    def replace(died: WorkerDied) -> dict[Any, Any]:
        told.append(died)
        return stream(first, 3)

    streams = stream(first, 4) | stream(second, 2, RuntimeError("NCCL error: remote process exited"))
    got = sorted(item for _, item in some.drain(streams, replace=replace))
    assert got == sorted([*range(4), *range(2), *range(3)])
    assert [died.workers for died in told] == [[second]]


def test_ranks_without_cuda_among_others_are_told_and_a_run_without_any_goes_on() -> None:
    hosts = ["node1", "node1", "node2", "node2"]
    with pytest.raises(RunFailure, match="CUDA does not start in rank 2 on node2; see nvidia-smi"):
        check_cuda([True, True, False, False], hosts)
    check_cuda([True] * 4, hosts)
    check_cuda([False] * 4, hosts)
