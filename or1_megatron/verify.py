"""`or1 verify FILE`: scores a file of responses, and with --compare the same responses with other people's verifiers.

A row (.jsonl or .parquet) has `response` and `ground_truth` (or reward_model.ground_truth), as text or as a list;
optional: `data_source`, `truncated`, `prompt` (as the model saw it), `correct` (a person's judgement, true or
false), `difficulty` (0 to 8, as in the paper's comparison of verifiers: how many of 8 attempts failed, or any other
level of the user's, a number or text).
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from or1_megatron.data.rows import sound_rows
from or1_megatron.errors import UserError
from or1_megatron.parallel.file_sums import published
from or1_megatron.prepare.progress import Bars
from or1_megatron.reward.named import NAMED
from or1_megatron.reward.preflight import reached_isolation
from or1_megatron.reward.problem import Task, code_tests
from or1_megatron.reward.response import after_reasoning, reasoning_is_open
from or1_megatron.reward.service import RewardService
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Verdict

OURS = "or1"
PLOTS = (".png", ".svg", ".pdf")
DEADLINE_S = 10.0
HEARTBEAT_S = 10.0  # between lines that say how many are done, where there is no terminal for a bar
_START_S = 60.0


Level = int | float | str


@dataclass(frozen=True)
class Row:
    task: Task
    correct: bool | None  # as judged by hand
    difficulty: Level | None


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
    judged = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if row.correct is not None]
    if judged:
        wrong = sum(verdict.name == "correct" and not row.correct for row, verdict in judged)
        lost = sum(verdict.name != "correct" and bool(row.correct) for row, verdict in judged)
        print(f"against {len(judged)} judgements by hand: {wrong} wrong answers accepted, {lost} right ones refused")
    if out:
        lines = [json.dumps({"verdict": v.name, "seconds": round(v.seconds, 4), "detail": v.detail}) for v in verdicts]
        with published(out) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
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
    any. Raises UserError."""
    if any(code_tests(row.task.ground_truth, row.task.data_source) for row in rows):
        print(reached_isolation(config))
    started = time.perf_counter()
    with RewardService(config) as service:
        verdicts = _judged(service, rows)
        metrics = service.take_metrics()
    return verdicts, {**metrics, "seconds": time.perf_counter() - started}


def _judged(service: RewardService, rows: list[Row]) -> list[Verdict]:
    verdicts: list[Verdict] = []
    with Bars(HEARTBEAT_S) as bars, bars.step(OURS, len(rows)) as advance:
        for future in [service.submit(row.task) for row in rows]:
            verdicts.append(future.result())
            advance(1)
    return verdicts


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
    source, cut = str(row.get("data_source") or ""), bool(row.get("truncated"))
    prompt = row.get("prompt")
    reasoning_open = isinstance(prompt, str) and reasoning_is_open(prompt)
    task = Task(response, tuple(map(str, truths)), source, cut, reasoning_open)
    correct, difficulty = row.get("correct"), row.get("difficulty")
    if correct not in (None, True, False):
        raise UserError(f"{place}: `correct` is {correct!r:.60}; it must be true or false")
    if not isinstance(difficulty, Level | None):
        raise UserError(f"{place}: `difficulty` is {difficulty!r:.60}; it must be a number or text")
    return Row(task, correct if correct is None else bool(correct), difficulty)


# ---- the comparison


class Killable:
    """A named verifier in a process of its own, which is killed at the deadline and started again."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self._folder = folder / NAMED[name].folder
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, response: str, ground_truth: tuple[str, ...]) -> str:
        """`correct`, `wrong`, `timeout` or `error`. Raises UserError when it does not start."""
        if self._process is None:
            self._process = self._start()
        line = json.dumps({"response": response, "ground_truth": ground_truth}) + "\n"
        assert self._process.stdin
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return "error"
        answer = self._read(DEADLINE_S)
        if answer is None:
            self.close()
            return "timeout"
        if "correct" not in answer:
            if not answer:
                self.close()
            return "error"
        return "correct" if answer["correct"] else "wrong"

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "or1_megatron.reward.named", self.name, str(self._folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        if not self._read(_START_S):
            self.close()
            raise UserError(f"{self.name} does not start from {self._folder}; remove the folder and use --install")
        return self._process

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next line; {} when the process has ended, None when the time is up."""
        assert self._process and self._process.stdout
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {}

    def close(self) -> None:
        """Ends it with whatever it has started."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


@dataclass
class Column:
    """One verifier's answers, in the order of the rows: correct, wrong, timeout or error."""

    name: str
    answers: list[str]
    seconds: float


