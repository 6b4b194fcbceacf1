"""Where the wall time of a process goes: named, nested spans on the host's monotonic clock.

All processes of a host read the same clock (CLOCK_MONOTONIC, nanoseconds), so their spans line up as they are; those
of another host are shifted by `clock_offset`. A span inside another lies one level deeper and counts in both. With
`idle`, the time between two spans of level 0 is a span of that name too, so that level 0 covers the wall time.
A recorder keeps its newest `capacity` records and says how many it lost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

CAPACITY = 50_000
IDLE = "idle"


class Span(NamedTuple):
    """Nanoseconds of the monotonic clock; level 0 is outermost."""

    name: str
    start_ns: int
    end_ns: int
    level: int


class Count(NamedTuple):
    """A quantity that has had this value since `at_ns`, and how often the process had gone round its loop by then."""

    name: str
    at_ns: int
    value: int
    rounds: int


@dataclass
class Record:
    """What one process did since it was last asked. `lost`: records that did not fit any more."""

    spans: list[Span]
    counts: list[Count]
    lost: int
    peak_bytes: int = 0  # memory high-water mark in that time


class Spans:
    """One thread's recorder. Off (`enabled` False) a span costs a function call and records nothing."""

    def __init__(self, *, enabled: bool = True, idle: bool = False, capacity: int = CAPACITY):
        self.enabled = enabled
        self.marks: tuple[Callable[[str], Any], Callable[[], Any]] | None = None  # NVTX's push and pop
        self._spans: deque[Span] = deque(maxlen=capacity)
        self._counts: deque[Count] = deque(maxlen=capacity)
        self._appended = 0
        self._seconds: dict[str, float] = {}
        self._level = 0
        self._idle_since = time.monotonic_ns() if idle else None

    def span(self, name: str) -> AbstractContextManager[Any]:
        return _Open(self, name) if self.enabled else _NOTHING

    def count(self, name: str, value: int, rounds: int = 0) -> None:
        """Notes that a quantity has changed to `value`."""
        if self.enabled:
            self._counts.append(Count(name, time.monotonic_ns(), value, rounds))
            self._appended += 1

    def take(self) -> dict[str, float]:
        """{"seconds/<name>": seconds} since the last call."""
        taken = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken

    def drain(self) -> Record:
        """Spans that have ended, and counts, since the last call; in the order in which they ended.

        Idle time up to now is among them, so that what successive calls return covers the time between them.
        """
        if self._idle_since is not None and self._level == 0 and self.enabled:
            now = time.monotonic_ns()
            self._append(IDLE, self._idle_since, now, 0)
            self._idle_since = now
        record = Record(list(self._spans), list(self._counts), 0)
        record.lost = self._appended - len(record.spans) - len(record.counts)
        self._spans.clear()
        self._counts.clear()
        self._appended = 0
        return record

    def _append(self, name: str, start_ns: int, end_ns: int, level: int) -> None:
        self._spans.append(Span(name, start_ns, end_ns, level))
        self._appended += 1


class _Open:
    __slots__ = ("_name", "_spans", "_start_ns")

    def __init__(self, spans: Spans, name: str):
        self._spans, self._name = spans, name

    def __enter__(self) -> None:
        spans = self._spans
        if spans.marks:
            spans.marks[0](self._name)
        self._start_ns = time.monotonic_ns()
        if spans._idle_since is not None and spans._level == 0:
            spans._append(IDLE, spans._idle_since, self._start_ns, 0)
        spans._level += 1

    def __exit__(self, *_: object) -> None:
        end_ns, spans = time.monotonic_ns(), self._spans
        spans._level -= 1
        spans._append(self._name, self._start_ns, end_ns, spans._level)
        spans._seconds[self._name] = spans._seconds.get(self._name, 0.0) + (end_ns - self._start_ns) * 1e-9
        if spans._idle_since is not None and spans._level == 0:
            spans._idle_since = end_ns
        if spans.marks:
            spans.marks[1]()


_NOTHING = nullcontext()


def clock() -> tuple[str, int]:
    """(name of the running kernel, its monotonic clock in nanoseconds): equal names share one clock."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), time.monotonic_ns()


def clock_offset(asked: list[tuple[int, int, int]]) -> tuple[int, int]:
    """(nanoseconds to add to another host's clock, the error that this may have) from several questions.

    Each is (ours when asked, theirs, ours when answered). The quickest answer counts: its reading was taken somewhere
    between the two, and the middle is at most half of the round trip wrong.
    """
    sent, theirs, received = min(asked, key=lambda reading: reading[2] - reading[0])
    return (sent + received) // 2 - theirs, (received - sent + 1) // 2


def within(spans: list[Span], start_ns: int, end_ns: int) -> list[Span]:
    """Those parts of the spans that lie in the window."""
    cut = [span._replace(start_ns=max(span.start_ns, start_ns), end_ns=min(span.end_ns, end_ns)) for span in spans]
    return [span for span in cut if span.end_ns > span.start_ns]


def covered_seconds(spans: list[Span], level: int = 0) -> float:
    """Sum of the spans of one level."""
    return sum(span.end_ns - span.start_ns for span in spans if span.level == level) * 1e-9


def busy_seconds(spans: list[Span]) -> float:
    return covered_seconds([span for span in spans if span.name != IDLE])
