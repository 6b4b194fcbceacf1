"""launch/ray_cluster.sh over hosts that a stand-in for ssh enters: their namespaces, instead of sshd and keys."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import REPOSITORY, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_long]


def test_start_waits_for_every_gpu_and_stop_leaves_nothing(slurm: SlurmCluster, tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    # Like ssh it gives the words, joined, to a shell over there.
    ssh.write_text('#!/bin/bash\nwhile [[ $1 == -* ]]; do shift 2; done\nhost=$1; shift\nexec ${!host} bash -c "$*"\n')
    ssh.chmod(0o755)
    inside = {name: " ".join(slurm.inside(name)) for name in ("node1", "node2")}
    settings = {**inside, "SSH": str(ssh), "PYTHON": sys.executable, "GPUS": "8", "PORT": "7379"}

    def script(*words: str, **changed: str) -> subprocess.CompletedProcess[str]:
        command = [REPOSITORY / "launch" / "ray_cluster.sh", *words]
        environment = {**os.environ, **settings, "OBJECT_STORE_GB": "1", **changed}
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=200, env=environment)

    failed = script("start", "node1", "node2", PYTHON="/nowhere")
    assert failed.returncode != 0 and "no Python at /nowhere" in failed.stderr
    # A Ray that ended long ago, whose pid is another process now, the first of its group.
    state = f"/tmp/or1-ray-{getpass.getuser()}-7379"
    there = [*slurm.inside("node1"), "bash", "-c"]
    stranger = f"mkdir {state}; setsid sleep 300 >/dev/null 2>&1 & echo $! | tee {state}/pid"
    pid = subprocess.run([*there, stranger], check=True, capture_output=True, text=True).stdout.strip()
    assert script("stop", "node1", "node2").returncode == 0
    subprocess.run([*there, f"test ! -e {state} && kill -KILL {pid}"], check=True)
    try:
        done = script("start", "node1", "node2")
        assert done.returncode == 0 and "Ray has 2 nodes with 16 GPUs" in done.stdout, done.stdout + done.stderr
        assert "OR1_RAY_NODES=2 OR1_RAY_GPUS=16" in done.stdout
        again = script("start", "node1", "node2")
        assert again.returncode != 0 and "not stopped" in again.stderr
    finally:
        assert script("stop", "node1", "node2").returncode == 0
    for name in ("node1", "node2"):
        command = [*slurm.inside(name), "ps", "axo", "args"]
        processes = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "raylet" not in processes and "gcs_server" not in processes
    assert script("start", "node1", "node1").returncode == 2
