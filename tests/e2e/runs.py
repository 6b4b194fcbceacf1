"""Whole runs in a process of their own, as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil


def start(workplace: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "or1_megatron", "train", *arguments]
    return subprocess.Popen(
        command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 180) -> str:
    try:
        return process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def metrics(run: Path) -> list[dict]:
    """Of its steps."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "seconds/step" in row]


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not ((run / "metrics.jsonl").is_file() and len(metrics(run)) >= steps):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get that far in time"
        time.sleep(0.2)


def of_this_run(workplace: Path) -> list[psutil.Process]:
    """Live processes started from the workplace folder or belonging to a Ray session started there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd().startswith(str(workplace)):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def nothing_left(workplace: Path) -> None:
    deadline = time.monotonic() + 15
    while (left := of_this_run(workplace)) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert not left, [" ".join(process.cmdline()[:4]) for process in left]
