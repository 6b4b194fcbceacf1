"""Math checks per second: the reward service against a plain process pool that calls Math-Verify, and `==`.

The pool is what a trainer has without a service: no deadline kept by the parent, no separate verdicts, and the whole
response is parsed. Half of the responses are right, none of them letter for letter.
"""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from pathlib import Path

from harness import Benchmark, main

from or1_megatron.reward.service import RewardService

NUM_WORKERS = 2
TIMEOUT_S = 10.0
MEMORY_MB = 4096

Problem = tuple[str, str]  # response, ground truth


def responses(count: int, size: int, seed: int) -> list[Problem]:
    """`count` responses, a multiple of 4, of about `size` characters: reasoning with formulas, then a boxed answer."""
    source = random.Random(seed)
    made = []
    for index in range(count):
        a, b = source.randint(2, 99), source.randint(2, 99)
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


def build(bench: Benchmark, quick: bool) -> None:
    logs = Path(bench.stack.enter_context(tempfile.TemporaryDirectory()))
    service = bench.stack.enter_context(RewardService(NUM_WORKERS, TIMEOUT_S, MEMORY_MB, logs))
    pool = bench.stack.enter_context(multiprocessing.get_context("spawn").Pool(NUM_WORKERS))

    for name, size, count in (("short", 120, 800), ("15 KB", 15_000, 400)):
        problems = responses(count // 4 if quick else count, size, seed=size)

        def through_service(problems: list[Problem] = problems) -> None:
            futures = [service.submit(response, (truth,)) for response, truth in problems]
            assert sum(future.result().reward for future in futures) == len(problems) / 2

        def through_pool(problems: list[Problem] = problems) -> None:
            pool.map(check_directly, problems, chunksize=1)

        def by_equality(problems: list[Problem] = problems) -> None:
            for response, truth in problems:
                _ = response.rpartition(r"\boxed{")[2].partition("}$")[0] == truth

        ours = bench.case(f"service, {name}", through_service, amount=len(problems), unit="checks")
        peer = bench.case(f"pool of Math-Verify, {name}", through_pool, "peer", len(problems), "checks")
        bench.case(f"string equality, {name}", by_equality, "floor", len(problems), "checks")
        if name == "15 KB":
            bench.mark("service_over_pool_15KB", lambda ours=ours, peer=peer: ours.rate / peer.rate, target=1.0)


if __name__ == "__main__":
    main("reward", f"math checks per second, {NUM_WORKERS} workers", build)
