"""Saving and resuming a run: the actor's checkpoint and the driver's state, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from or1_megatron.architecture import Architecture
from or1_megatron.cluster import Cluster
from or1_megatron.errors import UserError

_DRIVER_FILE = "driver.json"


@dataclass
class RunState:
    """The driver's state after `step` completed steps; plain JSON types only."""

    step: int
    stream: dict[str, Any]
    entropy: dict[str, float]
    stage: dict[str, Any]
    model: dict[str, Any]  # the architecture, to refuse another one on resume
    group_sizes: list[int]  # of all stages, likewise


def save(
    directory: Path, state: RunState, cluster: Cluster, architecture: Architecture, *, keep: int, keep_every: int
) -> Path:
    """Writes checkpoints/step-NNNNNN under a temporary name, renames it when complete, prunes older ones.

    Raises UserError before writing anything when the disk cannot hold it.
    """
    final = directory / f"step-{state.step:06d}"
    if final.exists():
        return final
    needed = architecture.num_parameters * 16  # fp32 main weights and two moments, the model's own copy at most fp32
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"disk full: a checkpoint needs {needed / 1e9:.2f} GB, {directory} has {free / 1e9:.2f} GB free; "
            "free space there, or resume with runs_dir on another disk"
        )
    partial = directory / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "actor").mkdir(parents=True)
    try:
        cluster.save(partial / "actor")
        with (partial / _DRIVER_FILE).open("w") as file:
            json.dump(asdict(state), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in outdated(completed(directory), keep=keep, keep_every=keep_every):
        shutil.rmtree(old)
    return final


def outdated(checkpoints: list[Path], *, keep: int, keep_every: int) -> list[Path]:
    """Those to delete: older than the newest `keep`, and not after a multiple of keep_every steps (0: no such)."""
    return [path for path in checkpoints[:-keep] if not keep_every or int(path.name.removeprefix("step-")) % keep_every]


def completed(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if (path / _DRIVER_FILE).is_file())


def newest(directory: Path, architecture: Architecture, group_sizes: list[int]) -> tuple[Path, RunState]:
    """The newest complete checkpoint. Raises UserError: none there, or of another model or group size."""
    found = completed(directory)
    if not found:
        raise UserError(f"{directory} holds no complete checkpoint; the run cannot be resumed, start it anew")
    state = RunState(**json.loads((found[-1] / _DRIVER_FILE).read_text()))
    if state.model != asdict(architecture):
        differing = [key for key, value in asdict(architecture).items() if state.model.get(key) != value]
        raise UserError(f"{found[-1]} was made with another model: {', '.join(differing)} differ from model.path")
    if any(old != new for old, new in zip(state.group_sizes, group_sizes, strict=False)):
        raise UserError(
            f"{found[-1]} was made with rollout.group_size={state.group_sizes}, now it is {group_sizes} (one per "
            "stage); resume with the same"
        )
    return found[-1], state


def restore(directory: Path, cluster: Cluster, architecture: Architecture, group_sizes: list[int]) -> RunState:
    """Loads the `newest` checkpoint into the actor."""
    path, state = newest(directory, architecture, group_sizes)
    cluster.load(path / "actor")
    return state
