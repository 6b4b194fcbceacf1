"""How a checkpoint becomes visible, which one a run goes on from, what it refuses, and which ones are deleted."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from or1_megatron.architecture import Architecture, read_architecture
from or1_megatron.errors import UserError
from or1_megatron.parallel.file_sums import FileSums, file_sum
from or1_megatron.runstate import Checkpoints, RunState, completed, newest, outdated
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return read_architecture(write_tiny_model(tmp_path_factory.mktemp("m") / "model", "llama", tied=True))


class OneFile:
    """An actor of a few bytes, whose file is written when it is told so."""

    def __init__(self, fails: bool = False) -> None:
        self.took: float | None = None
        self._fails = fails

    def begin_save(self, directory: Path) -> None:
        (directory / "metadata.json").write_text("{}")
        self._file = directory / "weights"

    def save_written(self) -> float | None:
        return self.took

    def finish_save(self) -> FileSums:
        if self._fails:
            raise UserError("no space")
        self._file.write_bytes(b"weights" * 100)
        return {"weights": file_sum(self._file)}


def state_after(step: int, architecture: Architecture) -> RunState:
    return RunState(step, {}, {}, {}, asdict(architecture), [4, 16])


def write(directory: Path, step: int, architecture: Architecture, keep: int = 9) -> Path:
    checkpoints = Checkpoints(directory, OneFile(), architecture, keep=keep, keep_every=0)
    checkpoints.begin(state_after(step, architecture))
    checkpoints.finish()
    return directory / f"step-{step:06d}"


def test_a_checkpoint_is_visible_when_it_is_written(tmp_path: Path, architecture: Architecture):
    write(tmp_path, 1, architecture)
    actor = OneFile()
    checkpoints = Checkpoints(tmp_path, actor, architecture, keep=2, keep_every=0)
    for step in (2, 3):
        checkpoints.begin(state_after(step, architecture))
        assert checkpoints.publish_if_written() is None
        # The save before is waited for, this one is not.
        assert [path.name for path in completed(tmp_path)] == [f"step-00000{n}" for n in range(max(1, step - 2), step)]
        assert (tmp_path / "latest").resolve().name == f"step-00000{step - 1}"
    actor.took = 1.5
    assert checkpoints.publish_if_written() == 1.5
    assert checkpoints.publish_if_written() is None, "there is no other"
    assert newest(tmp_path, architecture, [4, 16]).state == state_after(3, architecture)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000002", "step-000003"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path, architecture: Architecture):
    (tmp_path / ".step-000007.123" / "actor").mkdir(parents=True)
    write(tmp_path, 8, architecture)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000008"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, architecture: Architecture):
    checkpoints = Checkpoints(tmp_path, OneFile(fails=True), architecture, keep=2, keep_every=0)
    checkpoints.begin(state_after(1, architecture))
    with pytest.raises(UserError, match="no space"):
        checkpoints.begin(state_after(2, architecture))
    assert list(tmp_path.iterdir()) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "name", "said"),
    [
        (flip, "actor/weights", "the bytes of actor/weights are not those that were written"),
        (cut, "actor/weights", "actor/weights has 699 of 700 bytes"),
        (Path.unlink, "actor/metadata.json", "actor/metadata.json is missing"),
        (flip, "driver.json", "the bytes of driver.json are not those that were written"),
        (cut, "files.json", "files.json cannot be read"),
        (Path.unlink, "files.json", "files.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, architecture: Architecture, harm, name: str, said: str):
    for step in (9, 10):
        write(tmp_path, step, architecture)
    harm(tmp_path / "step-000010" / name)
    found = newest(tmp_path, architecture, [4, 16])
    assert found.state == state_after(9, architecture)
    (line,) = found.set_damaged_aside()
    assert line.startswith(f"{tmp_path}/step-000010 is damaged ({said}); going on from step-000009"), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-000010", "latest", "step-000009"]
    assert (tmp_path / "latest").resolve().name == "step-000009"
    write(tmp_path, 10, architecture)  # the run comes by this step again
    assert newest(tmp_path, architecture, [4, 16]).state.step == 10


def test_only_damaged_ones_cannot_be_resumed(tmp_path: Path, architecture: Architecture):
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest(tmp_path, architecture, [4, 16])
    shutil.rmtree(write(tmp_path, 9, architecture) / "actor")
    with pytest.raises(UserError, match=r"only damaged checkpoints \(step-000009: actor/weights is missing\)"):
        newest(tmp_path, architecture, [4, 16])


def test_another_model_or_group_size_is_refused(tmp_path: Path, architecture: Architecture):
    write(tmp_path, 3, architecture)
    assert newest(tmp_path, architecture, [4, 16, 64]).state.step == 3  # a stage added at the end
    with pytest.raises(UserError, match=r"another model: num_layers, norm_eps differ"):
        newest(tmp_path, replace(architecture, num_layers=7, norm_eps=0.5), [4, 16])
    with pytest.raises(UserError, match=r"rollout.group_size=\[4, 16\], now it is \[4, 8\]"):
        newest(tmp_path, architecture, [4, 8])


def test_keep_newest_and_every_kth():
    paths = [Path(f"step-{step:06d}") for step in range(10, 70, 10)]
    assert outdated(paths, keep=2, keep_every=0) == paths[:4]
    assert outdated(paths, keep=2, keep_every=30) == [paths[0], paths[1], paths[3]]
    assert outdated(paths, keep=9, keep_every=0) == []


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
):
    """Float32 main weights, two moments and the model's own copy: 16 bytes a parameter."""
    needed = 16 * architecture.num_parameters
    free = [needed - 1, needed]
    monkeypatch.setattr("or1_megatron.runstate.shutil.disk_usage", lambda _: SimpleNamespace(free=free.pop(0)))
    with pytest.raises(UserError, match="disk full: a checkpoint needs"):
        write(tmp_path, 1, architecture)
    assert list(tmp_path.iterdir()) == []
    assert write(tmp_path, 1, architecture).is_dir()


