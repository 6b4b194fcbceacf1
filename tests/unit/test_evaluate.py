"""Evaluation in training: each has a line of its own, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from or1_megatron import evaluate
from or1_megatron.accuracy import held_out
from or1_megatron.display import Display
from or1_megatron.evaluate import Evaluator
from or1_megatron.profiling.spans import Spans
from or1_megatron.recipe import from_tree
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
            evaluator.history = held_out(folder.read_metrics())
            for step in steps:
                evaluator.run_if_due(step, display)
        evaluator.run_if_due(4, display, last=True)
    folder.close()
    assert evaluator.history == held_out(folder.read_metrics()) == [(0, 1.0), (2, 1.0), (4, 1.0)]
    assert [row["step"] for row in folder.read_metrics()] == [0, 2, 4]