def compare(file: Path, config: RewardConfig, folder: Path, install: bool, plot: Path | None, most: int = 20) -> None:
    """Prints accepted wrong and refused right answers of each verifier, by difficulty, and where they disagree."""
    rows = [row for row in read_rows(file) if code_tests(row.task.ground_truth, row.task.data_source) is None]
    if not rows:
        raise UserError(f"{file} holds no math answers; the other verifiers know nothing else")
    if plot:
        if plot.suffix.lower() not in PLOTS:
            raise UserError(f"--plot {plot}: use {', '.join(PLOTS[:-1])} or {PLOTS[-1]}")
        prepare_place("--plot", plot)
    columns = [_our_column(rows, config)]
    for name, known in NAMED.items():
        if known.packages and not (folder / known.folder).is_dir():
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder / known.folder)]
            if not install:
                words = " ".join(["pip", *command[3:], *known.packages])
                print(f"{name}: not here; or1 verify --compare --install, or {words}")
                continue
            if subprocess.run([*command, "--quiet", *known.packages], check=False).returncode:
                raise UserError(f"pip could not install {' '.join(known.packages)} into {folder / known.folder}")
        columns.append(_their_column(name, rows, folder, config.num_workers))
    truth = [
        row.correct if row.correct is not None else columns[0].answers[i] == "correct" for i, row in enumerate(rows)
    ]
    if any(row.correct is None for row in rows):
        print(f"without `correct` in a row, {OURS}'s verdict is taken for the truth")
    print(table(columns, rows, truth))
    # Half a surrogate pair, which a cut response may end with, has no encoding.
    print(disagreements(columns, rows, most).encode(errors="backslashreplace").decode())
    if plot:
        _plot(columns, rows, truth, plot)


def _our_column(rows: list[Row], config: RewardConfig) -> Column:
    started = time.perf_counter()
    with RewardService(config) as service:
        names = [verdict.name for verdict in _judged(service, rows)]
    answers = ["wrong" if name in ("unparsable", "truncated") else name for name in names]
    return Column(OURS, answers, time.perf_counter() - started)


def _their_column(name: str, rows: list[Row], folder: Path, num_workers: int) -> Column:
    started = time.perf_counter()

    def answer_share(first: int) -> list[str]:
        process = Killable(name, folder)
        try:
            found = []
            for row in rows[first::num_workers]:
                found.append(process.ask(_answer_part(row), row.task.ground_truth))
                advance(1)
            return found
        finally:
            process.close()

    with (
        Bars(HEARTBEAT_S) as bars,
        bars.step(name, len(rows)) as advance,
        ThreadPoolExecutor(num_workers) as pool,
    ):
        shares = list(pool.map(answer_share, range(num_workers)))
    answers = [shares[i % num_workers][i // num_workers] for i in range(len(rows))]
    return Column(name, answers, time.perf_counter() - started)


def _answer_part(row: Row) -> str:
    return after_reasoning(row.task.response, reasoning_open=row.task.reasoning_open, unclosed="zero") or ""


def errors(column: Column, rows: list[Row], truth: list[bool], level: Level | None = None) -> tuple[int, int, int]:
    """(wrong answers accepted, right answers refused, neither said), over the rows of one difficulty or all."""
    counts = Counter(
        (answer, right)
        for answer, right, row in zip(column.answers, truth, rows, strict=True)
        if level is None or row.difficulty == level
    )
    unsaid = sum(n for (answer, _), n in counts.items() if answer not in ("correct", "wrong"))
    return counts["correct", False], counts["wrong", True], unsaid


def _levels(rows: list[Row]) -> list[Any]:
    return sorted({row.difficulty for row in rows if row.difficulty is not None})


def table(columns: list[Column], rows: list[Row], truth: list[bool]) -> str:
    width = max(len(column.name) for column in columns)
    levels = _levels(rows)
    head = f"{'':{width}}  {'accepts wrong':>13}  {'refuses right':>13}  {'fails':>6}  {'seconds':>8}"
    head += "".join(f"  {'level ' + str(level):>8}" for level in levels)
    lines = [f"{len(rows)} responses, {sum(truth)} of them right; by level: accepted wrong + refused right", head]
    for column in columns:
        wrong, lost, unsaid = errors(column, rows, truth)
        line = f"{column.name:{width}}  {wrong:13}  {lost:13}  {unsaid:6}  {column.seconds:8.1f}"
        for level in levels:
            few = errors(column, rows, truth, level)
            line += f"  {f'{few[0]}+{few[1]}':>8}"
        lines.append(line)
    return "\n".join(lines)


def disagreements(columns: list[Column], rows: list[Row], most: int) -> str:
    """Rows that not all verifiers judge alike, with those that accept."""
    found = []
    for i, row in enumerate(rows):
        accepting = [column.name for column in columns if column.answers[i] == "correct"]
        if 0 < len(accepting) < len(columns):
            answer = _answer_part(row).strip()[-60:]
            found.append(
                f"  gold {' | '.join(row.task.ground_truth)}  answer {answer}  accepted by {', '.join(accepting)}"
            )
    more = [f"  and {len(found) - most} more"] if len(found) > most else []
    return "\n".join([f"{len(found)} disagreements", *found[:most], *more])


def _plot(columns: list[Column], rows: list[Row], truth: list[bool], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: list[Level | None] = [*_levels(rows)] or [None]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), constrained_layout=True)
    for axis, kind, title in ((axes[0], 0, "wrong answers accepted"), (axes[1], 1, "right answers refused")):
        for place, column in enumerate(columns):
            counts = [errors(column, rows, truth, level)[kind] for level in groups]
            axis.bar(
                [i + 0.8 * place / len(columns) for i in range(len(groups))],
                counts,
                0.8 / len(columns),
                label=column.name,
            )
        axis.set_title(title)
        axis.set_xticks(range(len(groups)), ["all" if level is None else f"level {level}" for level in groups])
    axes[1].legend(fontsize=8)
    figure.savefig(path)
