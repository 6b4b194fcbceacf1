"""The pictures of a dataset card, as PNG. Each function draws one figure and returns its file's bytes."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from or1_megatron.prepare.summary import SourceSummary, StepCounts, Summary

MOST_SOURCES = 8  # that have a colour of their own; the rest are one
_ATTEMPTS = 16  # that model_difficulty counts in
_MOST_PANELS = 4
_TICKS = [digit * 10**power for power in range(8) for digit in (1, 3)]  # of a logarithmic axis
_KEPT, _DROPPED = "#3b6ea5", "#d9a441"


def _figure(*shape: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*shape, figsize=size, constrained_layout=True, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    pyplot.close(figure)
    return data.getvalue()


def steps_plot(steps: Sequence[StepCounts]) -> bytes:
    """Rows that each step kept and dropped, from the first at the top."""
    figure, ((axis,),) = _figure(1, 1, size=(9, 0.9 + 0.34 * len(steps)))
    places = range(len(steps))
    kept = [step.rows_out for step in steps]
    dropped = [sum(step.drops.values()) for step in steps]
    axis.barh(places, kept, color=_KEPT, label="kept")
    axis.barh(places, dropped, left=kept, color=_DROPPED, label="dropped")
    for place, (out, lost) in enumerate(zip(kept, dropped, strict=True)):
        axis.text(
            out + lost, place, f" {out:,}" + (f"  \N{MINUS SIGN}{lost:,}" if lost else ""), va="center", fontsize=8
        )
    axis.set_yticks(places, [step.name if step.name == step.kind else f"{step.name} ({step.kind})" for step in steps])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max([1, *(out + lost for out, lost in zip(kept, dropped, strict=True))]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("rows")
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return _png(figure)


def shown_sources(sources: dict[str, SourceSummary]) -> dict[str, list[SourceSummary]]:
    """The largest by name, the others together."""
    names = list(sources)
    few = len(names) <= MOST_SOURCES
    alone = names if few else names[: MOST_SOURCES - 1]
    grouped = {name: [sources[name]] for name in alone}
    if not few:
        grouped[f"{len(names) - len(alone)} others"] = [sources[name] for name in names[len(alone) :]]
    return grouped


def lengths_plot(summary: Summary) -> bytes:
    """Characters of problems, and of reference solutions where there are any, over a logarithmic axis; in % of each
    source, so that a small one is to be seen beside a large one."""
    grouped = shown_sources(summary.sources)
    kinds = [("problem_lengths", "problem")]
    if any(source.solution_lengths for source in summary.sources.values()):
        kinds.append(("solution_lengths", "reference solution"))
    figure, (axes,) = _figure(1, len(kinds), size=(5.0 * len(kinds) + 2.4, 3.4))
    for axis, (kind, title) in zip(axes, kinds, strict=True):
        lengths = {name: [n for part in parts for n in getattr(part, kind)] for name, parts in grouped.items()}
        largest = max(max(values, default=1) for values in lengths.values())
        least = max(1, min(min(values, default=largest) for values in lengths.values()))
        edges = np.geomspace(least, max(largest, least + 1) * 1.001, 31)
        for place, (name, values) in enumerate(lengths.items()):
            if values:
                label = f"{name} ({len(values):,})"
                shares = 100 * np.histogram(values, edges)[0] / len(values)
                axis.stairs(shares, edges, linewidth=1.4, color=f"C{place}", label=label)
        axis.set_xscale("log")
        axis.set_xticks([], minor=True)
        axis.set_xticks([tick for tick in _TICKS if edges[0] <= tick <= edges[-1]])
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("characters")
        axis.set_ylabel("% of the source's rows")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def difficulty_plot(summary: Summary) -> bytes | None:
    """By failed attempts of each model; without any, by the numbers that the sources give. None without either."""
    models = list(summary.model_difficulty.items())[:_MOST_PANELS]
    if models:
        figure, (axes,) = _figure(1, len(models), size=(4.6 * len(models) + 0.6, 3.2))
        for axis, (model, counts) in zip(axes, models, strict=True):
            failed = range(_ATTEMPTS + 1)
            colors = [_DROPPED if number in (0, _ATTEMPTS) else _KEPT for number in failed]
            axis.bar(failed, [counts[number] for number in failed], color=colors)
            axis.set_title(f"{model} ({counts.total():,})", fontsize=9)
            axis.set_xticks(range(0, _ATTEMPTS + 1, 4))
            axis.set_xlabel(f"failed attempts of {_ATTEMPTS} (0: always right, {_ATTEMPTS}: never)", fontsize=8)
            axis.set_ylabel("problems")
        return _png(figure)
    numbered = {source: _numbers(counts) for source, counts in summary.own_difficulty.items()}
    shown = [(source, values) for source, values in numbered.items() if values][:_MOST_PANELS]
    if not shown:
        return None
    figure, (axes,) = _figure(1, len(shown), size=(4.2 * len(shown) + 0.6, 3.0))
    for axis, (source, values) in zip(axes, shown, strict=True):
        step = max(0.5, (max(values) - min(values)) / 40)
        axis.hist(values, np.arange(min(values) - step / 2, max(values) + step, step), color=_KEPT, rwidth=0.9)
        axis.set_title(f"{source} ({len(values):,})", fontsize=9)
        axis.set_xlabel("difficulty, on the source's own scale")
        axis.set_ylabel("problems")
    return _png(figure)


def _numbers(counts: Counter[Any]) -> list[float]:
    numbers = [(float(value), count) for value, count in counts.items() if not isinstance(value, str)]
    return [value for value, count in numbers if math.isfinite(value) for _ in range(count)]


def overlaps_plot(found: Counter[tuple[str, str]]) -> bytes:
    """Rows dropped (down) because of rows of another source or benchmark (across)."""
    down = sorted({pair[0] for pair in found})
    across = sorted({pair[1] for pair in found})
    figure, ((axis,),) = _figure(1, 1, size=(2.6 + 0.85 * len(across), 1.5 + 0.45 * len(down)))
    counts = np.array([[found[a, b] for b in across] for a in down])
    axis.imshow(np.log1p(counts), cmap="Blues", aspect="auto", vmin=0, vmax=np.log1p(counts.max()) * 1.25)
    for i in range(len(down)):
        for j in range(len(across)):
            if counts[i, j]:
                color = "white" if counts[i, j] > 0.3 * counts.max() else "black"
                axis.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(across)), across, rotation=25, ha="right", fontsize=8)
    axis.set_yticks(range(len(down)), down, fontsize=8)
    axis.set_xlabel("because of a row of")
    axis.set_ylabel("dropped")
    return _png(figure)
