"""Where a run stands, by its folder: what to start, whether it moves, whether time is short. Standard library only."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

FLOOR_STALL_S = 3600.0
SPARE_S = 60.0


def newest_checkpoint(run: Path) -> int:
    """Step of the newest complete checkpoint; -1: none."""
    found = [path.parent.name for path in (run / "checkpoints").glob("step-*/driver.json")]
    return max((int(name.rpartition("-")[2]) for name in found), default=-1)


def _driver(run: Path) -> list:
    """[host, process, Slurm job] that driver.lock names; without one, or while it is being written, nobody's."""
    try:
        return json.loads((run / "driver.lock").read_text())
    except (OSError, ValueError):
        return [None, None, None]


def driven(run: Path) -> bool:
    """Whether the driver of another job is at this run; see RunFolder.driven."""
    try:
        with (run / "driver.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _driver(run)[2] != os.environ.get("SLURM_JOB_ID", "")
    except OSError:
        return False
    return False


def hears(run: Path, driver: int) -> bool:
    """Whether this process, a driver, has the run in hand: until then it may be importing, and USR1 would end it."""
    return _driver(run)[1] == driver


def metrics(run: Path) -> list[dict]:
    """Rows of completed steps; a line that is none, as a file server that was full may leave, is left out."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            row = json.loads(line.decode())
        except ValueError:
            continue
        if isinstance(row, dict) and "seconds/step" in row:
            rows.append(row)
    return rows


def command(run: Path, attempt: Path, job: dict) -> list[str]:
    """What the driver is: a new run, one that goes on, or the program that was named instead.

    A run that ended before its first checkpoint starts anew; what it left moves into the attempt's folder.
    """
    if job["program"]:
        return [job["python"], job["program"], *job["overrides"]]
    train = [job["python"], "-m", "or1_megatron", "train"]
    stage = [f"steps={job['steps']}"] if job["steps"] else []
    if newest_checkpoint(run) >= 0 or driven(run):  # which says by whom, and ends
        return [*train, "--resume", str(run), *stage]
    left = [path for path in run.iterdir() if path.name != "slurm"]
    if left:
        aside = attempt / "before"
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
    return [*train, str(run / "slurm" / job["recipe"]), *job["overrides"], *stage, f"run_dir={run}"]


class Watch:
    """Over one attempt's driver. `end` is the time limit, seconds since the epoch; `stall_s` 0 follows the steps."""

    def __init__(self, run: Path, stall_s: float, end: float):
        self.run, self._wanted_s, self._end = run, stall_s, end
        self._begun = time.time()
        self._asked = 0.0
        self._step_s = self._save_s = 0.0

    @property
    def stall_s(self) -> float:
        return self._wanted_s or max(FLOOR_STALL_S, 5 * self._step_s)

    def time_is_short(self) -> bool:
        """Whether another step, a save and a minute no longer fit before the end.

        By the longest of the last 20 steps and, of the last 100, in which there may be few saves, the longest that one
        held its step up and the longest that one was written in the background.
        """
        if time.time() - self._asked > 5:
            self._asked = time.time()
            rows = metrics(self.run)[-100:]
            self._step_s = max((row["seconds/step"] for row in rows[-20:]), default=0.0)
            saves = ("seconds/save", "save/write_seconds")
            self._save_s = sum(max((row.get(name, 0.0) for row in rows), default=0.0) for name in saves)
        return bool(self._step_s) and time.time() > self._end - self._step_s - self._save_s - SPARE_S

    def stalled(self) -> bool:
        """Whether no step, checkpoint or process start has left a trace for `stall_s`."""
        places = [self.run / "metrics.jsonl", self.run / "checkpoints", self.run / "logs", self.run / "rollouts"]
        newest = max((path.stat().st_mtime for path in places if path.exists()), default=0.0)
        return time.time() - max(newest, self._begun) > self.stall_s
