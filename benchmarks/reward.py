"""Math checks per second: the reward service against a plain process pool that calls Math-Verify, and `==`.

The pool is what a trainer has without a service: no deadline kept by the parent, no separate verdicts, and the whole
response is parsed. As in training, 16 responses share a ground truth, and every run brings new problems. Half of the
responses are right, none of them letter for letter.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.pool
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from harness import Benchmark, main

from or1_megatron.config import RewardConfig
from or1_megatron.reward.problem import Task
from or1_megatron.reward.service import RewardService

NUM_WORKERS = 2
GROUP_SIZE = 16
NUM_BATCHES = 8  # one a round, the warm-up included

Problem = tuple[str, str]  # response, ground truth


def responses(count: int, size: int, seed: int) -> list[Problem]:
    """`count` responses, a multiple of 16, of about `size` characters: reasoning with formulas, a boxed answer."""
    source = random.Random(seed)
    made = []
    a = b = 0
    for index in range(count):
        if index % GROUP_SIZE == 0:
            a, b = source.randint(2, 999), source.randint(2, 999)
        truth, answer = (
            rf"\frac{{{a}}}{{{b}}}",
            [rf"\frac{{{2 * a}}}{{{2 * b}}}", f"{a}/{b}", f"{a}", rf"\frac{{{a}}}{{{b + 1}}}"],
        )
        text = ""
        while len(text) < size - 60:
            x, y = source.randint(2, 999), source.randint(2, 999)
            text += (
                f"Suppose $x = {x}$, so that $x + {y} = {x + y}$ and $\\sqrt{{x}} < {x}$. Let me check that again.\n"
            )
        made.append((text + rf"The answer is $\boxed{{{answer[index % 4]}}}$.", truth))
    return made


def check_directly(problem: Problem) -> float:
    """The peer's check, in a pool worker."""
    from math_verify import parse, verify

    response, truth = problem
    return float(verify(parse(rf"\boxed{{{truth}}}"), parse(response)))


def through_service(service: RewardService, left: Iterator[list[Problem]]) -> None:
    futures = [service.submit(Task(response, (truth,))) for response, truth in next(left)]
    assert sum(future.result().reward for future in futures) == len(futures) / 2


def through_pool(pool: multiprocessing.pool.Pool, left: Iterator[list[Problem]]) -> None:
    rewards = pool.map(check_directly, next(left), chunksize=1)
    assert sum(rewards) == len(rewards) / 2


def by_equality(left: Iterator[list[Problem]]) -> None:
    for response, truth in next(left):
        _ = response.rpartition(r"\boxed{")[2].partition("}$")[0] == truth


def build(bench: Benchmark, quick: bool) -> None:
    logs = Path(bench.stack.enter_context(tempfile.TemporaryDirectory()))
    service = bench.stack.enter_context(RewardService(RewardConfig(num_workers=NUM_WORKERS), logs))
    pool = bench.stack.enter_context(multiprocessing.get_context("spawn").Pool(NUM_WORKERS))
    for name, size, count in (("short", 120, 800), ("15 KB", 15_000, 400)):
        amount = count // 5 if quick else count
        batches = [responses(amount, size, seed) for seed in range(NUM_BATCHES)]
        service_run = partial(through_service, service, itertools.cycle(batches))
        pool_run = partial(through_pool, pool, itertools.cycle(batches))
        ours = bench.case(f"service, {name}", service_run, "ours", amount, "checks")
        peer = bench.case(f"pool of Math-Verify, {name}", pool_run, "peer", amount, "checks")
        bench.case(
            f"string equality, {name}", partial(by_equality, itertools.cycle(batches)), "floor", amount, "checks"
        )
        if size == 15_000:
            bench.mark("service_over_pool_15KB", lambda ours=ours, peer=peer: ours.rate / peer.rate, target=1.0)


if __name__ == "__main__":
    main("reward", f"math checks per second, {NUM_WORKERS} workers", build)
