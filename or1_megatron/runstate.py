"""A run's checkpoints: written in the background, made visible when whole, checked before a run goes on from one.

    checkpoints/step-000012/     actor/ (Megatron's dist_checkpointing), driver.json, surplus.npz, files.json
    checkpoints/latest           a link to the newest

While it is written a checkpoint has a hidden name. It gets its own, and `latest` moves, when every byte of it is on
the disk: at the next step, the next save or the end of the run, whichever comes first. files.json holds size and
CRC-32 of all other files: a run goes on from the newest checkpoint whose files are what was written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from or1_megatron.architecture import Architecture
from or1_megatron.errors import UserError
from or1_megatron.parallel.file_sums import FileSums, damage, file_sum, sync
from or1_megatron.surplus import read_groups, write_groups
from or1_megatron.types import Group, Prompt

_DRIVER_FILE = "driver.json"
_SURPLUS_FILE = "surplus.npz"
_SUMS_FILE = "files.json"


@dataclass
class RunState:
    """The driver's state after `step` completed steps; plain JSON types, but for the surplus."""

    step: int
    stream: dict[str, Any]
    entropy: dict[str, Any]
    stage: dict[str, Any]
    model: dict[str, Any]  # the architecture, to refuse another one on resume
    group_sizes: list[int]  # of all stages, likewise
    surplus: list[Group] = field(default_factory=list)  # sampled and not yet trained on; `Found.surplus` reads it back


class Actor(Protocol):
    """What a checkpoint is taken from; see cluster/cluster.py."""

    def begin_save(self, directory: Path) -> None: ...
    def save_written(self) -> float | None: ...
    def finish_save(self) -> FileSums: ...


class Checkpoints:
    """The checkpoints of one run. At most one is being written at a time."""

    def __init__(self, directory: Path, actor: Actor, architecture: Architecture, *, keep: int, keep_every: int):
        self._directory, self._actor, self._keep, self._keep_every = directory, actor, keep, keep_every
        self._num_bytes = architecture.num_parameters * 16  # fp32 main weights, two moments, the model's own copy
        self._writing: tuple[RunState, Path] | None = None

    def begin(self, state: RunState) -> None:
        """Has step-NNNNNN written; the run may go on meanwhile. Waits for the checkpoint before.

        Raises UserError before writing anything when the disk cannot hold it, and when the one before failed.
        """
        self.finish()
        if _place(self._directory, state.step).exists():
            return
        free = shutil.disk_usage(self._directory).free
        if free < self._num_bytes:
            raise UserError(
                f"disk full: a checkpoint needs {self._num_bytes / 1e9:.2f} GB, {self._directory} has "
                f"{free / 1e9:.2f} GB free; free space there, or move the run folder elsewhere and resume that"
            )
        for left in self._directory.glob(".step-*"):  # of a run that was killed
            shutil.rmtree(left)
        # No other process writes under this name, not even a writer that outlives a killed run for a moment.
        partial = self._directory / f".step-{state.step:06d}.{os.getpid()}"
        (partial / "actor").mkdir(parents=True)
        try:
            self._actor.begin_save(partial / "actor")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._writing = state, partial

    def publish_if_written(self) -> float | None:
        """Ends a save whose files are there, without waiting; the seconds that they took, None where there is none.
        Raises UserError when they could not be written."""
        seconds = self._actor.save_written() if self._writing else None
        if seconds is not None:
            self.finish()
        return seconds

    def finish(self) -> None:
        """Waits for the files, makes the checkpoint visible, deletes outdated ones. Raises UserError."""
        if self._writing is None:
            return
        (state, partial), self._writing = self._writing, None
        try:
            sums = {f"actor/{name}": value for name, value in self._actor.finish_save().items()}
            _seal(partial, state, sums)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        final = partial.rename(_place(self._directory, state.step))
        _point_latest_to(final)
        for old in outdated(completed(self._directory), keep=self._keep, keep_every=self._keep_every):
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))  # a half-deleted one is never seen


