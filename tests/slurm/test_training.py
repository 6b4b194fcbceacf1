"""The real thing by sbatch: tp over two nodes and the engine on a third take the steps that one machine takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import REPOSITORY, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_long]


def test_same_metrics_as_on_one_machine(slurm: SlurmCluster, recipe: Path, shared: Path) -> None:
    job = slurm.submit(recipe, "--nodes=3", cwd=Path("/"))  # and from another directory
    assert job.await_state("COMPLETED", "FAILED", timeout_s=280) == "COMPLETED", job.log + job.tails()
    local = shared / "local"
    command = [sys.executable, "-m", "or1_megatron", "train", str(recipe), f"run_dir={local}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [(run / "metrics.jsonl").read_text().splitlines() for run in (job.run, local)]
    pairs = [[json.loads(line) for line in lines[:3]] for lines in rows]
    for one, other in zip(*pairs, strict=True):
        one, other = (
            {n: row[n] for n in row if not re.search("second|mfu|latency|idle|memory", n)} for row in (one, other)
        )
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7), "the nodes changed the mathematics"
    assert (job.run / "checkpoints" / "step-000003" / "driver.json").is_file()
