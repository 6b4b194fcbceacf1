"""Evaluation in training: each has a line of its own, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from or1_megatron import evaluate
from or1_megatron.accuracy import held_out
from or1_megatron.display import Display
from or1_megatron.errors import RunFailure
from or1_megatron.evaluate import Evaluator, answers, evaluation_line
from or1_megatron.profiling.spans import Spans
from or1_megatron.recipe import from_tree
from or1_megatron.rollout.engine import SamplingSpec
from or1_megatron.runfolder import RunFolder
from or1_megatron.types import Group, Prompt, Sample


def answer(*arguments: Any) -> list[Group]:
    prompt = Prompt("a", "1 + 1 =", (1,), ("2",))
    sample = Sample(prompt, 0, np.ones(3), np.zeros(3), "2", "stop", 0, "correct", 1.0)
    return [Group(prompt, [sample])]


def test_an_evaluation_is_written_down_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run makes the one after its checkpoint again, since the samples after it depend on that."""
    monkeypatch.setattr(evaluate, "answers", answer)
    evaluation = {"interval": 2, "num_samples": 1}
    tree = {"model": {"path": "/m"}, "run_dir": str(tmp_path / "run"), "evaluation": evaluation, "steps": 4}
    config = from_tree([("t", tree)])
    folder = RunFolder.create(config)
    nothing: Any = None
    with Display(4, "t") as display:
        for steps in ((0, 1, 2), (2, 3)):
            evaluator = Evaluator(config, nothing, nothing, [answer()[0].prompt], Spans(), folder)
            evaluator.history = held_out(folder.metrics.read())
            for step in steps:
                evaluator.run_if_due(step, display)
        evaluator.run_if_due(4, display, last=True)
    folder.metrics.close()
    assert evaluator.history == held_out(folder.metrics.read()) == [(0, 1.0), (2, 1.0), (4, 1.0)]
    assert [row["step"] for row in folder.metrics.read()] == [0, 2, 4]


def test_problems_are_answered_as_the_evaluation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not as training samples them."""
    tree = {
        "model": {"path": "/m"},
        "rollout": {"temperature": 0.3, "top_p": 0.5, "group_size": 16, "max_response_length": 7, "stop": ["x"]},
        "evaluation": {"num_samples": 4, "top_p": 0.9},
    }
    asked = []
    groups = answer()

    def score(*arguments: Any) -> list[Group]:
        asked.append(arguments[3:5])
        return groups

    monkeypatch.setattr(evaluate, "score_groups", score)
    nothing: Any = None
    assert answers(from_tree([("t", tree)]), nothing, nothing, [], 0.6) == groups
    assert asked == [(4, SamplingSpec(temperature=0.6, top_p=0.9, max_response_length=7, stop=("x",)))]
    groups = []
    with pytest.raises(RunFailure, match="none of the 1 groups could be checked"):
        answers(from_tree([("t", tree)]), nothing, nothing, [answer()[0].prompt], 0.6)


def test_the_first_temperature_is_followed_and_all_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([0.0, 1.0, 1.0, 0.0])  # at 0.6 and at 1, before the first step and after the last

    def marked(*arguments: Any) -> list[Group]:
        groups = answer()
        groups[0].samples[0].reward = next(marks)
        return groups

    monkeypatch.setattr(evaluate, "answers", marked)
    evaluation = {"num_samples": 1, "temperatures": [0.6, 1.0]}
    tree = {"model": {"path": "/m"}, "run_dir": str(tmp_path / "run"), "evaluation": evaluation, "steps": 4}
    config = from_tree([("t", tree)])
    folder = RunFolder.create(config)
    nothing: Any = None
    evaluator = Evaluator(config, nothing, nothing, [answer()[0].prompt], Spans(), folder)
    with Display(4, "t") as display:
        evaluator.run_if_due(0, display)
        evaluator.run_if_due(4, display, last=True)
    folder.metrics.close()
    assert evaluator.history == [(0, 0.0), (4, 1.0)]
    assert "accuracy 0.0% -> 100.0%" in evaluation_line("t", evaluator, 4, 1.0, folder.path)
    first, last = folder.metrics.read()
    assert [first[f"eval/T{at}/avg@1"] for at in ("0.6", "1")] == [0.0, 1.0]
    assert [last[f"eval/T{at}/avg@1"] for at in ("0.6", "1")] == [1.0, 0.0]
    assert len(list(folder.evaluations.iterdir())) == 4, "a file of each temperature"
