"""The dataset card: a Markdown page with pictures that says what is in a prepared file and how it came there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from or1_megatron.data.prompts import ATTEMPTS
from or1_megatron.errors import UserError
from or1_megatron.parallel.file_sums import publish_text, published
from or1_megatron.prepare import card_plots
from or1_megatron.prepare.step import Row, Table
from or1_megatron.prepare.summary import SourceSummary, StepCounts, Summary, overlaps, summarise

_MOST_FILES = 3  # of a source that are named
_MOST_SAMPLED = 12  # sources of which rows are shown
_MOST_TEXT = 900  # characters of a shown problem
_MOST_ANSWER = 300
_PICTURES: tuple[str, ...] = ("steps", "lengths", "difficulty", "overlaps")


def other_files(path: Path, key: str) -> list[Path]:
    """Which files are there that a card at `path` would replace; none when the card there is that of `key`."""
    there = [file for file in (path, *(_picture(path, name) for name in _PICTURES)) if file.exists()]
    if path.is_file() and path.read_text(errors="replace").endswith(_mark(key)):
        return []
    return there


def _picture(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}-{name}.png")


def _mark(key: str) -> str:
    return f"<!-- or1 prepare {key} -->\n"


def write_card(
    path: Path, title: str, steps: Sequence[StepCounts], table: Table, key: str = "", samples: int = 2
) -> list[Path]:
    """Writes the page and, beside it, its pictures; returns all files, the page first.

    steps: in the order in which they ran. table: the rows that were written. key: of these rows, by which the card
    is known again. samples: rows shown of each source.
    Raises UserError: a name that does not end with .md, a table without rows.
    """
    if path.suffix != ".md":
        raise UserError(f"the card {path} must end with .md")
    if not table.num_rows:
        raise UserError(f"the card {path} would be about no rows; the steps before dropped them all")
    summary, overlapping = summarise(table, samples), overlaps(steps)
    plots = (
        card_plots.steps_plot(steps) if steps else None,
        card_plots.lengths_plot(summary),
        card_plots.difficulty_plot(summary),
        card_plots.overlaps_plot(overlapping) if overlapping else None,
    )
    pictures = dict(zip(_PICTURES, plots, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {name: _picture(path, name) for name, picture in pictures.items() if picture}
    images = {name: f"\n\n![{name}]({file.name})" for name, file in files.items()}
    sections = [
        f"# {title}",
        _opening(summary, table.num_rows),
        "## Sources",
        _sources(summary),
        "## Steps",
        _steps(steps) + images.get("steps", ""),
        "## Lengths",
        _lengths(summary) + images.get("lengths", ""),
        "## Difficulty",
        _difficulty(summary) + images.get("difficulty", ""),
        "## Overlaps",
        _overlaps(overlapping, steps) + images.get("overlaps", ""),
        "## Samples",
        *_samples(summary),
        _mark(key),
    ]
    publish_text(path, "\n\n".join(sections))  # before the pictures: it is what they are known by
    for name, file in files.items():
        with published(file) as temporary:
            temporary.write_bytes(pictures[name] or b"")
    return [path, *files.values()]


def _opening(summary: Summary, num_rows: int) -> str:
    kinds = " and ".join(f"{count:,} {ability}" for ability, count in summary.abilities.most_common())
    licences: Counter[str] = Counter()
    for source in summary.sources.values():
        licences.update(source.licences)
    plural = "s" if len(summary.sources) > 1 else ""
    return (
        f"{num_rows:,} problems ({kinds}) from {len(summary.sources)} source{plural}. Licences: "
        + "; ".join(f"{licence} ({count:,})" for licence, count in licences.most_common())
        + ". Every row names its own licence and origin (`extra_info.licence`, `extra_info.origin`)."
    )


def _sources(summary: Summary) -> str:
    total = sum(source.count for source in summary.sources.values())
    rows = [
        (name, f"{source.count:,}", f"{100 * source.count / total:.1f} %", "; ".join(source.licences), _files(source))
        for name, source in summary.sources.items()
    ]
    return _table(("source", "problems", "share", "licence", "from"), rows)


def _files(source: SourceSummary) -> str:
    named = [f"`{file}`" for file, _ in source.files.most_common(_MOST_FILES)]
    more = len(source.files) - len(named)
    return ", ".join(named) + (f" and {more:,} more" if more else "")


def _steps(steps: Sequence[StepCounts]) -> str:
    if not steps:
        return "No step was counted."
    rows = []
    for step in steps:
        reasons = sorted(step.drops.items(), key=lambda item: (-item[1], item[0]))
        dropped = "; ".join(f"{reason} {count:,}" for reason, count in reasons)
        lost = sum(step.drops.values())
        rows.append((step.name, step.kind, f"{step.rows_in:,}", f"{step.rows_out:,}", f"{lost:,}", dropped))
    return _table(("step", "does", "rows in", "rows out", "dropped", "why"), rows)


def _lengths(summary: Summary) -> str:
    rows = []
    for name, source in summary.sources.items():
        cells = [name]
        for lengths in (source.problem_lengths, source.solution_lengths):
            points = [*np.percentile(lengths, [50, 95]), max(lengths)] if lengths else []
            cells += [" / ".join(f"{point:,.0f}" for point in points) or "-"]
        rows.append((*cells, f"{100 * len(source.solution_lengths) / source.count:.0f} %"))
    return _table(("source", "problem: median / 95 % / most", "solution: the same", "have a solution"), rows) + (
        "\n\nIn characters.\n"
    )


def _difficulty(summary: Summary) -> str:
    if not summary.model_difficulty and not summary.own_difficulty:
        return "No row says how difficult it is."
    parts = []
    if summary.model_difficulty:
        rows = []
        for model, counts in summary.model_difficulty.items():
            ends, total = (counts[0], counts[ATTEMPTS]), counts.total()
            shares = [f"{100 * count / total:.1f} %" for count in (ends[0], total - sum(ends), ends[1])]
            rows.append((model, f"{total:,}", *shares))
        parts.append(_table(("model", "problems", "always_right", "between", "never_right"), rows))
    if summary.own_difficulty:
        rows = [(source, _levels(counts)) for source, counts in summary.own_difficulty.items()]
        parts.append(_table(("source", "difficulty in its own words"), rows))
    return "\n\n".join(parts) + "\n"


def _levels(counts: Counter) -> str:
    numbers = {level: count for level, count in counts.items() if not isinstance(level, str)}
    words = [f"{level} {count:,}" for level, count in counts.most_common() if isinstance(level, str)]
    if numbers:
        values = np.repeat([float(level) for level in numbers], list(numbers.values()))
        words.append(f"{values.min():g} to {values.max():g}, mean {values.mean():.2f}")
    return "; ".join(words)


def _overlaps(found: Counter[tuple[str, str]], steps: Iterable[StepCounts]) -> str:
    if not found:
        return "No step dropped a row because of another one." if steps else "Nothing is known of overlaps."
    rows = [(a, b, f"{count:,}") for (a, b), count in found.most_common()]
    return "Rows dropped because another row says the same.\n\n" + (
        _table(("rows of", "dropped because of rows of", "count"), rows) + "\n"
    )


def _samples(summary: Summary) -> list[str]:
    parts = []
    for source in list(summary.sources)[:_MOST_SAMPLED]:
        parts += [part for row in summary.samples[source] for part in _sample(source, row)]
    left_out = len(summary.sources) - _MOST_SAMPLED
    return [*parts, *([f"{left_out:,} more sources are not shown."] if left_out > 0 else [])]


def _sample(source: str, row: Row) -> list[str]:
    answer = "tests" if row["ability"] == "code" else "answer"
    return [
        f"### {source}: `{row['uid']}`",
        _fenced(_cut(row["problem"], _MOST_TEXT)),
        f"{answer}:",
        _fenced(_cut(row["answer"], _MOST_ANSWER)),
        f"{row['licence'] or 'no licence stated'}; `{row['origin']}`",
    ]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} ... ({len(text):,} characters)"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
