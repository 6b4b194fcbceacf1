"""slurm/preflight as a node runs it: what it finds is in the report, and what an earlier attempt left is ended."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "slurm" / "preflight"


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    attempt = tmp_path / "run" / "slurm" / "job-7" / "attempt-1"
    (attempt / "preflight").mkdir(parents=True)
    return attempt


def report(attempt: Path, **settings: str) -> list[str]:
    environment = {**os.environ, "SLURMD_NODENAME": "node3", "OR1_PORTS": "", "OR1_SHM_MB": "1", **settings}
    subprocess.run([SCRIPT, attempt.parents[2], attempt], check=True, env=environment, timeout=60, capture_output=True)
    return (attempt / "preflight" / "node3").read_text().splitlines()


def test_a_fit_node_says_ok(attempt: Path) -> None:
    assert report(attempt) == ["ok"]
    assert [path.name for path in (attempt / "preflight").iterdir()] == ["node3"], "the canary is gone again"


def test_what_is_wrong_is_said_once_each(attempt: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gpus = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6", "PATH": "/usr/bin:/bin"}
        found = report(attempt, OR1_PORTS=f"1 {port}", OR1_SHM_MB="999999999", **gpus)
    assert found[0] == "node: CUDA_VISIBLE_DEVICES names 7 GPUs, the job has 8"
    assert found[1] == f"node: port {port}, which is this job's, is taken"
    assert found[2].startswith("node: /dev/shm has ") and len(found) == 3


def test_a_wide_range_of_the_kernels_ports_is_a_warning(attempt: Path) -> None:
    wide = 'echo "20000 60999" >/proc/sys/net/ipv4/ip_local_port_range && exec "$@"'
    inside = ["unshare", "--net", "bash", "-c", wide, "-"]
    if subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs leave to make a network namespace with a range of its own")
    environment = {**os.environ, "SLURMD_NODENAME": "node3", "OR1_PORTS": "", "OR1_SHM_MB": "1"}
    command = [*inside, SCRIPT, attempt.parents[2], attempt]
    done = subprocess.run(command, check=True, env=environment, timeout=60, capture_output=True, text=True)
    assert "node3: warning: the kernel hands out ports from 20000 on" in done.stdout
    assert (attempt / "preflight" / "node3").read_text() == "ok\n"


def test_an_earlier_attempt_is_ended_and_nothing_else(attempt: Path) -> None:
    marks = {"stale": attempt.with_name("attempt-0"), "own": attempt, "foreign": Path("/other/slurm/job-8/attempt-0")}
    started = {name: subprocess.Popen(["sleep", "60"], env={"OR1_ATTEMPT": str(mark)}) for name, mark in marks.items()}
    try:
        assert report(attempt) == ["ok"]
        assert {name: process.poll() is None for name, process in started.items()} == {
            "stale": False, "own": True, "foreign": True,
        }  # fmt: skip
    finally:
        for process in started.values():
            process.kill()
            process.wait()
