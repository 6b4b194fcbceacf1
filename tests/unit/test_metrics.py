"""metrics.jsonl: what is written, and what a resumed run forgets. For the boards see test_boards.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from or1_megatron.metrics import Metrics
from or1_megatron.recipe import from_tree

CONFIG = from_tree([("test", {"model": {"path": "/models/tiny"}})])


def test_metrics_are_one_valid_json_line_a_step(tmp_path: Path):
    run = Metrics(tmp_path, CONFIG)
    run.log(1, {"reward/mean": 0.5, "loss": math.nan, "grad_norm": math.inf, "groups/kept": 4, "note": "x"})
    run.log(2, {"step": 2, "reward/mean": 0.75})
    run.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]
    assert strict[0] == {
        "step": 1, "reward/mean": 0.5, "loss": None, "grad_norm": None, "groups/kept": 4, "note": "x",
    }  # fmt: skip
    assert strict[1] == {"step": 2, "reward/mean": 0.75}
    assert run.read() == strict


def test_rewind_drops_later_steps_and_a_torn_line(tmp_path: Path):
    run = Metrics(tmp_path, CONFIG)
    for step in (1, 2, 3):
        run.log(step, {"reward/mean": step / 10})
    run.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    run = Metrics(tmp_path, CONFIG)
    run.rewind(2)
    assert [metrics["step"] for metrics in run.read()] == [1, 2]
    run.log(3, {})
    run.close()
    assert [metrics["step"] for metrics in run.read()] == [1, 2, 3]
