"""Axes: round ticks, positions, short labels, and fewer points where there are too many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [start, end] of a picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, at most `most` + 2 of them."""
    if not math.isfinite(low) or not math.isfinite(high):
        return [0.0, 1.0]
    if high - low < 1e-12 * max(1.0, abs(low), abs(high)):
        spread = abs(low) * 0.1 or 1.0
        low, high = (low - spread if low else 0.0), high + spread
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def whole_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Whole numbers inside [low, high]: steps."""
    step = max(1, math.ceil(ticks(low, high, most)[1] - ticks(low, high, most)[0]))
    return [float(number) for number in range(math.ceil(low / step) * step, math.floor(high) + 1, step)] or [low]


def short(value: float) -> str:
    """Four characters or so: 0.25, 12, 3400, 34k, 2e-6."""
    size = abs(value)
    if size == 0:
        return "0"
    for one, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= one * (9.9995 if unit == "k" else 0.9995):  # what would be rounded up to the next unit is of it
            return f"{value / one:.3g}{unit}"
    if size >= 999.5:
        return f"{value:.0f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def thinned(points: Sequence[Point], most: int = 300, *, largest: bool = False) -> list[Point]:
    """At most `most` points: means of neighbours, or where `largest` is told the largest of them."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    value = max if largest else statistics.fmean
    return [(statistics.fmean(x for x, _ in part), value(y for _, y in part)) for part in parts]
