"""4 to 32 nodes with 8 GPUs, odd names, another's Ray on a node: all GPUs registered and the driver reached."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Job, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_long]


def nodes_of(job: Job) -> list[list]:
    return sorted(json.loads((job.run / "ray_nodes.jsonl").read_text().splitlines()[-1]))


@pytest.mark.parametrize("nodes", [4, 8, 16, 32])
def test_every_gpu_is_registered_and_the_driver_reached(recipe: Path, shared: Path, nodes: int) -> None:
    gpus = nodes * 8
    layout = (f"parallel.num_ranks={gpus}", f"rollout.num_engines={gpus}", "rollout.placement=colocated")
    with SlurmCluster(shared, nodes=nodes, gpus=8) as cluster:
        started = time.monotonic()
        job = cluster.stub(recipe, f"--nodes={nodes}", "--gpus-per-node=8", *layout, steps=1)
        assert job.await_state("COMPLETED", "FAILED", timeout_s=280) == "COMPLETED", job.log + job.tails()
        print(f"{nodes} nodes: {time.monotonic() - started:.0f} s")
        assert nodes_of(job) == sorted([name, 8] for name in cluster.names)


def test_names_that_sort_oddly(recipe: Path, shared: Path) -> None:
    with SlurmCluster(shared, nodes=3, names="node9 node10 node2") as cluster:
        job = cluster.stub(recipe, "--nodes=3", steps=1)
        assert job.await_state("COMPLETED", "FAILED", timeout_s=200) == "COMPLETED", job.log + job.tails()
        assert nodes_of(job) == [["node10", 1], ["node2", 1], ["node9", 1]]


def test_another_users_ray_on_the_node(slurm: SlurmCluster, recipe: Path) -> None:
    """It runs on node1 and the submitting shell names it: the job has a Ray of its own and leaves that one alone."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=6379", "--num-gpus=5", "--block"]
    other = slurm.on("node1", *start, "--include-dashboard=false", "--object-store-memory=100000000")
    try:
        time.sleep(15)
        job = slurm.stub(recipe, "--nodes=3", steps=1, RAY_ADDRESS="10.77.0.11:6379")
        assert job.await_state("COMPLETED", "FAILED", timeout_s=200) == "COMPLETED", job.log + job.tails()
        assert nodes_of(job) == [["node1", 1], ["node2", 1], ["node3", 1]]
        assert other.poll() is None
    finally:
        other.kill()  # its children go with the node
