"""The verifier processes under attack, under kill -9, at their limits, and at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from or1_megatron.errors import RunFailure
from or1_megatron.reward.problem import BROKEN_TESTS, Task
from or1_megatron.reward.service import RewardService, task_of
from or1_megatron.sections import RewardConfig
from or1_megatron.types import VERDICTS, Prompt, Sample, Verdict

CONFIG = RewardConfig(num_workers=2, timeout_s=10.0)
TOWER = "\\boxed{9^{9^{9^9}}}"
# None of these may hang, crash the run or count as right; most end early, some at the deadline.
PATHOLOGICAL = {
    "tower": TOWER,
    "factorial": "\\boxed{99999999!}",
    "nested factorials": "\\boxed{((9!)!)!}",
    "10,000 parentheses": "\\boxed{" + "(" * 10_000 + "1" + ")" * 10_000 + "}",
    "2,000 parentheses": "\\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}",
    "10,000 braces": "\\boxed{" * 10_000 + "1" + "}" * 10_000,
    "10 MB of text": "x" * 10_000_000 + "\\boxed{8}",
    "10 MB in the box": "\\boxed{" + "1+" * 5_000_000 + "1}",
    "10 MB of boxes": "\\boxed{" * 1_400_000,
    "NUL bytes": "\x00\x00\\boxed{8\x00}\x00",
    "invalid UTF-8": b"\xff\xfe \\boxed{\xc3\x28}".decode(errors="surrogateescape"),
    "many numbers": "\\boxed{" + "1,2 and 3 " * 450 + "}",
    "long digits": "\\boxed{" + "1" * 4_900 + "^2}",
    "regex bomb": "\\boxed{" + "\\text{a}" * 600 + "}",
    "spaces": "\\boxed{" + " " * 4_900 + "x}",
    "polynomial": "\\boxed{(x+y+z)^{200}(x-y)^{200}}",
    "control characters": "\\boxed{" + "".join(map(chr, range(32))) + "}",
}


@contextmanager
def running(tmp_path: Path, **changes: object) -> Iterator[RewardService]:
    """A service whose first check is done."""
    with RewardService(dataclasses.replace(CONFIG, **changes), tmp_path) as service:  # type: ignore[arg-type]
        assert service.submit(Task("\\boxed{1}", ("1",))).result(60).name == "correct"
        service.take_metrics()
        yield service


def checks(service: RewardService, count: int) -> list[Future[Verdict]]:
    """Of 40 answers: a worker computes each once."""
    return [service.submit(Task(f"\\boxed{{{i % 40}+1}}", (str(i % 40 + 1 + i % 2),))) for i in range(count)]


def names(futures: list[Future[Verdict]], timeout: float = 60) -> list[str]:
    return [future.result(timeout).name for future in futures]


def right(count: int) -> list[str]:
    return ["wrong" if i % 2 else "correct" for i in range(count)]


@contextmanager
def killing(pids: Callable[[], list[int]], pause_s: float, due: Callable[[int], bool]) -> Iterator[list[int]]:
    """kill -9 of one of `pids` at a time until the block ends, when it is `due`; yields the victims. By the clock alone
    a busy machine could be slower in starting processes than this is in killing them."""
    stop, victims, source = threading.Event(), [], random.Random(0)

    def keep_killing() -> None:
        while not stop.wait(pause_s * source.uniform(0.5, 1.5)):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, IndexError):
                victim = source.choice(pids())
                if due(victim):
                    os.kill(victim, signal.SIGKILL)
                    victims.append(victim)

    thread = threading.Thread(target=keep_killing)
    thread.start()
    try:
        yield victims
    finally:
        stop.set()
        thread.join()


def test_order_of_submission_changes_nothing(tmp_path: Path) -> None:
    tasks = [Task(f"\\boxed{{{i}}}", (str(i % 7),)) for i in range(60)]
    shuffled = random.Random(0).sample(range(60), 60)
    with running(tmp_path) as service:
        forward = names([service.submit(task) for task in tasks])
        backward = dict(zip(shuffled, names([service.submit(tasks[i]) for i in shuffled]), strict=True))
    assert forward == ["correct" if i < 7 else "wrong" for i in range(60)]
    assert [backward[i] for i in range(60)] == forward


def test_pathological_answers_are_never_right_and_cost_no_one_else(tmp_path: Path) -> None:
    with running(tmp_path, timeout_s=1.0) as service:
        bad = {name: service.submit(Task(text, ("7",))) for name, text in PATHOLOGICAL.items()}
        good = checks(service, 200)
        assert names(good) == right(200)
        verdicts = {name: future.result(120).name for name, future in bad.items()}
    assert set(verdicts.values()) <= {"wrong", "unparsable", "timeout", "memory"}, verdicts
    assert verdicts["tower"] == "timeout"


def test_deadline_kills_the_stuck_worker_only(tmp_path: Path) -> None:
    with running(tmp_path, timeout_s=1.5) as service:
        before = set(service.pids)
        started = time.monotonic()
        verdict = service.submit(Task(TOWER, ("7",))).result()
        assert (verdict.name, verdict.reward) == ("timeout", 0.0)
        assert 1.5 <= time.monotonic() - started < 4
        assert len(before & set(service.pids)) == 2, "one worker and the template live on"
        assert names(checks(service, 20)) == right(20)


def test_stuck_checks_do_not_hold_up_the_others(tmp_path: Path) -> None:
    """Ten towers, a deadline of 4 s each, one worker: in a row they would take 40 s."""
    with running(tmp_path, num_workers=1, timeout_s=4.0) as service:
        started = time.monotonic()
        towers = [service.submit(Task(f"\\boxed{{9^{{9^{{9^{i}}}}}}}", ("7",))) for i in range(9, 19)]
        assert names(checks(service, 50)) == right(50)
        assert not any(tower.done() for tower in towers)
        assert names(towers) == ["timeout"] * 10
        assert time.monotonic() - started < 30


def test_answers_that_may_get_stuck_are_begun_first(tmp_path: Path) -> None:
    with running(tmp_path, num_workers=1) as service:
        others = [service.submit(Task("\\boxed{1}", ("120",))) for _ in range(2000)]
        assert service.submit(Task("\\boxed{5!}", ("120",))).result(timeout=60).name == "correct"
        assert sum(other.done() for other in others) < 1500
        assert names(others) == ["wrong"] * 2000


def test_random_kills_lose_and_double_nothing(tmp_path: Path) -> None:
    """Workers are killed all the time, and twice the template with all of them."""
    with running(tmp_path, max_queued=10_000) as service:
        calls: list[int] = []
        wanted = 0

        def twenty_more(_: int) -> bool:
            nonlocal wanted
            if len(calls) < wanted:
                return False
            wanted = len(calls) + 20
            return True

        with killing(lambda: service.pids[:-1], 0.05, twenty_more) as victims:
            futures = checks(service, 10_000)
            for index, future in enumerate(futures):
                future.add_done_callback(lambda _, index=index: calls.append(index))
            for index in (2000, 6000):
                futures[index].result(120)
                os.kill(service.pids[-1], signal.SIGKILL)
            verdicts = names(futures, 120)
        assert verdicts == right(10_000)
        assert sorted(calls) == list(range(10_000))
        assert len(victims) >= 5, "too few kills to mean anything"
        counts = service.take_metrics()
    assert sum(counts.get(f"verifier/{name}", 0) for name in VERDICTS) == 10_000


def test_repeated_death_is_an_infrastructure_error_not_a_zero(tmp_path: Path) -> None:
    def computing(pid: int) -> bool:
        return psutil.Process(pid).cpu_times().user > 0.1

    with running(tmp_path, num_workers=1, timeout_s=60.0) as service:
        with killing(lambda: service.pids[:1], 0.3, computing):
            verdict = service.submit(Task(TOWER, ("7",))).result(60)
        assert verdict.name == "infrastructure_error" and "signal 9" in verdict.detail
        with pytest.raises(AssertionError):
            _ = verdict.reward
        with pytest.raises(RunFailure, match="1 of 40 responses could not be checked"):
            service.check_failure_rate([verdict, *[Verdict("wrong", 0.0)] * 39])
        service.check_failure_rate([verdict, *[Verdict("wrong", 0.0)] * 99])
        broken = Verdict("infrastructure_error", 0.0, f"{BROKEN_TESTS}: no module")
        service.check_failure_rate([*[broken] * 20, *[Verdict("wrong", 0.0)] * 20])
        with pytest.raises(RunFailure, match="21 of 41 .*are at fault: no module"):
            service.check_failure_rate([*[broken] * 21, *[Verdict("wrong", 0.0)] * 20])
        assert names(checks(service, 4)) == right(4)


def test_too_little_memory_to_start_is_a_failure_with_the_log(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, memory_mb=16)
    with RewardService(config, tmp_path) as service, pytest.raises(RunFailure, match="no reward worker") as failure:
        service.submit(Task("\\boxed{1}", ("1",))).result(timeout=60)
    assert "MemoryError" in failure.value.log_tail


def test_a_template_that_does_not_start_is_a_failure_with_one_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody submits while it fails: no wish and no answer wakes the service up."""
    monkeypatch.setattr("or1_megatron.reward.processes.sys.executable", "/bin/false")
    with RewardService(dataclasses.replace(CONFIG, num_workers=1), tmp_path) as service:
        time.sleep(1.0)
        with pytest.raises(RunFailure, match="no reward worker"):
            service.submit(Task("\\boxed{1}", ("1",))).result(timeout=60)


