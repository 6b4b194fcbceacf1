"""Plots as inline SVG, without a script: hovering shows a point's values as the browser's own title.

Colours are the page's custom properties --c0, --c1, ..., so that a dark page redraws nothing. All text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from or1_megatron.report.scales import Point, Scale, short, thinned, ticks, whole_ticks

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 34
NUM_COLOURS = 6
MOST_DOTS = 80  # points of a line that tell their values when hovered: they are most of a page's size
_DASHES = ("", "5 3", "2 3")


@dataclass(frozen=True)
class Line:
    """One series. colour: index into the palette; dash: 0 solid, 1 dashed, 2 dotted; dots: single points; largest: of
    neighbours that become one point, not their mean."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0
    dots: bool = False
    largest: bool = False


@dataclass(frozen=True)
class Bars:
    """Stacked bars: `parts` are (label, colour, heights per bar); `names` what each bar is called when hovered."""

    xs: Sequence[float]
    names: Sequence[str]
    parts: Sequence[tuple[str, int, Sequence[float]]]


def line_plot(
    name: str,
    lines: Sequence[Line],
    *,
    percent: bool = False,
    zero: bool = False,
    level: float | None = None,
    axis: str = "step",
) -> str | None:
    """SVG of series over steps, or over what `axis` says; None when there is no point. level: a horizontal line, such
    as a target."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    shown = [(line, thinned(line.points, largest=line.largest)) for line in lines]
    xs = [x for _, points in shown for x, _ in points]
    ys = (
        [y for _, points in shown for _, y in points] + ([0.0] if zero else []) + ([level] if level is not None else [])
    )
    marks = ticks(min(ys), max(ys))
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    y = Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    parts = _frame(marks, y, percent) + _step_axis(min(xs), max(xs), x, axis)
    if level is not None:
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
    for line, points in shown:
        parts.append(_series(line, points, x, y, percent, axis))
    return _svg(name, WIDTH, HEIGHT, parts)


def _series(line: Line, points: Sequence[Point], x: Scale, y: Scale, percent: bool, axis: str) -> str:
    colour = f"var(--c{line.colour % NUM_COLOURS})"
    drawn = ""
    if not line.dots and len(points) > 1:
        path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        dash = f' stroke-dasharray="{_DASHES[line.dash]}"' if line.dash else ""
        drawn = f'<path class="mark line" d="{path}" stroke="{colour}"{dash}/>'
    radius = 3.5 if line.dots or len(points) == 1 else 5
    kind = "mark dot" if line.dots or len(points) == 1 else "hover"
    dots = "".join(
        f'<circle class="{kind}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{radius}" fill="{colour}">'
        f"<title>{escape(line.label)}, {axis} {a:.0f}: {_value(b, percent)}</title></circle>"
        for a, b in thinned(points, MOST_DOTS, largest=line.largest)
    )
    return drawn + dots


def bar_plot(name: str, bars: Bars, *, unit: str = "", percent: bool = False, axis: str = "step") -> str | None:
    """SVG of stacked bars; None when all are empty. axis: `step`, or the label under bars that are no steps."""
    totals = [sum(heights[i] for *_, heights in bars.parts) for i in range(len(bars.xs))]
    if not totals or max(totals) <= 0:
        return None
    marks = ticks(0.0, max(totals))
    y = Scale(0.0, marks[-1], HEIGHT - BOTTOM, TOP)
    slot = (WIDTH - LEFT - RIGHT) / len(totals)
    gap = min(2.0, 0.2 * slot)
    parts = _frame(marks, y, percent)
    for i in range(len(totals)):
        base, left = 0.0, LEFT + i * slot + gap / 2
        said = "; ".join(
            f"{label} {_value(heights[i], percent)}{unit}" for label, _, heights in bars.parts if heights[i]
        )
        rects = ""
        for _, colour, heights in bars.parts:
            top = base + max(0.0, heights[i])
            if top > base:
                rects += (
                    f'<rect class="mark" x="{left:.2f}" width="{max(0.5, slot - gap):.2f}" y="{y(top):.2f}" '
                    f'height="{max(0.3, y(base) - y(top)):.2f}" fill="var(--c{colour})"/>'
                )
            base = top
        parts.append(f"<g>{rects}<title>{escape(bars.names[i])}: {escape(said)}</title></g>")
    middle = Scale(
        bars.xs[0], bars.xs[-1] if len(bars.xs) > 1 else bars.xs[0] + 1, LEFT + slot / 2, WIDTH - RIGHT - slot / 2
    )
    parts += _step_axis(bars.xs[0], bars.xs[-1], middle, axis)
    return _svg(name, WIDTH, HEIGHT, parts)


@dataclass(frozen=True)
class Block:
    """A span in a Gantt chart, seconds from its left edge."""

    name: str
    start: float
    end: float
    colour: int  # below 0: idle


def gantt(
    name: str,
    rows: Sequence[tuple[str, Sequence[Block]]],
    curves: Mapping[str, Sequence[Point]],
    seconds: float,
    width: int,
) -> str:
    """SVG with one row per process; `curves` (seconds, share of the responses still decoding) lie over their rows."""
    height, top, left = 24, 8, 74
    x = Scale(0.0, seconds, left, width - 12)
    parts = []
    bottom = top + height * len(rows)
    for mark in ticks(0.0, seconds, 8 if width > 600 else 4):
        if mark <= seconds:
            parts.append(f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{top}" y2="{bottom}"/>')
            parts.append(f'<text x="{x(mark):.1f}" y="{bottom + 16}" text-anchor="middle">{short(mark)} s</text>')
    for index, (process, blocks) in enumerate(rows):
        y = top + index * height
        parts.append(f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{escape(process)}</text>')
        for block in blocks:
            fill = "var(--idle)" if block.colour < 0 else f"var(--c{block.colour})"
            wide = max(0.6, x(block.end) - x(block.start))
            said = f"{process}: {block.name} {block.end - block.start:.3g} s"
            parts.append(
                f'<rect class="mark" x="{x(block.start):.2f}" y="{y + 2}" width="{wide:.2f}" height="{height - 5}" '
                f'fill="{fill}"><title>{escape(said)}</title></rect>'
            )
            if wide > 7.0 * len(block.name) + 8 and block.colour >= 0:
                parts.append(
                    f'<text class="inside" x="{x(block.start) + 4:.1f}" y="{y + 15}">{escape(block.name)}</text>'
                )
        points = curves.get(process)
        if points:
            y_of = Scale(0.0, 1.0, y + height - 4, y + 3)
            path = f"M{x(points[0][0]):.1f} {y_of(points[0][1]):.1f}"
            for at, share in points[1:]:
                path += f"H{x(at):.1f}V{y_of(share):.1f}"
            parts.append(f'<path class="curve" d="{path}"/>')
    return _svg(name, width, bottom + 24, parts)


def legend(entries: Sequence[tuple[str, int, int]]) -> str:
    """(label, colour, dash) as HTML; empty for fewer than two."""
    if len(entries) < 2:
        return ""
    kinds = ("solid", "dashed", "dotted")
    items = "".join(
        f'<span><i style="border-top:3px {kinds[dash]} var(--c{colour % NUM_COLOURS})"></i>{escape(label)}</span>'
        for label, colour, dash in entries
    )
    return f'<p class="legend">{items}</p>'


def _value(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}%" if percent else short(value)


def _frame(marks: Sequence[float], y: Scale, percent: bool) -> list[str]:
    parts = []
    for mark in marks:
        label = f"{100 * mark:g}%" if percent else short(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{label}</text>')
    return parts


def _step_axis(low: float, high: float, x: Scale, axis: str = "step") -> list[str]:
    parts = [
        f'<text x="{x(mark):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(mark)}</text>'
        for mark in whole_ticks(low, high, 6)
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(axis)}</text>']


def _svg(name: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg data-plot="{escape(name)}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">'
        + "".join(parts)
        + "</svg>"
    )
