"""Nodes that are not fit, and folders that cannot be written: named at the pre-flight, and left out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Job, SlurmCluster

pytestmark = pytest.mark.slurm
TWO_NODES = ("--nodes=2", "rollout.placement=colocated")


def goes_on_without(job: Job, bad: str, words: str) -> None:
    job.await_text(" attempt 1: nodes", 60)
    first, second = (line for line in job.log.splitlines() if "attempt" in line and ": nodes " in line)
    assert bad in first.split() and f"{bad}: {words}" in job.log, job.log
    assert bad not in second.replace(",", " ").split(), second
    assert bad in (job.run / "slurm" / f"job-{job.id}" / "bad-nodes").read_text()
    job.cancel()


def test_a_node_with_7_gpus_is_left_out(recipe: Path, shared: Path) -> None:
    """nvidia-smi as a node's driver answers: seven on node1, eight elsewhere."""
    tool = shared / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    count = '$([ "$SLURMD_NODENAME" = node1 ] && echo 7 || echo 8)'
    tool.write_text(f'#!/bin/bash\n[ "$1" = -L ] || exit 0\nfor i in $(seq {count}); do echo "GPU $i: H800"; done\n')
    tool.chmod(0o755)
    with SlurmCluster(shared, nodes=3, gpus=8) as cluster:
        options = ("--nodes=2", "--gpus-per-node=8", "parallel.num_ranks=16", "rollout.num_engines=16")
        path = f"{tool.parent}:{os.environ['PATH']}"
        job = cluster.stub(recipe, *options, "rollout.placement=colocated", PATH=path)
        goes_on_without(job, "node1", "nvidia-smi shows 7 GPUs, the job has 8")


@pytest.mark.slurm_long
def test_a_busy_port(slurm: SlurmCluster, recipe: Path) -> None:
    job = slurm.stub(recipe, *TWO_NODES, "--sbatch=--hold")
    port = 12000 + int(job.id) % 100 * 200 + 2
    listen = f"import socket, time; s = socket.create_server(('', {port})); time.sleep(60)"
    other = slurm.on("node1", sys.executable, "-c", listen)
    try:
        slurm.login("scontrol", "release", job.id)
        goes_on_without(job, "node1", f"port {port}, which is this job's, is taken")
    finally:
        other.kill()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slurm_long
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_shared_folder_that_cannot_be_written(recipe: Path, shared: Path, small: Path, how: str) -> None:
    """Submitted while it was well. The job ends or is held, and Slurm can tell why; no Ray is started."""
    with SlurmCluster(shared, nodes=2, also=small) as cluster:
        job = cluster.stub(recipe, *TWO_NODES, "--sbatch=--hold", run=small / "run")
        if how == "full":
            subprocess.run(["dd", "if=/dev/zero", f"of={small / 'filler'}"], check=False, capture_output=True)
        else:
            subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        cluster.login("scontrol", "release", job.id)
        job.await_state("FAILED", timeout_s=60)
        assert not list(small.glob("run/slurm/job-*/attempt-*/ray-*"))
        if how == "full":
            assert "cannot be written from node1; nothing was started" in job.record()
        else:
            assert job.show("Reason") == "JobLaunchFailure"  # Slurm itself cannot open the log