def _seal(partial: Path, state: RunState, sums: FileSums) -> None:
    """Adds the driver's files and files.json, and syncs every file and folder."""
    write_groups(partial / _SURPLUS_FILE, state.surplus)
    plain = {name: value for name, value in vars(state).items() if name != "surplus"}
    (partial / _DRIVER_FILE).write_text(json.dumps(plain))
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        sync(path)
        name = str(path.relative_to(partial))
        if name not in sums:  # the small ones, not written by the ranks' writers
            sums[name] = file_sum(path)
    (partial / _SUMS_FILE).write_text(json.dumps(sums, indent=1))
    sync(partial / _SUMS_FILE)
    sync(partial / "actor")
    sync(partial)


def _point_latest_to(checkpoint: Path) -> None:
    link = checkpoint.with_name(".latest")
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    link.replace(checkpoint.with_name("latest"))
    sync(checkpoint.parent)


def _place(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def outdated(checkpoints: list[Path], *, keep: int, keep_every: int) -> list[Path]:
    """Those to delete: older than the newest `keep`, and not after a multiple of keep_every steps (0: no such)."""
    return [path for path in checkpoints[:-keep] if not keep_every or int(path.name.removeprefix("step-")) % keep_every]


def completed(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if (path / _SUMS_FILE).is_file())


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from, and newer ones that cannot be used."""

    path: Path
    state: RunState
    damaged: dict[Path, str] = field(default_factory=dict)  # what is wrong with each

    def surplus(self, prompts: Mapping[str, Prompt]) -> list[Group]:
        """The groups that its step sampled and did not train on; `prompts` by uid. Raises UserError."""
        return read_groups(self.path / _SURPLUS_FILE, prompts)

    def set_damaged_aside(self) -> list[str]:
        """Renames them, so that the run can come by these steps again; one line for each."""
        lines = []
        for path, what in self.damaged.items():
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            _point_latest_to(self.path)
            lines.append(f"{path} is damaged ({what}); going on from {self.path.name}, it is now {aside.name}")
        return lines


def newest(directory: Path, architecture: Architecture, group_sizes: list[int]) -> Found:
    """The newest sound checkpoint. Raises UserError: none there, or of another model or group size."""
    damaged: dict[Path, str] = {}
    for path in sorted(directory.glob("step-*"), reverse=True):
        what = damage_of(path)
        if not what:
            break
        damaged[path] = what
    else:
        found = "; ".join(f"{path.name}: {what}" for path, what in damaged.items())
        holds = f"only damaged checkpoints ({found})" if damaged else "no complete checkpoint"
        raise UserError(f"{directory} holds {holds}; the run cannot be resumed; remove the folder and start it anew")
    state = _read_state(path)
    if state.model != asdict(architecture):
        differing = [key for key, value in asdict(architecture).items() if state.model.get(key) != value]
        raise UserError(f"{path} was made with another model: {', '.join(differing)} differ from model.path")
    if any(old != new for old, new in zip(state.group_sizes, group_sizes, strict=False)):
        raise UserError(
            f"{path} was made with rollout.group_size={state.group_sizes}, now it is {group_sizes} (one per "
            "stage); resume with the same"
        )
    return Found(path, state, damaged)


def _read_state(checkpoint: Path) -> RunState:
    try:
        return RunState(**json.loads((checkpoint / _DRIVER_FILE).read_text()))
    except TypeError:
        raise UserError(
            f"{checkpoint} was written by a version of or1_megatron whose {_DRIVER_FILE} holds other entries; resume "
            "with that version"
        ) from None


def damage_of(checkpoint: Path) -> str:
    """What is wrong with its files, in words; empty: nothing."""
    try:
        sums = json.loads((checkpoint / _SUMS_FILE).read_text())
    except (OSError, ValueError):
        return f"{_SUMS_FILE} cannot be read"
    return damage(checkpoint, sums)
