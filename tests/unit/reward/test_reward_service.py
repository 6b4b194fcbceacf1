"""The verifier processes under attack, under kill -9, and at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from or1_megatron.errors import RunFailure
from or1_megatron.reward.service import RewardService

BOMBS = ["\\boxed{9^{9^{9^9}}}", "\\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}"]


def test_order_of_results_is_the_order_of_submission(tmp_path: Path) -> None:
    with RewardService(2, 10.0, 4096, tmp_path) as service:
        futures = [service.submit(f"\\boxed{{{i}}}", (str(i % 7),)) for i in range(50)]
        assert [future.result().name for future in futures] == ["correct" if i < 7 else "wrong" for i in range(50)]


@pytest.mark.parametrize("bomb", BOMBS, ids=["tower", "nesting"])
def test_pathological_answer_times_out_alone(bomb: str, tmp_path: Path) -> None:
    with RewardService(1, 1.5, 4096, tmp_path) as service:
        service.submit("\\boxed{1}", ("1",)).result()
        started = time.monotonic()
        verdict = service.submit(bomb, ("7",)).result()
        assert (verdict.name, verdict.reward) == ("timeout", 0.0)
        assert time.monotonic() - started < 2.5
        assert service.submit("\\boxed{2}", ("2",)).result().name == "correct"


def test_killed_worker_loses_no_result(tmp_path: Path) -> None:
    with RewardService(2, 10.0, 4096, tmp_path) as service:
        service.submit("\\boxed{1}", ("1",)).result()
        futures = [service.submit(f"\\boxed{{{i}+1}}", (str(i + 1),)) for i in range(400)]
        os.kill(service.pids[0], signal.SIGKILL)
        assert [future.result(timeout=30).name for future in futures] == ["correct"] * 400


def test_repeated_death_is_a_failure_not_a_zero(tmp_path: Path) -> None:
    with RewardService(1, 30.0, 4096, tmp_path) as service:
        service.submit("\\boxed{1}", ("1",)).result()
        future = service.submit(BOMBS[0], ("7",))
        stop = threading.Event()

        def keep_killing() -> None:
            while not stop.wait(0.2):
                for pid in service.pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=keep_killing)
        killer.start()
        with pytest.raises(RunFailure, match="died twice"):
            future.result(timeout=30)
        stop.set()
        killer.join()


def test_too_little_memory_is_a_failure_with_the_log(tmp_path: Path) -> None:
    with RewardService(1, 10.0, 16, tmp_path) as service, pytest.raises(RunFailure) as failure:
        service.submit("\\boxed{1}", ("1",)).result(timeout=60)
    assert failure.value.log_tail


def test_no_process_is_left(tmp_path: Path) -> None:
    with RewardService(2, 30.0, 4096, tmp_path) as service:
        service.submit("\\boxed{1}", ("1",)).result()
        service.submit(BOMBS[0], ("7",))
        time.sleep(0.3)
        children = [psutil.Process(pid) for pid in service.pids]
        started = time.monotonic()
    assert time.monotonic() - started < 3
    assert children and not any(child.is_running() for child in children)
