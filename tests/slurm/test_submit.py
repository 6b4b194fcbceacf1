"""What submit.py refuses, each in one line and with nothing written; and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.slurm

REFUSED = {
    "too few GPUs": (["--nodes=1"], "needs 2 GPUs, --nodes 1 has 1"),
    "GPUs that nothing uses": (["--nodes=4"], "uses 3 of 4 GPUs; use --nodes 3"),
    "unknown key": (["--nodes=3", "parallel.tpp=2"], "did you mean"),
    "degrees": (["--nodes=3", "parallel.tp=3"], "parallel"),
    "more nodes than there are": (["--nodes=6", "parallel.num_ranks=4", "rollout.num_engines=2"], "has 4 nodes"),
    "partition": (["--nodes=3", "--partition=gpus"], "none of this cluster's: gpu, high"),
    "time above the limit": (["--nodes=3", "--time=3-00:00:00"], "above the limit of partition gpu, 2-00:00:00"),
    "no time": (["--nodes=3", "--time=soon"], "--time soon is no time"),
    "time below the lead": (["--nodes=3", "--time=8"], "less than twice --lead"),
    "node that is not there": (["--nodes=3", "--exclude=node77"], "sbatch: "),
    "chain of one stage": (["--nodes=3", "--chain=stages"], "two stages"),
    "chain of an array": (["--nodes=3", "--chain=stages", "--array"], "exclude each other"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(slurm: SlurmCluster, recipe: Path, shared: Path, words: list[str], said: str) -> None:
    done = slurm.try_submit(recipe, f"--run-dir={shared / 'refused'}", *words)
    assert done.returncode == 2 and said in done.stderr, done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (shared / "refused").exists()
    assert slurm.login("squeue", "-h").stdout == ""


def test_dry_run_prints_plan_and_script(slurm: SlurmCluster, recipe: Path, shared: Path) -> None:
    done = slurm.try_submit(recipe, "--nodes=3", f"--run-dir={shared / 'dry'}", "--dry-run", "--account=a b")
    assert done.returncode == 0, done.stderr
    assert "layout: 2 ranks = tp 2" in done.stdout and "#SBATCH --signal=B:USR1@300" in done.stdout
    assert not (shared / "dry").exists()


def test_a_chain_waits_for_each_stage(slurm: SlurmCluster, recipe: Path) -> None:
    table = "stages=[{until: 2, context_length: 48}, {until: 3}]"
    job = slurm.submit(recipe, "--nodes=3", "--chain=stages", table, "--sbatch=--hold")
    first, second = (job.run / "slurm" / "jobs").read_text().split()
    assert first in job.show("Dependency") and second == job.id
    slurm.login("scancel", first, second)
    assert json.loads((job.run / "slurm" / "job.json").read_text())["steps"] == "3", "for who starts it by hand"
    assert (job.run / "slurm" / "code" / "or1_megatron" / "train.py").is_file()


def test_an_array_has_a_run_for_each_recipe(slurm: SlurmCluster, recipe: Path, shared: Path) -> None:
    other = shared / "other.yaml"
    other.write_text("inherits: recipe.yaml\nname: other\n")
    done = slurm.try_submit(
        recipe, str(other), "--array", "--nodes=3", f"--run-dir={shared / 'array'}", "--sbatch=--hold"
    )
    assert done.returncode == 0, done.stderr
    runs = sorted((shared / "array").iterdir())
    assert [run.name.partition("-")[0] for run in runs] == ["other", "tiny"]
    assert len(slurm.login("squeue", "-h", "-r").stdout.splitlines()) == 2
    ids = [(run / "slurm" / "jobs").read_text().strip() for run in runs]
    assert sorted(id.partition("_")[2] for id in ids) == ["0", "1"]
    slurm.login("scancel", "--me")
