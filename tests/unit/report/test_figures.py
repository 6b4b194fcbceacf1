"""What the figures are handed to draw: means, shares, the target, the median step, blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from or1_megatron.profiling.spans import Record, Span
from or1_megatron.profiling.trace import trace_text
from or1_megatron.report import figures
from or1_megatron.report.rundata import read_run
from tests.unit.report.test_report import SECOND, make_run

Drawn = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The arguments behind the title, by title."""
    found: Drawn = {}
    for name in ("line_plot", "bar_plot", "gantt"):

        def draw(title: str, *arguments: Any, **settings: Any) -> str:
            found[title] = arguments, settings
            return "drawn"

        monkeypatch.setattr(figures, name, draw)
    return found


def test_a_target_is_shown_where_a_rule_follows_it(tmp_path: Path, drawn: Drawn):
    run = read_run(make_run(tmp_path, "one"))
    for rule, level in (("paper", 0.2), ("fixed", None)):
        run.folder.config.entropy.rule = rule
        figures.figures([run])
        assert drawn["Entropy"][1]["level"] == level


def test_idle_is_a_share_of_the_step(tmp_path: Path, drawn: Drawn):
    figures.figures([read_run(make_run(tmp_path, "one"))])
    ((lines,), _) = drawn["Idle"]
    assert {line.label: line.points[0] for line in lines} == {"ranks": (1, 0.8), "engines": (1, 0.3)}


def test_bars_are_means_of_neighbouring_steps_and_shares_of_the_responses(
    tmp_path: Path, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(figures, "MOST_BARS", 4)
    figures.figures([read_run(make_run(tmp_path, "one", steps=7))])
    ((bars,), _) = drawn["Seconds of a step"]
    assert list(bars.names) == ["step 1 to 2", "step 3 to 4", "step 5 to 6", "step 7"]
    assert {name: list(heights) for name, _, heights in bars.parts}["rollout"] == pytest.approx([7.0] * 4)
    ((bars,), _) = drawn["Verdicts"]
    shares = {name: list(heights) for name, _, heights in bars.parts}
    assert shares["correct"] == pytest.approx([1.5 / 8, 3.5 / 8, 5.5 / 8, 7 / 8])
    assert [sum(heights) for heights in zip(*shares.values(), strict=True)] == pytest.approx([1.0] * 4)


def test_the_median_step_is_shown_and_only_neighbouring_blocks_are_joined(tmp_path: Path, drawn: Drawn):
    run = read_run(make_run(tmp_path, "one"))
    edges = [0, 30 * SECOND, 40 * SECOND, 44 * SECOND]  # steps of 30, 10 and 4 seconds
    driver = [Span("step", start, end, 0) for start, end in zip(edges, edges[1:], strict=False)]
    tenth = SECOND // 10
    at = [start * tenth + 30 * SECOND for start in (0, 10, 50)]  # the second follows the first at once
    checks = [Span("check", start, start + 10 * tenth, 0) for start in at]
    run.trace = json.loads(trace_text({"driver": Record(driver, [], 0), "verifier0": Record(checks, [], 0)}, {}))
    (figure,) = figures.gantts([run])
    assert figure.remark.startswith("10.0 s, the median of the newest 3 steps")
    rows = dict(drawn["One step of one: who waits for whom, broad"][0][0])
    assert [(block.start, block.end) for block in rows["verifier0"]] == [(0, 2), (5, 6)]
