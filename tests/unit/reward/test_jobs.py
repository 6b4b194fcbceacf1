"""A free worker's choice among the waiting jobs; every job is taken once."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

from hypothesis import given
from hypothesis import strategies as st

from or1_megatron.reward.jobs import _WINDOW, Job, take_for
from or1_megatron.reward.problem import Task


def waiting(golds: str) -> deque[Job]:
    return deque(Job(Task(str(place), (gold,)), Future(), 1.0, False) for place, gold in enumerate(golds))


def test_own_gold_answer_first_then_one_that_is_nobodys() -> None:
    jobs = waiting("AABBC")
    assert take_for(("B",), [("A",)], jobs).task.response == "2"
    assert take_for(("C",), [("A",)], jobs).task.response == "4"
    assert take_for(("C",), [("A",)], jobs).task.response == "3"
    assert take_for(("C",), [("A",)], jobs).task.response == "0", "all are somebody's"
    assert take_for(None, [], jobs).task.response == "1"
    assert not jobs


def test_an_urgent_job_goes_before_its_worker_s_own_gold_answer() -> None:
    jobs = waiting("BA")
    jobs[0].urgent = True
    assert take_for(("A",), [("B",)], jobs).task.response == "0"


def test_a_group_is_checked_by_one_worker() -> None:
    """Two workers that are equally fast."""
    jobs = waiting("A" * 16 + "B" * 16 + "C" * 16 + "D" * 16)
    golds: list[object] = [None, None]
    checked: dict[object, set[int]] = {}
    while jobs:
        for worker in range(2):
            if jobs:
                golds[worker] = take_for(golds[worker], [golds[1 - worker]], jobs).gold
                checked.setdefault(golds[worker], set()).add(worker)
    assert all(len(workers) == 1 for workers in checked.values()), checked


@given(st.lists(st.sampled_from("ABCDE"), min_size=1, max_size=200), st.integers(1, 4))
def test_none_is_lost_and_none_overtaken_by_many(golds: list[str], num_workers: int) -> None:
    jobs = waiting("".join(golds))
    at_hand: list[object] = [None] * num_workers
    taken: list[int] = []
    while jobs:
        worker = len(taken) % num_workers
        job = take_for(at_hand[worker], at_hand[:worker] + at_hand[worker + 1 :], jobs)
        assert int(job.task.response) < _WINDOW + len(taken)
        at_hand[worker] = job.gold
        taken.append(int(job.task.response))
    assert sorted(taken) == list(range(len(golds)))
