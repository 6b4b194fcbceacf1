"""What counts as a complete run, what the table says, and that a run which fails ends the study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.entropy_study import RECIPE, Study, complete, table
from or1_megatron.errors import RunFailure, UserError
from or1_megatron.recipe import load
from or1_megatron.runfolder import RunFolder
from tests.unit.benchmarks.test_entropy_claims import results, step


def test_table_has_a_line_per_variant():
    lines = table(results(one=(0.25, 0.5), four=(0.125, 0.1))).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 1 SGD step | 0.375 (0.177) | ")
    assert table(results(one=(0.25,))).splitlines()[2].startswith("| 1 SGD step | 0.250 | ")


def test_complete_runs_are_kept_and_those_of_other_settings_refused(tmp_path: Path):
    paths = ["model.path=m", "data.train=[t]", "evaluation.files=[e]"]

    def config(*words: str):
        return load(RECIPE, [*paths, f"run_dir={tmp_path / 'run'}", "steps=2", *words])

    assert not complete(tmp_path / "run", config())
    folder = RunFolder.create(config())
    file = folder.path / "metrics.jsonl"
    file.write_text(json.dumps(step(2, 0.1)) + "\n")
    assert not complete(folder.path, config())  # stopped before the last evaluation
    file.write_text(json.dumps({"step": 2, "eval/avg@8": 0.5}) + "\n")
    assert complete(folder.path, config())
    with pytest.raises(UserError, match="other settings"):
        complete(folder.path, config("optimizer.lr=1e-6"))


def test_a_failing_run_ends_the_study(tmp_path: Path):
    study = Study(tmp_path, ["false"], 1, quick=True)
    with pytest.raises(RunFailure, match=r"^\[1/2\] 1 SGD step, seed 0 ended with exit code 1"):
        study.run()
    assert not study.folder(study.variants[1], 0).with_suffix(".log").exists()  # the second never began