def test_check_that_needs_too_much_memory(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        occupied_mb = psutil.Process(service.pids[-1]).memory_info().vms // 2**20
    with running(tmp_path, memory_mb=occupied_mb + 64) as service:
        assert names([service.submit(Task("x" * 40_000_000, ("7",)))]) == ["memory"]
        assert names(checks(service, 4)) == right(4)


def test_workers_are_recycled(tmp_path: Path) -> None:
    with running(tmp_path, num_workers=1, recycle_tasks=20) as service:
        first = service.pids[0]
        assert names(checks(service, 100)) == right(100)
        assert service.take_metrics()["verifier/workers_recycled"] >= 4
        assert service.pids[0] != first
    with running(tmp_path, num_workers=1, recycle_mb=1) as service:
        assert names(checks(service, 5)) == right(5)
        assert service.take_metrics()["verifier/workers_recycled"] >= 4


def test_full_queue_makes_the_submitter_wait(tmp_path: Path) -> None:
    slow = Task("```python\nwhile True: pass\n```", ('{"inputs": [""], "outputs": [""]}',))
    with running(tmp_path, num_workers=1, max_queued=3, code_timeout_s=0.4) as service:
        submitted: list[Future[Verdict]] = []
        thread = threading.Thread(target=lambda: submitted.extend(service.submit(slow) for _ in range(8)))
        started = time.monotonic()
        thread.start()
        thread.join(0.3)
        assert thread.is_alive(), "four fit: three wait and one runs"
        thread.join(30)
        assert time.monotonic() - started > 4 * 0.4
        assert names(submitted) == ["timeout"] * 8


def test_truncated_and_open_reasoning(tmp_path: Path) -> None:
    cut = Sample(
        Prompt("p", "What? <think>\n", (1,), ("9",)), 0, np.zeros(0), np.zeros(0), "so \\boxed{9}", "length", 0
    )
    ended = dataclasses.replace(cut, text="so</think>\\boxed{9}")
    with running(tmp_path) as service:
        samples = [
            cut,
            dataclasses.replace(cut, finish_reason="stop"),
            ended,
            dataclasses.replace(ended, text="</think>?"),
        ]
        assert names([service.submit(task_of(s)) for s in samples]) == [
            "truncated",
            "unparsable",
            "correct",
            "truncated",
        ]
    with running(tmp_path, unclosed_reasoning="whole") as service:
        assert names([service.submit(task_of(cut))]) == ["correct"]
    with running(tmp_path, truncated="zero") as service:
        whole = dataclasses.replace(ended, finish_reason="stop")
        assert names([service.submit(task_of(s)) for s in (ended, whole)]) == ["truncated", "correct"]


def test_metrics_hold_counts_and_a_histogram(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        assert names(checks(service, 30)) == right(30)
        metrics = service.take_metrics()
        assert (metrics["verifier/correct"], metrics["verifier/wrong"]) == (15, 15)
        buckets = [value for name, value in metrics.items() if "latency_to" in name or "latency_above" in name]
        assert sum(buckets) == 30 and len(buckets) == 6
        assert 0 < metrics["verifier/latency_p50_ms"] <= metrics["verifier/latency_p99_ms"]
        assert service.take_metrics() == {}


def test_no_process_is_left(tmp_path: Path) -> None:
    with running(tmp_path, timeout_s=30.0) as service:
        towers = [service.submit(Task(TOWER, ("7",))) for _ in range(6)]
        time.sleep(0.5)
        children = [psutil.Process(pid) for pid in service.pids]
        started = time.monotonic()
    assert time.monotonic() - started < 3
    time.sleep(0.1)
    assert len(children) >= 3 and not any(child.is_running() for child in children)
    assert all(isinstance(tower.exception(), RunFailure) for tower in towers)
