"""What a run shows while it goes on: a live table on a terminal, one plain line a step anywhere else.

A step's metrics come as the flat dictionary that is also logged; a missing or NaN value shows as '-'. Steps count
from 1. On a terminal the table shows the last steps and a clock on the running phase; in a file or a pipe there are
no control codes, and a phase that lasts longer than `heartbeat_s` says so, so that a long step is not taken for a
dead one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

NUM_ROWS = 8
HEARTBEAT_S = 30.0
PHASES = ("rollout", "update", "sync")


@contextmanager
def heartbeat(tell: Callable[[float], None], every_s: float = HEARTBEAT_S) -> Iterator[None]:
    """Calls tell(seconds since the start), in a thread of its own, again and again while the block lasts."""
    started, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(every_s):
            tell(time.monotonic() - started)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Display:
    """A context manager around the whole run. unit: what `total` counts."""

    def __init__(
        self,
        total: int,
        name: str,
        console: Console | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        unit: str = "step",
    ):
        self._total = total
        self._name = name
        self._unit = unit
        self._console = console or Console()
        self._heartbeat_s = heartbeat_s
        self._rows: tuple[Mapping[str, Any], ...] = ()  # replaced, never changed: another thread draws it
        self._step = 0
        self._started = time.monotonic()
        self._phase = "starting"
        self._answered = 1.0
        self._phase_started = self._started
        self._closing = threading.Event()
        self._live: Live | None = None
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Display:
        self._started = self._phase_started = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(get_renderable=self.render, console=self._console, refresh_per_second=4)
            self._live.start()
        else:
            self._heart = threading.Thread(target=self._beat, daemon=True)
            self._heart.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        if self._live:
            self._phase = ""
            self._live.stop()
        if self._heart:
            self._heart.join()

    def phase(self, text: str) -> None:
        """The run now does `text`; its clock starts at 0."""
        self._phase_started = time.monotonic()
        self._phase = text

    def answered(self, share: float) -> None:
        """Of the responses that the engines are at now, this share has ended."""
        self._answered = share

    def done(self, number: int) -> None:
        """So many steps, or of what else is counted, are done."""
        self._step = number

    def resumed(self, step: int) -> None:
        """The run goes on after this step."""
        self.done(step)
        self.message(f"resumed after step {step}")

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step is done; metrics["step"] is its number."""
        self.done(metrics["step"])
        self._rows = (*self._rows, dict(metrics))[-NUM_ROWS:]
        if self._live is None:
            self._print(self._plain_line(metrics))

    def message(self, text: str) -> None:
        """A line that stays: above the table, or among the plain lines."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _plain_line(self, metrics: Mapping[str, Any]) -> str:
        cells = _cells(metrics)
        words = [self._place()]
        words += [f"{name} {cells[name]}" for name in ("reward", "entropy", "alpha", "length", "cut", "kept")]
        words.append(f"seconds {_number(metrics, 'seconds/step', '.1f')}")
        words.append("(" + ", ".join(f"{name} {cells[name]}" for name in (*PHASES, "other")) + ")")
        return "  ".join(words)

    def _beat(self) -> None:
        said = self._phase_started
        while not self._closing.wait(min(1.0, self._heartbeat_s / 4)):
            now, started = time.monotonic(), self._phase_started
            said = max(said, started)
            if now - said >= self._heartbeat_s:
                said = now
                self._print(f"{self._name}: {self._place()} done; {self._now()}, {_clock(now - started)}")

    def _place(self) -> str:
        return f"{self._unit} {self._step}/{self._total}"

    def _now(self) -> str:
        return self._phase if self._answered == 1 else f"{self._phase}, {int(100 * self._answered)}% answered"

    def render(self) -> RenderableType:
        """The live view, at most NUM_ROWS steps high."""
        now = time.monotonic()
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._total, completed=self._step, width=30)
        head.add_row(
            Text(self._name, style="bold"),
            bar,
            self._place(),
            _clock(now - self._started),
            self._remaining(),
        )
        parts: list[RenderableType] = [head]
        if self._rows:
            parts.append(self._table())
        if self._phase:
            parts.append(
                Text.assemble(("  now: ", "dim"), f"{self._now()}  ", (_clock(now - self._phase_started), "dim"))
            )
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="dim")
        for name in _cells({}):
            table.add_column(name, justify="right", no_wrap=True)
        for metrics in self._rows:
            table.add_row(*_cells(metrics).values())
        return table

    def _remaining(self) -> str:
        seconds = [row["seconds/step"] for row in self._rows if "seconds/step" in row]
        left = self._total - self._step
        return f"about {_clock(left * sum(seconds) / len(seconds))} left" if seconds and left > 0 else ""


def _cells(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Column -> text, in the order of the table."""
    total = _value(metrics, "seconds/step")
    phases = [_value(metrics, f"seconds/{name}") for name in PHASES]
    other = "-" if total is None else f"{max(0.0, total - sum(seconds or 0.0 for seconds in phases)):.1f}"
    kept, generated = (_number(metrics, f"groups/{name}", ".0f") for name in ("kept", "generated"))
    cells = {
        "step": _number(metrics, "step", ".0f"),
        "reward": _number(metrics, "reward/mean", ".3f"),
        "entropy": _number(metrics, "entropy/signal", ".3f"),
        "alpha": _number(metrics, "entropy/alpha", ".4f"),
        "length": _number(metrics, "length/mean", ".0f"),
        "cut": _number(metrics, "truncated", ".0%"),
        "kept": f"{kept}/{generated}",
    }
    cells |= {name: _number(metrics, f"seconds/{name}", ".1f") for name in PHASES}
    return {**cells, "other": other}


def _value(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _number(metrics: Mapping[str, Any], name: str, form: str) -> str:
    value = _value(metrics, name)
    return "-" if value is None else format(value, form)


def _clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"
