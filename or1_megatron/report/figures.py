"""Every figure of the report, as (title, remark, SVG, legend), from one run or several laid over each other.

With one run the colours tell series apart; with several they tell runs apart and dashes the series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from or1_megatron.accuracy import held_out
from or1_megatron.profiling.spans import IDLE
from or1_megatron.report.plots import Bars, Block, Line, bar_plot, gantt, legend, line_plot
from or1_megatron.report.rundata import RunData, decoding_curves, driver_spans, process_names
from or1_megatron.report.scales import Point
from or1_megatron.types import VERDICTS

MOST_BARS = 100
MOST_ROWS = 40  # of a Gantt chart
PARTS = (("rollout", 0), ("update", 1), ("others", 2), ("evaluation", 3))
_COLOURS = {
    "rollout": 0,
    "generate": 0,
    "update": 1,
    "forward_backward": 1,
    "optimizer": 4,
    "evaluation": 3,
    "check": 5,
}


@dataclass(frozen=True)
class Figure:
    """One card of the page. `body` holds SVG."""

    title: str
    remark: str
    body: str
    legend: str = ""
    wide: bool = False


def figures(runs: Sequence[RunData]) -> list[Figure]:
    """Those for which the runs have numbers."""
    found = [
        *_curves(runs),
        *(figure for run in runs for figure in (_time_stack(run, len(runs) > 1), _verdicts(run, len(runs) > 1))),
        _lengths(runs),
    ]
    return [figure for figure in found if figure is not None]


def gantts(runs: Sequence[RunData]) -> list[Figure]:
    """One step of each run that has a trace: the median one of its newest."""
    return [figure for run in runs if (figure := _gantt(run)) is not None]


def _curves(runs: Sequence[RunData]) -> list[Figure | None]:
    return [
        _plot(runs, "Reward", "mean over all responses; dots: held-out accuracy", [("reward/mean", "reward")],
              percent=True, zero=True, evaluations=True),
        _plot(runs, "Entropy", "e_k, nats per token; line: target", [("entropy/signal", "entropy")], zero=True,
              level=_target(runs)),
        _plot(runs, "Entropy control", "c_k and alpha_k", [("entropy/c", "c_k"), ("entropy/alpha", "alpha_k")],
              zero=True),
        _plot(runs, "Response length", "tokens", [("length/mean", "mean"), ("length/max", "longest")], zero=True),
        _plot(runs, "Truncated", "share of the responses cut at the limit", [("truncated", "truncated")], percent=True,
              zero=True),
        _plot(runs, "Groups kept", "informative groups, and all that were rolled out",
              [("groups/kept", "kept"), ("groups/generated", "rolled out")], zero=True),
        _plot(runs, "Clip fraction", "share of tokens whose ratio is clipped; 0 on-policy",
              [("clip_fraction", "clipped")], percent=True, zero=True),
        _plot(runs, "Gradient norm", "before clipping", [("grad_norm", "norm")], zero=True),
        _plot(runs, "Engine against actor", "|difference of log-probs| of the sampled tokens",
              [("mismatch/mean", "mean"), ("mismatch/max", "largest")], zero=True),
        _plot(runs, "Tokens per second", "generated in rollout, trained in update",
              [("tokens_per_second/rollout", "rollout"), ("tokens_per_second/update", "update")], zero=True),
        _plot(runs, "MFU of the update", "share of the peak", [("mfu", "MFU")], percent=True, zero=True),
        _processes(runs, "idle", "Idle", "share of a step in which ranks and engines wait, means"),
        _processes(runs, "memory", "Memory", "high-water mark of the largest rank and engine, GiB"),
    ]  # fmt: skip


def _plot(
    runs: Sequence[RunData],
    title: str,
    remark: str,
    metrics: Sequence[tuple[str, str]],
    *,
    percent: bool = False,
    zero: bool = False,
    level: float | None = None,
    evaluations: bool = False,
) -> Figure | None:
    lines = []
    for number, run in enumerate(runs):
        for index, (metric, label) in enumerate(metrics):
            colour, dash = (number, index) if len(runs) > 1 else (index, 0)
            named = f"{run.name}: {label}" if len(runs) > 1 else label
            lines.append(Line(named, run.series(metric), colour, dash, largest=metric.endswith("/max")))
        if evaluations:
            colour = number if len(runs) > 1 else 1
            label = f"{run.name}: held out" if len(runs) > 1 else "held out"
            lines.append(Line(label, held_out(run.evaluations), colour, dots=True))
    lines = [line for line in lines if line.points]
    picture = line_plot(title, lines, percent=percent, zero=zero, level=level)
    return _card(title, remark, picture, [(line.label, line.colour, line.dash) for line in lines])


def _card(title: str, remark: str, picture: str | None, entries: Sequence[tuple[str, int, int]]) -> Figure | None:
    return None if picture is None else Figure(title, remark, picture, legend(entries))


def _target(runs: Sequence[RunData]) -> float | None:
    rules = {run.folder.config.entropy.rule for run in runs}
    targets = {run.folder.config.entropy.target for run in runs}
    return targets.pop() if len(targets) == 1 and rules <= {"paper", "released"} else None


def _processes(runs: Sequence[RunData], metric: str, title: str, remark: str) -> Figure | None:
    lines = []
    for number, run in enumerate(runs):
        for index, kind in enumerate(("rank", "engine")):
            points: list[Point] = []
            for row in run.steps:
                values = [value for name, value in (row.get(metric) or {}).items() if name.startswith(kind)]
                if values and metric == "idle":
                    points.append((row["step"], sum(values) / len(values) / row["seconds/step"]))
                elif values:
                    points.append((row["step"], max(values) / 2**30))
            colour, dash = (number, index) if len(runs) > 1 else (index, 0)
            lines.append(Line(f"{run.name}: {kind}s" if len(runs) > 1 else f"{kind}s", points, colour, dash))
    lines = [line for line in lines if line.points]
    picture = line_plot(title, lines, percent=metric == "idle", zero=True)
    return _card(title, remark, picture, [(line.label, line.colour, line.dash) for line in lines])


def _bucketed(run: RunData, names: Sequence[str]) -> tuple[list[float], list[str], list[list[float]]]:
    """(x, name, mean values of each metric) of at most MOST_BARS neighbourhoods of steps."""
    size = math.ceil(len(run.steps) / MOST_BARS)
    parts = [run.steps[i : i + size] for i in range(0, len(run.steps), size)]
    xs = [float(part[0]["step"]) for part in parts]
    labels = [f"step {part[0]['step']}" + (f" to {part[-1]['step']}" if len(part) > 1 else "") for part in parts]
    values = [[sum(row.get(name) or 0.0 for row in part) / len(part) for part in parts] for name in names]
    return xs, labels, values


def _time_stack(run: RunData, several: bool) -> Figure | None:
    xs, labels, values = _bucketed(run, [f"seconds/{part}" for part, _ in PARTS])
    stacked = [(part, colour, heights) for (part, colour), heights in zip(PARTS, values, strict=True) if any(heights)]
    title = f"Seconds of a step: {run.name}" if several else "Seconds of a step"
    picture = bar_plot(title, Bars(xs, labels, stacked), unit=" s")
    return _card(title, "as in Table 7 of the paper", picture, [(part, colour, 0) for part, colour, _ in stacked])


def _verdicts(run: RunData, several: bool) -> Figure | None:
    present = [name for name in VERDICTS if run.total(f"verdict/{name}")]
    xs, labels, values = _bucketed(run, [f"verdict/{name}" for name in present])
    totals = [sum(column) or 1.0 for column in zip(*values, strict=True)]
    shares = [[value / total for value, total in zip(row, totals, strict=True)] for row in values]
    colours = {"correct": 2, "wrong": 1, "unparsable": 3, "truncated": 0}
    stacked = [(name, colours.get(name, 4), row) for name, row in zip(present, shares, strict=True)]
    title = f"Verdicts: {run.name}" if several else "Verdicts"
    picture = bar_plot(title, Bars(xs, labels, stacked), percent=True)
    return _card(title, "share of the responses", picture, [(name, colour, 0) for name, colour, _ in stacked])


def _lengths(runs: Sequence[RunData]) -> Figure | None:
    longest = max((max(run.lengths) for run in runs if run.lengths), default=0)
    if not longest:
        return None
    width = max(1, math.ceil(longest / 40))
    count = longest // width + 1
    lines, remarks = [], []
    shares: list[list[float]] = []
    for run in runs:
        heights = [0.0] * count
        for length in run.lengths:
            heights[length // width] += 1 / len(run.lengths)
        shares.append(heights)
        if run.lengths:
            ordered = sorted(run.lengths)
            told = f"mean {sum(ordered) / len(ordered):.0f}, 95 % below {ordered[int(0.95 * (len(ordered) - 1))] + 1}"
            tail = f"; the longest 5 % take {run.tail.share:.0%} of the rollout" if run.tail else ""
            remarks.append((f"{run.name}: " if len(runs) > 1 else "") + told + tail)
    xs = [float(i * width) for i in range(count)]
    title = "Response lengths"
    if len(runs) == 1:
        names = [f"{i * width} to {i * width + width - 1} tokens" if width > 1 else f"{i} tokens" for i in range(count)]
        picture = bar_plot(title, Bars(xs, names, [("share", 0, shares[0])]), percent=True, axis="tokens")
    else:
        lines = [
            Line(run.name, list(zip(xs, heights, strict=True)), number)
            for number, (run, heights) in enumerate(zip(runs, shares, strict=True))
        ]
        picture = line_plot(title, lines, percent=True, zero=True, axis="tokens")
    return _card(title, "; ".join(remarks), picture, [(line.label, line.colour, 0) for line in lines])


def _gantt(run: RunData) -> Figure | None:
    if run.trace is None:
        return None
    steps = sorted(driver_spans(run.trace, "step"), key=lambda step: step[1] - step[0])
    if not steps:
        return None
    start, end = steps[len(steps) // 2]
    seconds = (end - start) * 1e-6
    names = process_names(run.trace)
    rows: dict[str, list[Block]] = {name: [] for name in names.values()}
    for event in run.trace["traceEvents"]:
        name = names.get(event["pid"], "")
        level = 1 if name == "driver" else 0
        if event["ph"] != "X" or event["args"]["level"] != level:
            continue
        left, right = max(event["ts"], start), min(event["ts"] + event["dur"], end)
        if right > left:
            colour = -1 if event["name"] == IDLE else _COLOURS.get(event["name"], 2)
            rows[name].append(Block(event["name"], (left - start) * 1e-6, (right - start) * 1e-6, colour))
    curves: dict[str, list[Point]] = {}
    for name, curve in decoding_curves(run.trace, start, end).items():
        most = max(value for _, value in curve) or 1
        curves[name] = [(at, value / most) for at, value in curve]
    listed = [(name, _joined(blocks, seconds / 500)) for name, blocks in rows.items()][:MOST_ROWS]
    titles = f"One step of {run.name}: who waits for whom"
    body = "".join(
        f'<div class="{kind}">{gantt(f"{titles}, {kind}", listed, curves, seconds, width)}</div>'
        for kind, width in (("broad", 1180), ("narrow", 380))
    )
    remark = (
        f"{seconds:.1f} s, the median of the newest {len(steps)} steps; grey: idle; curve: responses still decoding"
    )
    if len(rows) > len(listed):
        remark += f"; {len(rows) - len(listed)} more processes in trace.json"
    return Figure(titles, remark, body, wide=True)


def _joined(blocks: list[Block], gap: float) -> list[Block]:
    """Blocks of one name that follow each other within `gap` seconds as one: thousands of checks are a few hundred."""
    found: list[Block] = []
    for block in sorted(blocks, key=lambda block: block.start):
        if found and found[-1].name == block.name and block.start - found[-1].end <= gap:
            found[-1] = Block(block.name, found[-1].start, max(found[-1].end, block.end), block.colour)
        else:
            found.append(block)
    return found
