"""Which checkpoint a run goes on from, what it refuses, and which ones are deleted."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from or1_megatron.architecture import Architecture, read_architecture
from or1_megatron.errors import UserError
from or1_megatron.runstate import RunState, newest, outdated
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return read_architecture(write_tiny_model(tmp_path_factory.mktemp("m") / "model", "llama", tied=True))


def write(directory: Path, step: int, architecture: Architecture) -> RunState:
    state = RunState(step, {}, {}, {}, asdict(architecture), [4, 16])
    folder = directory / f"step-{step:06d}"
    folder.mkdir()
    (folder / "driver.json").write_text(json.dumps(asdict(state)))
    return state


def test_the_newest_complete_one_is_taken(tmp_path: Path, architecture: Architecture):
    write(tmp_path, 9, architecture)
    state = write(tmp_path, 10, architecture)
    (tmp_path / "step-000011").mkdir()  # no driver.json: not complete
    (tmp_path / ".step-000012.partial").mkdir()
    assert newest(tmp_path, architecture, [4, 16]) == (tmp_path / "step-000010", state)
    assert newest(tmp_path, architecture, [4, 16, 64])[1] == state  # a stage added at the end


def test_another_model_or_group_size_is_refused(tmp_path: Path, architecture: Architecture):
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest(tmp_path, architecture, [4, 16])
    write(tmp_path, 3, architecture)
    with pytest.raises(UserError, match=r"another model: num_layers, norm_eps differ"):
        newest(tmp_path, replace(architecture, num_layers=7, norm_eps=0.5), [4, 16])
    with pytest.raises(UserError, match=r"rollout.group_size=\[4, 16\], now it is \[4, 8\]"):
        newest(tmp_path, architecture, [4, 8])


def test_keep_newest_and_every_kth():
    paths = [Path(f"step-{step:06d}") for step in range(10, 70, 10)]
    assert outdated(paths, keep=2, keep_every=0) == paths[:4]
    assert outdated(paths, keep=2, keep_every=30) == [paths[0], paths[1], paths[3]]
    assert outdated(paths, keep=9, keep_every=0) == []
