"""The metrics of a run: metrics.jsonl, and the same numbers as TensorBoard's scalars and in Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from or1_megatron.config import Config
from or1_megatron.parallel.file_sums import publish_text
from or1_megatron.runfiles import read_metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Of the run in the folder `path`; `close` it at the end."""

    def __init__(self, path: Path, config: Config):
        self.config = config
        self._path = path
        self._first_step: int | None = None
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends one line {"step": step, ...} and the numbers as tensorboard scalars."""
        line = json.dumps({"step": step, **{name: _finite(value) for name, value in metrics.items() if name != "step"}})
        with self._file.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.config.wandb:
            self._wandb_run().log({"step": step, **metrics})
        writer = self._writer()
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, step)
        writer.flush()

    def read(self) -> list[dict[str, Any]]:
        """See runfiles.read_metrics."""
        return read_metrics(self._path)

    def rewind(self, step: int) -> None:
        """Forgets what is after `step`: the run goes on from there."""
        kept = [metrics for metrics in self.read() if metrics["step"] <= step]
        publish_text(self._file, "".join(json.dumps(metrics) + "\n" for metrics in kept))
        self._first_step = step + 1

    def close(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb:
            self._wandb.finish()
            self._wandb = None

    @property
    def _file(self) -> Path:
        return self._path / "metrics.jsonl"

    def _wandb_run(self) -> Any:
        """The folder's own run; a resumed run goes on with it. The step is a metric among others: W&B's own count
        only ever grows, and drops what a run does again after a resume."""
        if self._wandb is None:
            import wandb  # pyright: ignore[reportMissingImports]  (an extra)

            known = self._path / "wandb.id"
            if not known.is_file():  # runs of before had their folder's name
                publish_text(known, self._path.name if (self._path / "wandb").is_dir() else secrets.token_hex(8))
            settings = {"project": self.config.wandb, "name": self._path.name, "id": known.read_text()}
            self._wandb = wandb.init(
                **settings, resume="allow", dir=str(self._path), config=dataclasses.asdict(self.config)
            )
            self._wandb.define_metric("*", step_metric="step")
        return self._wandb

    def _writer(self) -> SummaryWriter:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._path / "tensorboard"), purge_step=self._first_step)
        return self._tensorboard


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
