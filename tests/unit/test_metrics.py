"""metrics.jsonl, TensorBoard and Weights & Biases: the same numbers, and what a resumed run forgets."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from or1_megatron.metrics import Metrics
from or1_megatron.recipe import from_tree

CONFIG = from_tree([("test", {"model": {"path": "/models/tiny"}})])
WATCHED = dataclasses.replace(CONFIG, wandb="p")


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


def test_tensorboard_holds_the_same_numbers_and_forgets_with_rewind(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Metrics(tmp_path, CONFIG)
    for step in (1, 2, 3):
        run.log(step, {"reward/mean": step / 10})
    run.close()
    run = Metrics(tmp_path, CONFIG)
    run.rewind(1)
    run.log(2, {"reward/mean": 0.9})
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("reward/mean")] == [(1, 0.1), (2, 0.9)]


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


def test_metrics_also_go_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Metrics(tmp_path, WATCHED)
    run.log(1, {"reward/mean": 0.5})
    run.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"reward/mean" in file.read_bytes()


class Board:
    """Stands in for the package wandb, of whose runs it keeps the settings and what is logged."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.logged: list[dict] = []
        self.metrics: list[tuple] = []

    def init(self, **settings: Any) -> Board:
        assert settings["resume"] == "allow" and settings["project"] == "p"
        self.ids.append(settings["id"])
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, metrics: dict) -> None:
        self.logged.append(metrics)

    def finish(self) -> None:
        pass


def test_wandb_keeps_what_a_resumed_run_does_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run = Metrics(tmp_path / name, WATCHED)
        for step in (1, 2, 3):
            run.log(step, {"x": step})
        run.close()
        again = Metrics(tmp_path / name, WATCHED)
        again.rewind(1)
        again.log(2, {"x": 2})
        again.close()
    assert board.ids[0] == board.ids[1] != board.ids[2] == board.ids[3], "one run of W&B for each folder"
    assert [line["step"] for line in board.logged] == [1, 2, 3, 2] * 2 and set(board.metrics) == {("*", "step")}
