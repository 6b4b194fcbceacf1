"""The run folder: complete or absent, never overwritten, and resumable from what it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from or1_megatron.config import Config
from or1_megatron.errors import UserError
from or1_megatron.recipe import load
from or1_megatron.runfolder import RunFolder, git_state
from or1_megatron.types import Group, Prompt, Sample


def make_config(tmp_path: Path, *overrides: str) -> Config:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {path: /models/tiny}\nrollout: {context_length: 1024}\n")
    return load(recipe, [f"runs_dir={tmp_path / 'runs'}", *overrides])


def make_groups() -> list[Group]:
    prompt = Prompt("gsm8k/7", "2 + 5 =", (1, 2, 3), ("7",), "gsm8k")
    samples = [
        Sample(prompt, 0, np.array([4, 5]), np.array([-0.1, -0.2]), " 7\n", "stop", 3, "correct", 1.0),
        Sample(prompt, 1, np.array([4, 5, 6]), np.full(3, -0.1), " ünd\u2028so", "length", 3, "wrong", 0.0),
    ]
    return [Group(prompt, samples)]


def test_create_writes_everything_and_open_finds_it(tmp_path: Path):
    config = make_config(tmp_path, "name=trial", "steps=3")
    run = RunFolder.create(config)
    assert run.path.parent == tmp_path / "runs" and run.path.name.startswith("trial-20")
    assert run.logs.is_dir() and run.checkpoints.is_dir() and run.rollouts.is_dir()
    versions = json.loads((run.path / "versions.json").read_text())
    assert versions["python"].startswith("3.") and "torch" in versions
    assert RunFolder.open(run.path).config == config
    assert not list(run.path.rglob("*.tmp"))


def test_lengths_of_the_history_come_back_up_to_a_step(tmp_path: Path):
    run = RunFolder.create(make_config(tmp_path))
    for step in (1, 2, 3):
        run.save_history(step, make_groups())
    old = run.history / "step-000002.parquet"  # of a version that did not note tokens
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(old).drop_columns(["tokens"]), old)
    assert list(run.read_lengths(3)) == [("gsm8k/7", 5, 2)] * 2
    assert list(run.read_lengths(2)) == [("gsm8k/7", 5, 2)]


def test_a_name_that_is_no_folders(tmp_path: Path):
    with pytest.raises(UserError, match="name='Qwen/Qwen2' is part of the run folder's name"):
        RunFolder.create(make_config(tmp_path, "name=Qwen/Qwen2"))
    assert RunFolder.create(make_config(tmp_path, "name=Qwen/Qwen2", f"run_dir={tmp_path / 'run'}")).path.is_dir()


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path):
    config = make_config(tmp_path)
    assert len({RunFolder.create(config).path for _ in range(3)}) == 3


def test_a_given_folder_must_be_free(tmp_path: Path):
    mine = tmp_path / "my run"
    config = make_config(tmp_path, f"run_dir={mine}")
    mine.mkdir()
    for name, said in (
        ("notes.txt", "not empty; choose another$"),
        ("config.yaml", "not empty; choose another, or remove it: its run has no checkpoint"),
        ("checkpoints/step-000001", "not empty; choose another, or go on with `or1 train --resume '.*/my run'`"),
    ):
        (mine / name).mkdir(parents=True) if name.startswith("checkpoints") else (mine / name).touch()
        before = sorted(path.name for path in mine.iterdir())
        with pytest.raises(UserError, match=said):
            RunFolder.create(config)
        assert sorted(path.name for path in mine.iterdir()) == before
    assert RunFolder.create(make_config(tmp_path, f"run_dir={tmp_path / 'other'}")).path == tmp_path / "other"


@pytest.mark.parametrize("key", ["run_dir", "runs_dir"])
def test_a_file_in_the_way_is_named(tmp_path: Path, key: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{key}=.*file.*choose another"):
        RunFolder.create(make_config(tmp_path, f"{key}={tmp_path / 'file' / 'below'}"))


def test_to_open_a_folder_writes_nothing(tmp_path: Path):
    made = RunFolder.create(make_config(tmp_path))
    made.rollouts.rmdir()
    RunFolder.open(made.path)
    assert not made.rollouts.exists()


def test_open_wants_a_run_folder(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        RunFolder.open(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="run folder .*file is a file; give the directory"):
        RunFolder.open(tmp_path / "file")
    with pytest.raises(UserError, match="holds no config.yaml"):
        RunFolder.open(tmp_path)


def test_overrides_of_a_resumed_run_can_be_kept(tmp_path: Path):
    run = RunFolder.create(make_config(tmp_path, "steps=3"))
    run.save_config(load(run.path / "config.yaml", ["steps=5"]))
    assert RunFolder.open(run.path).config.steps == run.metrics.config.steps == 5


def test_rollouts_hold_every_response(tmp_path: Path):
    run = RunFolder.create(make_config(tmp_path))
    path = run.save_rollouts(12, make_groups())
    assert path == run.rollouts / "step-000012.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [row["response"] for row in rows] == [" 7\n", " ünd\u2028so"]
    assert rows[0] == {
        "step": 12, "uid": "gsm8k/7", "data_source": "gsm8k", "index": 0, "prompt": "2 + 5 =", "response": " 7\n",
        "ground_truth": ["7"], "reward": 1.0, "verdict": "correct", "finish_reason": "stop", "truncated": False,
        "length": 2, "weight_version": 3,
    }  # fmt: skip
    assert pyarrow.parquet.read_table(run.save_rollouts(13, [])).schema == pyarrow.parquet.read_table(path).schema


def test_a_full_disk_leaves_no_half_file(tmp_path: Path):
    run = RunFolder.create(make_config(tmp_path))
    before = (run.path / "config.yaml").read_text()
    script = (
        "import resource, signal, sys\n"
        "from or1_megatron.runfolder import RunFolder\n"
        "run = RunFolder.open(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "run.save_config(run.config)\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script, str(run.path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "File too large" in done.stderr
    assert (run.path / "config.yaml").read_text() == before
    assert not list(run.path.rglob("*.tmp"))


def test_git_state_of_a_checkout_and_outside_of_one(tmp_path: Path):
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_state(tmp_path) is None  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    state = git_state(tmp_path)
    assert state and len(state["commit"]) == 40 and not state["dirty"]
    (tmp_path / "new").write_text("")
    state = git_state(tmp_path)
    assert state and state["dirty"]


def test_the_history_is_that_of_the_verdicts_from_the_first_step_to_the_last(tmp_path: Path):
    run = RunFolder.create(make_config(tmp_path))
    groups = make_groups()
    groups[0].samples[0].reward = 0.0  # what counts as right is the verdict
    for step in (1, 2, 3):
        run.save_history(step, groups)
    assert run.read_history(2, 3) == [("gsm8k/7", 2, 1)] * 2
    assert pyarrow.parquet.read_table(run.history / "step-000001.parquet")["truncated"].to_pylist() == [1]
    with pytest.raises(UserError, match=r"step-000004.parquet is gone"):
        run.read_history(3, 4)


def test_history_that_was_cut_is_named(tmp_path: Path):
    run = RunFolder.create(make_config(tmp_path))
    run.save_history(1, make_groups())
    file = run.history / "step-000001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{file} cannot be read: .*; copy it anew, or remove it"):
        run.read_history(1, 1)
    run.save_history(2, make_groups())
    assert list(run.read_lengths(2)) == [("gsm8k/7", 5, 2)], "a resume does not end for want of lengths"


def test_folders_of_one_second_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("or1_megatron.runfolder.time.strftime", lambda _: "now")
    config = make_config(tmp_path, "name=a")
    assert [RunFolder.create(config).path.name for _ in range(3)] == ["a-now", "a-now-2", "a-now-3"]


def test_a_folder_may_hold_what_slurm_was_given(tmp_path: Path):
    (tmp_path / "mine" / "slurm").mkdir(parents=True)
    assert RunFolder.create(make_config(tmp_path, f"run_dir={tmp_path / 'mine'}")).path == tmp_path / "mine"
