"""TensorBoard, Weights & Biases and MLflow: the numbers of metrics.jsonl, and what becomes of a run where one fails."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from or1_megatron.boards import check_boards
from or1_megatron.errors import UserError
from or1_megatron.metrics import Metrics
from or1_megatron.recipe import from_tree

CONFIG = from_tree([("test", {"model": {"path": "/models/tiny"}})])
WATCHED = dataclasses.replace(CONFIG, wandb="p")
TRACKED = dataclasses.replace(CONFIG, mlflow="e")


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


def test_metrics_also_go_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Metrics(tmp_path, WATCHED)
    run.log(1, {"reward/mean": 0.5})
    run.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"reward/mean" in file.read_bytes()


class Wandb:
    """Stands in for the package wandb, of whose runs it keeps the settings and what is logged."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.logged: list[dict] = []
        self.metrics: list[tuple] = []

    def init(self, **settings: Any) -> Wandb:
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
    board = Wandb()
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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's client, which keeps what it is sent in a folder."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/tracked")
    import mlflow

    return mlflow.MlflowClient()


def test_mlflow_holds_the_same_numbers_in_one_run(tmp_path: Path, server: Any) -> None:
    folder = tmp_path / "run-1"
    folder.mkdir()
    run = Metrics(folder, TRACKED)
    run.open_boards()
    for step in (1, 2, 3):
        run.log(step, {"step": step, "reward/mean": step / 10, "loss": math.nan, "idle": {"rank0": 1.0}, "note": "x"})
    run.close()
    (found,) = server.search_runs([server.get_experiment_by_name("e").experiment_id])
    assert found.info.run_name == "run-1" and found.info.status == "FINISHED"
    assert found.data.params["model.path"] == "/models/tiny" and found.data.params["rollout.temperature"] == "1.0"
    assert found.data.metrics == {"reward/mean": 0.3}, "only numbers, and finite ones"
    again = Metrics(folder, TRACKED)
    again.rewind(1)
    again.log(2, {"reward/mean": 0.9})
    assert server.get_run(found.info.run_id).info.status == "RUNNING"
    again.close()
    history = server.get_metric_history(found.info.run_id, "reward/mean")
    assert sorted((one.step, one.value) for one in history) == [(1, 0.1), (2, 0.2), (2, 0.9), (3, 0.3)]
    assert server.get_run(found.info.run_id).info.status == "FINISHED"


def test_a_server_that_is_away_is_refused_at_the_start_and_told_of_later(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no answer\nat all")

    run, said = Metrics(tmp_path, TRACKED), []
    monkeypatch.setattr(run, "message", said.append)
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.set_experiment", away)
        with pytest.raises(
            UserError, match=f"^mlflow=e cannot be opened: no answer; mend its settings, and remove {tmp_path}$"
        ):
            run.open_boards()
        run.log(1, {"x": 1})
        run.log(2, {"x": 2})
    assert said == ["mlflow=e lacks some numbers, metrics.jsonl has them: no answer"]
    run.log(3, {"x": 3})
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.log_batch", away)
        run.log(4, {"x": 4})
    run.log(5, {"x": 5})
    run.close()
    assert len(said) == 2, "once each time"
    (found,) = server.search_runs([server.get_experiment_by_name("e").experiment_id])
    assert sorted(one.step for one in server.get_metric_history(found.info.run_id, "x")) == [3, 5]
    assert [row["step"] for row in run.read()] == [1, 2, 3, 4, 5]


def test_numbers_that_could_not_be_sent_are_told_of(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = Metrics(tmp_path, TRACKED), []
    monkeypatch.setattr(run, "message", said.append)
    run.log(1, {"x": 1})
    (found,) = server.search_runs([server.get_experiment_by_name("e").experiment_id])
    server.delete_run(found.info.run_id)
    run.log(2, {"x": 2})
    run.close()
    assert said and "lacks some numbers" in said[0] and "\n" not in said[0], said


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_board_without_its_package_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, **{name: "there"})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=rf"^{name}=there needs the package {name}: pip install 'or1_megatron\[{name}\]'$"
    ):
        check_boards(config)
    check_boards(CONFIG)
