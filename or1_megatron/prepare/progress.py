"""What `or1 prepare` shows: a bar for the step under way on a terminal, a line now and then anywhere else; a line for
each step that is done, a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from or1_megatron.display import HEARTBEAT_S, heartbeat

if TYPE_CHECKING:
    from or1_megatron.prepare.runner import Report


class Bars:
    """A context manager around the whole pipeline. Everything goes to stderr."""

    def __init__(self, heartbeat_s: float = HEARTBEAT_S) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        columns += (TimeElapsedColumn(), TimeRemainingColumn())
        self._heartbeat_s = heartbeat_s
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def step(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """total: its rows; None where they are not known. Yields advance(rows)."""
        task, done = self._progress.add_task(name, total=total), 0

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            self._progress.advance(task, rows)

        def tell(seconds: float) -> None:
            self.message(f"{name}: {done:,} {'' if total is None else f'of {total:,} '}rows done after {seconds:.0f} s")

        bar_alone = self._progress.console.is_terminal
        try:
            with nullcontext() if bar_alone else heartbeat(tell, self._heartbeat_s):
                yield advance
        finally:
            self._progress.remove_task(task)

    def message(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def line(report: Report) -> str:
    done = "from the cache" if report.cached else f"{report.seconds:.1f} s"
    return f"{report.name}: {report.outcome.rows_out:,} of {report.outcome.rows_in:,} rows, {done}"


def counts_table(reports: list[Report]) -> str:
    """A line per step, with what was dropped and why, and the folder that holds the dropped rows."""
    head = ("step", "does", "in", "out", "dropped", "seconds", "folder, reasons")
    lines: list[tuple[str, ...]] = [head]
    for report in reports:
        outcome = report.outcome
        seconds = "cached" if report.cached else f"{report.seconds:.1f}"
        counts = [f"{number:,}" for number in (outcome.rows_in, outcome.rows_out, outcome.drops.total())]
        lines.append((report.name, report.kind, *counts, seconds, report.folder.name))
        for reason, count in sorted(outcome.drops.items(), key=lambda item: (-item[1], item[0])):
            lines.append(("", "", "", "", f"{count:,}", "", f"  {reason}"))
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(head))]
    rows = []
    for cells in lines:
        aligned = [
            cell.rjust(width) if 2 <= i <= 5 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        rows.append("  ".join(aligned).rstrip())
    return "\n".join(rows)
