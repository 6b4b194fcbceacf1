"""Tasks on their way through the service, and which of them a free worker gets.

The responses of a group share their gold answer, and often their answers. A worker keeps what it has parsed, so that a
group is best checked by one worker: dealt out in turn, every worker would parse everything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

from or1_megatron.reward.problem import Task
from or1_megatron.types import Verdict

_WINDOW = 64  # the oldest tasks are chosen from: none waits for long


@dataclass
class Job:
    """A task and whom its verdict is for."""

    task: Task
    future: Future[Verdict]
    limit_s: float
    is_code: bool
    urgent: bool = False  # it may take long, and others can be checked meanwhile
    attempts: int = 0
    crashes: int = 0

    @property
    def gold(self) -> tuple[str, ...]:
        return self.task.ground_truth


def take_for(gold: object, others: Collection[object], waiting: deque[Job]) -> Job:
    """Takes from `waiting` an urgent job at its head, else the first with this gold answer, else the first that has
    nobody else's, else the first.

    others: gold answers that the other workers have at hand.
    """
    chosen = 0
    for place, job in enumerate(islice(waiting, 0 if waiting[0].urgent else _WINDOW)):
        if job.gold == gold:
            chosen = place
            break
        if not chosen and waiting[0].gold in others and job.gold not in others:
            chosen = place
    job = waiting[chosen]
    del waiting[chosen]
    return job
