"""Where others look at a run's numbers: TensorBoard, Weights & Biases, MLflow. All of them are in metrics.jsonl.

A board that fails does not end a run, but one that cannot be opened when a run begins is an error of its settings.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from or1_megatron.config import Config
from or1_megatron.errors import UserError
from or1_megatron.parallel.file_sums import publish_text

PACKAGES = ("wandb", "mlflow")  # of the keys, and of the extras, of these names


class Board(Protocol):
    """Of the run in one folder."""

    def log(self, step: int, metrics: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """first: the step from which on a run goes over what was there; None: none was."""

    def __init__(self, folder: Path, first: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The folder's own run; a resumed run goes on with it. The step is a metric among others: W&B's own count only ever
    grows, and drops what a run does again after a resume."""

    def __init__(self, folder: Path, config: Config):
        import wandb  # pyright: ignore[reportMissingImports]  (an extra)

        known = folder / "wandb.id"
        if not known.is_file():  # runs of before had their folder's name
            publish_text(known, folder.name if (folder / "wandb").is_dir() else secrets.token_hex(8))
        settings = {"project": config.wandb, "name": folder.name, "id": known.read_text()}
        self._run: Any = wandb.init(**settings, resume="allow", dir=str(folder), config=dataclasses.asdict(config))
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """The folder's own run, in the experiment that `config.mlflow` names and where MLFLOW_TRACKING_URI says; a resumed
    run goes on with it. Numbers are sent while the run goes on; `log` raises what became of those before. Not for
    MLflow's outdated store of files, where a number `loss` leaves no room for a folder `loss/`."""

    def __init__(self, folder: Path, config: Config):
        # By MLflow's own seven times a server that does not answer would hold the run up for four minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow  # pyright: ignore[reportMissingImports]  (an extra)

        logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # what goes wrong is raised, and told by the run
        self._client: Any = mlflow.MlflowClient()
        self._sent: Any = None
        known = folder / "mlflow.id"
        if known.is_file():
            self._id = known.read_text()
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = mlflow.set_experiment(config.mlflow).experiment_id
        self._id = self._client.create_run(experiment, run_name=folder.name).info.run_id
        publish_text(known, self._id)
        for name, value in leaves(dataclasses.asdict(config)).items():
            self._client.log_param(self._id, name, value, synchronous=False)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        before, now = self._sent, int(time.time() * 1000)
        finite = {name: value for name, value in numbers(metrics).items() if math.isfinite(value)}
        sent = [Metric(name, value, now, step) for name, value in finite.items()]
        self._sent = self._client.log_batch(self._id, metrics=sent, synchronous=False)
        if before:
            before.wait()

    def close(self) -> None:
        try:
            if self._sent:
                self._sent.wait()
        finally:
            self._client.set_terminated(self._id)


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "step" and isinstance(value, int | float)}


def leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """{"rollout.engine_tp": 1, ...}: what stands at the ends of a tree of dictionaries."""
    if not isinstance(tree, dict):
        return {name: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{name}.{key}" if name else key)
    return found


def check_boards(config: Config) -> None:
    """Raises UserError when a board's package is not there."""
    for name in PACKAGES:
        wanted = getattr(config, name)
        if wanted and importlib.util.find_spec(name) is None:
            raise UserError(f"{name}={wanted} needs the package {name}: pip install 'or1_megatron[{name}]'")


class Boards:
    """Those that `config` asks for, of the run in `folder`. Each is opened by `open`, or by the first `log`.

    first: see TensorBoard. tell: where a line for the user goes.
    """

    def __init__(self, folder: Path, config: Config, first: int | None, tell: Callable[[str], None]):
        self._folder, self._tell = folder, tell
        self._makers: dict[str, Callable[[], Board]] = {"tensorboard": lambda: TensorBoard(folder, first)}
        if config.wandb:
            self._makers[f"wandb={config.wandb}"] = lambda: WeightsAndBiases(folder, config)
        if config.mlflow:
            self._makers[f"mlflow={config.mlflow}"] = lambda: MLflow(folder, config)
        self._opened: dict[str, Board] = {}
        self._failing: set[str] = set()

    def open(self) -> None:
        """Raises UserError when a board refuses."""
        for name, make in self._makers.items():
            try:
                self._opened[name] = make()
            except Exception as error:  # whatever a board may raise
                raise UserError(
                    f"{name} cannot be opened: {_first_line(error)}; mend its settings, and remove {self._folder}"
                ) from error

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, make in self._makers.items():
            try:
                if name not in self._opened:
                    self._opened[name] = make()
                self._opened[name].log(step, metrics)
                self._failing.discard(name)
            except Exception as error:
                self._failed(name, error)

    def close(self) -> None:
        for name, board in self._opened.items():
            try:
                board.close()
            except Exception as error:
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        """Says so, once until it works again."""
        if name not in self._failing:
            self._tell(f"{name} lacks some numbers, metrics.jsonl has them: {_first_line(error)}")
        self._failing.add(name)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
