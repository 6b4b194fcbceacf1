"""`or1 verify FILE`: scores a file of responses.

A row (.jsonl or .parquet) has `response` and `ground_truth` (or reward_model.ground_truth), as text or as a list;
optional: `data_source`, `truncated`, `prompt` (as the model saw it), `correct` (a person's judgement, true or
false), `difficulty` (0 to 8, as in the paper's comparison of verifiers: how many of 8 attempts failed, or any other
level of the user's, a number or text).
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from or1_megatron.data.rows import sound_rows
from or1_megatron.errors import UserError
from or1_megatron.parallel.file_sums import publish_text
from or1_megatron.prepare.progress import Bars
from or1_megatron.reward.preflight import reached_isolation
from or1_megatron.reward.problem import BROKEN_TESTS, Task, code_tests
from or1_megatron.reward.response import reasoning_is_open
from or1_megatron.reward.service import RewardService
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Verdict

OURS = "or1"
HEARTBEAT_S = 10.0  # between lines that say how many are done, where there is no terminal for a bar
Level = int | float | str


@dataclass(frozen=True)
class Row:
    task: Task
    correct: bool | None  # as judged by hand
    difficulty: Level | None
    place: str = ""  # file and line


def verify(file: Path, config: RewardConfig, out: Path | None = None) -> list[Verdict]:
    """Scores every row, prints what came out and writes one JSON line per row to `out`. Raises UserError."""
    rows = read_rows(file)
    if out:
        prepare_place("--out", out)
    verdicts, metrics = score_rows(rows, config)
    counts = Counter(verdict.name for verdict in verdicts)
    print(
        f"{len(rows)} responses in {metrics['seconds']:.1f} s: "
        + ", ".join(f"{n} {name}" for name, n in counts.most_common())
    )
    print("check time: p50 {latency_p50_ms:.1f} ms, p99 {latency_p99_ms:.1f} ms".format_map(_short(metrics)))
    by_hand = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if row.correct is not None]
    if by_hand:
        wrong = sum(verdict.name == "correct" and not row.correct for row, verdict in by_hand)
        lost = sum(verdict.name != "correct" and bool(row.correct) for row, verdict in by_hand)
        print(f"against {len(by_hand)} judgements by hand: {wrong} wrong answers accepted, {lost} right ones refused")
    if out:
        lines = [json.dumps({"verdict": v.name, "seconds": round(v.seconds, 4), "detail": v.detail}) for v in verdicts]
        publish_text(out, "\n".join(lines) + "\n")
    return verdicts


def prepare_place(option: str, path: Path) -> None:
    """Makes the folder of a new file that is written once everything is scored. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file")
    if path.exists():
        raise UserError(f"{option} {path} exists; choose another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: its folder cannot be made ({error.strerror}); choose another") from None
    if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(f"{option} {path}: you may not write in {path.parent}; choose another")


def score_rows(rows: list[Row], config: RewardConfig) -> tuple[list[Verdict], dict[str, float]]:
    """Verdicts in order; the service's metrics and the seconds that it took. Prints the isolation of code when there is
    any, and how many rows have broken tests: these are `infrastructure_error`. Raises UserError."""
    kinds = [wants_code(row) for row in rows]
    broken = {i: fault for i, (_, fault) in enumerate(kinds) if fault}
    if any(code and not fault for code, fault in kinds):
        print(reached_isolation(config))
    if broken:
        first = min(broken)
        print(f"tests that cannot be used: {len(broken)} of {len(rows)} rows; {rows[first].place}: {broken[first]}")
    started = time.perf_counter()
    with RewardService(config) as service:
        found = iter(judged(service, [row for i, row in enumerate(rows) if i not in broken]))
        metrics = service.take_metrics()
    verdicts = [
        Verdict("infrastructure_error", 0.0, f"{BROKEN_TESTS}: {broken[i]}") if i in broken else next(found)
        for i in range(len(rows))
    ]
    return verdicts, {**metrics, "seconds": time.perf_counter() - started}


def wants_code(row: Row) -> tuple[bool, str]:
    """Whether the answer is code, and why its tests cannot be used; empty when they can."""
    try:
        return code_tests(row.task.ground_truth, row.task.data_source) is not None, ""
    except UserError as error:
        return True, str(error)


def judged(service: RewardService, rows: list[Row]) -> list[Verdict]:
    """Verdicts in order; tells how many are done."""
    verdicts: list[Verdict] = []
    with told(OURS, len(rows)) as advance:
        for future in [service.submit(row.task) for row in rows]:
            verdicts.append(future.result())
            advance(1)
    return verdicts


@contextmanager
def told(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar, or lines, that say how many rows are done; yields advance(rows)."""
    with Bars(HEARTBEAT_S) as bars, bars.step(name, total) as advance:
        yield advance


def _short(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("verifier/"): value for name, value in metrics.items()}


def read_rows(file: Path) -> list[Row]:
    """Raises UserError naming the first bad row."""
    rows = [_row(place, row) for place, row in sound_rows(file)]
    if not rows:
        raise UserError(f"{file} holds no response")
    if len({isinstance(row.difficulty, str) for row in rows if row.difficulty is not None}) > 1:
        raise UserError(f"{file}: `difficulty` is a number in some rows and text in others; use one of them")
    return rows


def _row(place: str, row: dict[str, Any]) -> Row:
    response = row.get("response")
    if not isinstance(response, str):
        raise UserError(f"{place}: no text under `response`")
    truth = row.get("ground_truth")
    if truth is None:
        nested = row.get("reward_model")
        truth = nested.get("ground_truth") if isinstance(nested, dict) else None
    truths = truth if isinstance(truth, list) else [truth]
    if not truths or not all(isinstance(item, str | int | float) for item in truths):
        raise UserError(f"{place}: `ground_truth` is {truth!r:.60}; it must be text, or a list of texts")
    prompt = row.get("prompt")
    reasoning_open = isinstance(prompt, str) and reasoning_is_open(prompt)
    for name in ("truncated", "correct"):
        if row.get(name) not in (None, True, False):
            raise UserError(f"{place}: `{name}` is {row[name]!r:.60}; it must be true or false")
    source, cut = str(row.get("data_source") or ""), bool(row.get("truncated"))
    task = Task(response, tuple(map(str, truths)), source, cut, reasoning_open)
    correct, difficulty = row.get("correct"), row.get("difficulty")
    if not isinstance(difficulty, Level | None):
        raise UserError(f"{place}: `difficulty` is {difficulty!r:.60}; it must be a number or text")
    return Row(task, correct if correct is None else bool(correct), difficulty, place)