def test_a_checkpoint_of_another_version_is_one_line(tmp_path: Path, architecture: Architecture):
    saved = write(tmp_path, 1, architecture)
    driver = saved / "driver.json"
    driver.write_text(driver.read_text().replace('"step"', '"steps_done"'))
    sums = json.loads((saved / "files.json").read_text())
    (saved / "files.json").write_text(json.dumps({**sums, "driver.json": file_sum(driver)}))
    with pytest.raises(UserError, match=r"step-000001 was written by a version of or1_megatron whose driver\.json"):
        newest(tmp_path, architecture, [4, 16])


def test_what_is_there_is_not_written_again(tmp_path: Path, architecture: Architecture):
    before = (write(tmp_path, 3, architecture) / "files.json").stat().st_mtime_ns
    assert (write(tmp_path, 3, architecture) / "files.json").stat().st_mtime_ns == before


def test_all_newer_ones_that_are_damaged_are_set_aside_time_after_time(tmp_path: Path, architecture: Architecture):
    write(tmp_path, 8, architecture)
    for _ in range(2):
        for step in (9, 10):
            cut(write(tmp_path, step, architecture) / "driver.json")
        assert len(newest(tmp_path, architecture, [4, 16]).set_damaged_aside()) == 2
        assert [path.name for path in completed(tmp_path)] == ["step-000008"]


def test_a_write_that_cannot_begin_leaves_nothing(tmp_path: Path, architecture: Architecture):
    class Dead(OneFile):
        def begin_save(self, directory: Path) -> None:
            raise UserError("a rank is dead")

    checkpoints = Checkpoints(tmp_path, Dead(), architecture, keep=2, keep_every=0)
    with pytest.raises(UserError, match="a rank is dead"):
        checkpoints.begin(state_after(1, architecture))
    assert list(tmp_path.iterdir()) == []
