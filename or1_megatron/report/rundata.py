"""What a report needs of a run folder, read once: metrics, response lengths, examples, the trace's newest steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from or1_megatron.config import Config
from or1_megatron.errors import UserError
from or1_megatron.profiling.decoding import tail_start
from or1_megatron.runfiles import read_columns, read_rows, read_trace
from or1_megatron.runfolder import RunFolder

NEWEST_FILES = 20  # rollout files whose lengths are shown
_EXAMPLE_CHARACTERS = 1500


@dataclass(frozen=True)
class Example:
    """One response of the newest step. cut: characters that are not shown."""

    prompt: str
    response: str
    verdict: str
    reward: float
    length: int
    cut: int


@dataclass(frozen=True)
class Tail:
    """Of the rollouts in the trace. share: of their time that went by with at most 5 % of the responses unfinished;
    waiting: of the engines' time, spent idle until the slowest had ended."""

    share: float
    waiting: float
    rollouts: int


@dataclass
class RunData:
    """One run. Steps are the lines of metrics.jsonl that are training steps."""

    name: str
    folder: RunFolder
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    last_evaluation_s: float = 0.0  # of the one after the last step, which is in no step's seconds
    lengths: list[int] = field(default_factory=list)
    limit: int = 0  # response length at which the newest responses were cut, tokens; 0: none was
    examples: list[Example] = field(default_factory=list)
    trace: dict[str, Any] | None = None
    tail: Tail | None = None

    def stages(self) -> list[Config]:
        """The configurations of the stages that its steps belong to, in order."""
        whole = self.folder.config.all_stages()
        numbers = sorted({min(int(row.get("stage", 1)), len(whole)) for row in self.steps})
        return [whole[number - 1] for number in numbers]

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) where the metric is a number."""
        return [(row["step"], row[name]) for row in self.steps if isinstance(row.get(name), int | float)]

    def total(self, name: str) -> float:
        return sum(value for _, value in self.series(name))

    def mean(self, name: str) -> float:
        values = [value for _, value in self.series(name)]
        return statistics.fmean(values) if values else 0.0

    def hours(self) -> dict[str, float]:
        """Tables 7 and 8: total, rollout, update, others; and evaluation, which is in none of them."""
        found = {part: self.total(f"seconds/{part}") / 3600 for part in ("rollout", "update", "others", "evaluation")}
        found["evaluation"] += self.last_evaluation_s / 3600
        return {"total": found["rollout"] + found["update"] + found["others"], **found}


def read_run(path: str | Path) -> RunData:
    """Raises UserError: no run folder, no step in it yet, or a damaged file."""
    folder = RunFolder.open(path)
    rows = folder.metrics.read()
    steps = [_with_others(row) for row in rows if "seconds/rollout" in row]
    if not steps:
        raise UserError(f"{path} has no finished step yet; a report needs one")
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    behind = sum(row.get("seconds/evaluation", 0.0) for row in rows if "seconds/rollout" not in row)
    run = RunData(folder.path.resolve().name, folder, steps, evaluations, behind)
    _read_rollouts(run)
    file = folder.path / "trace.json"
    if file.is_file():
        trace = read_trace(file)
        # With an overlap the driver's span is what was left to wait for, not the engines' work.
        run.trace, run.tail = trace, None if folder.config.rollout.overlap else tail_of(trace)
    return run


def _with_others(row: dict[str, Any]) -> dict[str, Any]:
    """Runs of before `others` was noted: there checkpoints were not part of a step's seconds."""
    if "seconds/others" in row:
        return row
    named = sum(row.get(f"seconds/{part}", 0.0) for part in ("rollout", "update", "evaluation"))
    return {**row, "seconds/others": row["seconds/step"] - named + row.get("seconds/save", 0.0)}


def _read_rollouts(run: RunData) -> None:
    last = f"step-{run.steps[-1]['step']:06d}.parquet"  # what is newer was left by a run that a resume took back
    files = sorted(file for file in run.folder.rollouts.glob("step-*.parquet") if file.name <= last)[-NEWEST_FILES:]
    for file in files:
        columns = read_columns(file, ["length", "finish_reason"])
        run.lengths += columns["length"]
        ends = zip(columns["length"], columns["finish_reason"], strict=True)
        cut = [length for length, reason in ends if reason == "length"]
        run.limit = max([run.limit, *cut])
    if files:
        run.examples = examples(read_rows(files[-1]))


def examples(rows: Sequence[dict[str, Any]], each: int = 2) -> list[Example]:
    """The best and the worst responses: right ones of the problems that are right least often, wrong ones of those
    that are right most often. These are the ones a group learns from."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["uid"], []).append(row["reward"])
    accuracy = {uid: statistics.fmean(rewards) for uid, rewards in groups.items()}
    right = sorted((row for row in rows if row["reward"] > 0), key=lambda row: accuracy[row["uid"]])
    wrong = sorted((row for row in rows if row["reward"] <= 0), key=lambda row: -accuracy[row["uid"]])
    return [_example(row) for chosen in (right, wrong) for row in _of_different_problems(chosen, each)]


def _of_different_problems(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["uid"], row)
    return list(first.values())[:most]


def _example(row: dict[str, Any]) -> Example:
    return Example(
        prompt=row["prompt"][-_EXAMPLE_CHARACTERS:],
        response=row["response"][-_EXAMPLE_CHARACTERS:],
        verdict=row["verdict"],
        reward=row["reward"],
        length=row["length"],
        cut=max(0, len(row["response"]) - _EXAMPLE_CHARACTERS),
    )


def process_names(trace: dict[str, Any]) -> dict[int, str]:
    """pid -> name, in the trace's order."""
    return {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}


def driver_spans(trace: dict[str, Any], name: str) -> list[tuple[float, float]]:
    """(start, end) of the driver's spans of that name, microseconds of the trace."""
    driver = next(pid for pid, process in process_names(trace).items() if process == "driver")
    chosen = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == driver and e["name"] == name]
    return [(event["ts"], event["ts"] + event["dur"]) for event in chosen]


def decoding_curves(trace: dict[str, Any], start: float, end: float) -> dict[str, list[tuple[float, int]]]:
    """(seconds since start, responses unfinished from then on) of each engine within a window of the trace."""
    names = process_names(trace)
    found: dict[str, list[tuple[float, int]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "C" and event["name"] == "responses" and start <= event["ts"] <= end:
            place = ((event["ts"] - start) * 1e-6, event["args"]["responses"])
            found.setdefault(names[event["pid"]], []).append(place)
    return found


def tail_of(trace: dict[str, Any]) -> Tail | None:
    """Over all rollouts of the trace; None when it has none with engines' counters."""
    spent = tail = busy = could = 0.0
    rollouts = 0
    for start, end in driver_spans(trace, "rollout"):
        curves = [curve for curve in decoding_curves(trace, start, end).values() if curve[-1][1] == 0]
        if not curves:
            continue
        rollouts += 1
        last = max(curve[-1][0] for curve in curves)
        spent += last
        tail += last - tail_start(curves)
        busy += sum(curve[-1][0] for curve in curves)
        could += last * len(curves)
    return Tail(tail / spent, 1 - busy / could, rollouts) if rollouts and spent > 0 else None
