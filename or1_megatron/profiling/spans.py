"""Where the wall time of a step goes: named, nestable spans on one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Spans:
    """Adds up wall seconds per name. A span inside another counts in both."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """{"seconds/<name>": seconds} since the last call."""
        taken = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken
