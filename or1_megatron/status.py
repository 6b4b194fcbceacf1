"""`or1 status JOB|RUN` and `or1 logs JOB|RUN`: where a run stands, by its folder and, for a job, by Slurm.

What a run did is in its folder; Slurm is asked for what it will do. One empty answer of squeue is not the end of a job:
it is asked again, then the job's record and the accounting are, and the attempt's own last word counts.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from or1_megatron.driver_lock import driver_of
from or1_megatron.errors import UserError
from or1_megatron.recipe import layers
from or1_megatron.runfiles import ends_run, read_metrics, read_object

_ASK_AGAIN_S = 2.0
_LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")


@dataclass(frozen=True)
class JobState:
    """What Slurm says of one job; empty where nobody knows it any more."""

    state: str = ""
    left: str = ""
    reason: str = ""


def find_run(target: str) -> Path:
    """The run folder of a path or of a job id: 12, or 12_3 of an array. Raises UserError when there is none."""
    path = Path(target)
    if path.is_dir():
        if (path / "config.yaml").is_file() or (path / "slurm" / "job.json").is_file():
            return path
        raise UserError(f"{path} is no run folder: it holds neither config.yaml nor slurm/job.json")
    if not re.fullmatch(r"\d+(_\d+)?", target):
        raise UserError(f"{target} is neither a run folder nor a job id")
    record = _ask("scontrol", "show", "job", "-o", target) or ""
    found = [Path(word.partition("=")[2]) for word in record.split() if word.startswith("WorkDir=")]
    around = [run.parent for run in found] + [Path("runs")]  # an array has its first run's for all of them
    for run in [*found, *(jobs.parents[1] for place in around for jobs in sorted(place.glob("*/slurm/jobs")))]:
        submitted = _text(run / "slurm" / "jobs").split()
        if {target, f"{target}_0"}.intersection(submitted) or (run / "slurm" / f"job-{target}").is_dir():
            return run
    raise UserError(f"job {target}: Slurm knows no run of it, nor does runs/; give the run folder")


def status_lines(run: Path) -> list[str]:
    """What `or1 status` prints. Raises UserError when the configuration or job.json is damaged."""
    job = read_object(run / "slurm" / "job.json") if (run / "slurm" / "job.json").is_file() else {}
    config = _configuration(run)
    jobs = [(id, ask_slurm(id)) for id in _job_ids(run)]
    saved = sorted(path.parent.name for path in run.glob("checkpoints/step-*/driver.json"))
    newest = int(saved[-1].rpartition("-")[2]) if saved else 0
    total = config.get("steps", "?")
    damage, logged = "", []
    try:
        logged = read_metrics(run)
    except UserError as error:  # the rest is to be seen all the same
        damage = str(error)
    rows = [row for row in logged if "seconds/step" in row]
    complete = isinstance(total, int) and any(row["step"] >= total and ends_run(row) for row in logged)
    driven, state = _state(run, newest, complete=complete, submitted=bool(jobs))
    lines = [f"run       {run}", f"name      {config.get('name', job.get('name', '?'))}", *state]
    if rows:
        lines += _step_lines(run, rows, total, newest, driven or any(found.state == "RUNNING" for _, found in jobs))
    else:
        lines.append(f"step      {damage or f'0 of {total}'}")
    for id, found in jobs:
        lines += _job_lines(run, id, found)
    return lines


def _step_lines(run: Path, rows: list[dict[str, Any]], total: Any, newest: int, running: bool) -> list[str]:
    last = rows[-1]
    recent = [row["seconds/step"] for row in rows[-8:]]
    mean = sum(recent) / len(recent)
    to_go = running and isinstance(total, int)
    left = f", about {(total - last['step']) * mean / 60:.0f} minutes to go" if to_go else ""
    age = time.time() - (run / "metrics.jsonl").stat().st_mtime
    return [
        f"step      {last['step']} of {total}; checkpoint after {newest or 'none'}; {mean:.1f} s a step{left}",
        f"reward    {_number(last, 'reward/mean', '.3f')}, entropy {_number(last, 'entropy/signal', '.3f')}",
        f"speed     {_number(last, 'tokens_per_second', '.0f')} tokens/s; last step {age / 60:.1f} minutes ago",
    ]


def _state(run: Path, newest: int, *, complete: bool, submitted: bool) -> tuple[bool, list[str]]:
    """Whether a driver is at it, and the line. submitted: Slurm has jobs of it, whose own lines say how it goes on."""
    try:
        driver = driver_of(run)
    except OSError as error:
        return False, [f"state     not known: {run / 'driver.lock'}: {error.strerror}"]
    if driver:
        return True, [f"state     running: {driver}"]
    if complete:
        return False, ["state     complete"]
    if submitted:
        return False, []
    again = f"go on with: or1 train --resume {quote(str(run))}" if newest else "it has no checkpoint to go on from"
    return False, [f"state     not running; {again}"]


def _configuration(run: Path) -> dict[str, Any]:
    """The resolved one; before the run has begun, what its recipe says."""
    for path in (run / "config.yaml", run / "slurm" / "recipe.yaml"):
        if path.is_file():
            return {name: value for _, tree in layers(path, ()) for name, value in tree.items()}
    return {}


def _job_ids(run: Path) -> list[str]:
    folders = {path.name.partition("-")[2] for path in run.glob("slurm/job-*/")}
    submitted = _text(run / "slurm" / "jobs").split()
    begun = sorted(folders, key=lambda id: (len(id), id))
    # A task of an array has a number of its own once it has begun; a job may also have been submitted by hand.
    known = submitted if not folders or folders.intersection(submitted) else []
    return [*known, *(id for id in begun if id not in known)]


def _job_lines(run: Path, id: str, found: JobState) -> list[str]:
    attempts = sorted((run / "slurm" / f"job-{id}").glob("attempt-*"), key=_number_of)
    said = _text(attempts[-1] / "end").strip() if attempts else ""
    if found.state in _LIVE:
        left = f", {found.left} to the time limit" if found.left and found.state == "RUNNING" else ""
        state = f"{found.state}{left}{f' ({found.reason})' if found.reason not in ('', 'None') else ''}"
    elif found.state:
        state = f"{found.state} ({found.reason})" if found.reason not in ("", "None") else found.state
    elif said and not said.startswith("requeued"):
        state = "ended"
    else:
        state = "not known to Slurm any more, and its last attempt has not said that it ended"
    lines = [f"job       {id}: {state}; attempts {len(attempts)}"]
    ends = [(path.name, _text(path / "end").strip()) for path in attempts]
    lines += [f"          {name}: {end}" for name, end in ends[-5:] if end]
    return lines


def ask_slurm(id: str, again: int = 3) -> JobState:
    """squeue, asked again when it is empty or fails; then the controller's record; then the accounting."""
    if shutil.which("squeue") is None:
        return JobState()
    for attempt in range(again):
        answer = (_ask("squeue", "-h", "-j", id, "-o", "%T|%L|%r") or "").strip()
        if answer:
            return JobState(*answer.splitlines()[0].split("|"))
        if attempt + 1 < again:
            time.sleep(_ASK_AGAIN_S)
    words = (_ask("scontrol", "show", "job", "-o", id) or "").split()
    record = dict(word.split("=", 1) for word in words if "=" in word)
    if "JobState" in record:
        comment = re.search(r"(?m) Comment=(.*?)(?= \w+=|$)", " ".join(words))
        return JobState(record["JobState"], "", comment.group(1) if comment else record.get("Reason", ""))
    answer = (_ask("sacct", "-n", "-X", "-P", "-j", id, "-o", "State") or "").split()
    return JobState(answer[0]) if answer else JobState()


