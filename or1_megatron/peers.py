"""`or1 verify FILE --compare`: the same responses with other people's verifiers, side by side with ours."""

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

from or1_megatron.errors import UserError
from or1_megatron.reward.named import NAMED
from or1_megatron.reward.response import after_reasoning
from or1_megatron.reward.service import RewardService
from or1_megatron.sections import RewardConfig
from or1_megatron.verify import OURS, Level, Row, judged, prepare_place, read_rows, told, wants_code

PLOTS = (".png", ".svg", ".pdf")
DEADLINE_S = 10.0
_START_S = 60.0


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
    rows = [row for row in read_rows(file) if not wants_code(row)[0]]
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
        names = [verdict.name for verdict in judged(service, rows)]
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

    with told(name, len(rows)) as advance, ThreadPoolExecutor(num_workers) as pool:
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
