"""When a verifier process has used up its time."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from or1_megatron.reward.processes import WorkerProcess


@contextmanager
def worker(program: str) -> Iterator[WorkerProcess]:
    process = subprocess.Popen([sys.executable, "-c", program])
    ours, theirs = socket.socketpair()
    template: Any = None
    handle = WorkerProcess(process.pid, ours, template)
    try:
        yield handle
    finally:
        handle.kill()
        process.wait()
        handle.close()
        theirs.close()


def test_in_the_foreground_the_limit_counts():
    with worker("import time; time.sleep(60)") as sleeping:
        assert not sleeping.is_out_of_time(60)
        sleeping.started -= 61
        assert sleeping.is_out_of_time(60)


def test_in_the_background_one_that_never_computes_ends_too():
    with worker("import time; time.sleep(60)") as blocked:
        time.sleep(0.5)
        blocked.pause()
        blocked.resume(60)
        blocked.started -= 61
        assert not blocked.is_out_of_time(60), "it has had no CPU time yet"
        blocked.started -= 120
        assert blocked.is_out_of_time(60)


def test_in_the_background_one_that_computes_ends_at_the_limit():
    with worker("while True: pass") as busy:
        busy.pause()
        busy.resume(60)
        busy.started -= 61
        deadline = time.monotonic() + 20
        while not busy.is_out_of_time(60):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert busy.cpu_spent() < 20


def test_waiting_counts_but_at_least_half_of_the_time_is_left():
    with worker("import time; time.sleep(60)") as paused:
        paused.pause()
        begun = paused.started = time.monotonic() - 20
        paused.resume(60)
        assert paused.started == begun
        paused.pause()
        paused.started = time.monotonic() - 200
        paused.resume(60)
        assert 29 < time.monotonic() - paused.started < 31