def log_lines(run: Path, name: str | None, count: int) -> list[str]:
    """What `or1 logs` prints: the last lines of one log, or of the newest attempt's and what other logs there are.

    Raises UserError when there is no such log, and for less than one line.
    """
    if count < 1:
        raise UserError(f"-n {count}: use 1 or more")
    attempts = sorted(run.glob("slurm/job-*/attempt-*"), key=lambda path: path.stat().st_mtime)
    logs = [*(sorted(attempts[-1].glob("*.log")) if attempts else []), *sorted((run / "logs").glob("*.log"))]
    outputs = sorted((run / "slurm").glob("*.out"))
    known = {path.stem: path for path in [*outputs, *logs]}
    if name is None:
        chosen = [path for stem, path in known.items() if stem.startswith("driver-")] + outputs[-1:]
        if not chosen:
            chosen = logs[:1]
    else:
        chosen = [
            path
            for stem, path in known.items()
            if stem in (name, f"driver-{name}", f"node-{name}") or (name == "driver" and stem.startswith("driver-"))
        ]
    if not chosen:
        raise UserError(f"{run} has no log {name or ''}; there are {', '.join(known) or 'none'}")
    lines: list[str] = []
    for path in chosen:
        lines += [f"==> {path}", *path.read_text(errors="replace").splitlines()[-count:]]
    return [*lines, f"logs: {', '.join(known)}"]


def _number(row: dict[str, Any], name: str, form: str) -> str:
    value = row.get(name)
    return "-" if value is None else format(value, form)


def _number_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _ask(*words: str) -> str | None:
    """What a command of Slurm's prints; None where it fails or is not there."""
    if shutil.which(words[0]) is None:
        return None
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None
