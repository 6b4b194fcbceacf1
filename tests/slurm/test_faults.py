"""What becomes of a job when something happens to it or its nodes; the table in docs/clusters.md says the same.

The driver is a stub that counts steps and saves each, so that "resumed at the right step" is one comparison.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Job, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_long]
TWO_NODES = ("--nodes=2", "rollout.placement=colocated")


@pytest.fixture
def job(slurm: SlurmCluster, recipe: Path):  # noqa: ANN201
    """A stub run on two of the four nodes that has taken two steps."""
    job = slurm.stub(recipe, *TWO_NODES)
    job.await_steps(2)
    yield job
    job.cancel()


def resumed(job: Job) -> None:
    """Another attempt has gone on after the last step of the one before: none lost, none twice."""
    before = len(job.rows())
    job._await(lambda: job.rows()[-1]["attempt"] != "0", "steps of another attempt", 150)
    rows = job.rows()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), rows
    assert before <= sum(row["attempt"] == "0" for row in rows) < len(rows)
    assert int(job.show("Restarts")) >= 1


def left_on(slurm: SlurmCluster, job: Job, names: list[str]) -> list[str]:
    """Marks of the job's processes on these nodes."""
    script = f"cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep -a ^OR1_ATTEMPT={job.run}/"
    return [
        f"{name}: {line}" for name in names for line in slurm.on(name, "bash", "-c", script).communicate()[0].split()
    ]


def nothing_left(slurm: SlurmCluster, job: Job, names: list[str], timeout_s: float = 40) -> None:
    deadline = time.monotonic() + timeout_s
    while (left := left_on(slurm, job, names)) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left, left


def test_the_time_limit_comes_near(slurm: SlurmCluster, recipe: Path) -> None:
    """Slurm's own USR1, a minute (and up to another one) before a limit of three: after the first steps, also where
    Ray takes a minute to start."""
    job = slurm.stub(recipe, *TWO_NODES, "--time=3", "--lead=1")
    job.await_text("requeued", timeout_s=220)
    assert "USR1: asking the run to save and end" in job.log and "saved step" in job.log
    resumed(job)
    job.cancel()


def test_usr1_saves_and_requeues(slurm: SlurmCluster, job: Job) -> None:
    slurm.login("scancel", "--batch", "--signal=USR1", job.id)
    job.await_text("requeued")
    assert "saved step" in job.log
    resumed(job)


def test_scancel_ends_everything(slurm: SlurmCluster, job: Job) -> None:
    names = job.hosts()
    assert left_on(slurm, job, names)
    slurm.login("scancel", job.id)
    assert job.await_state("CANCELLED", "PENDING", "REQUEUED", timeout_s=60) == "CANCELLED"
    nothing_left(slurm, job, names)
    end = job.run / "slurm" / f"job-{job.id}" / "attempt-0" / "end"
    assert end.read_text().startswith("143 ended by Slurm: cancelled")


def test_preemption(slurm: SlurmCluster, job: Job) -> None:
    slurm.login("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--time=1", "--wrap=sleep 3")
    job.await_text("attempt 1")
    resumed(job)


@pytest.mark.parametrize("which", [0, 1], ids=["head", "worker"])
def test_power_cut(slurm: SlurmCluster, job: Job, which: int) -> None:
    victim = job.hosts()[which]
    os.kill(slurm.pid(victim), signal.SIGKILL)
    try:
        resumed(job)
        assert victim not in job.hosts()
    finally:
        slurm.boot(victim)


def test_slurmd_dies_and_leaves_tasks(slurm: SlurmCluster, job: Job) -> None:
    victim = job.hosts()[1]
    inside = slurm.pid(victim)
    os.kill(slurm.pid(victim, "slurmd"), signal.SIGKILL)
    try:
        resumed(job)
        assert victim not in job.hosts()
    finally:
        os.kill(inside, signal.SIGKILL)
        slurm.boot(victim)


def test_a_driver_that_always_fails_is_given_up(slurm: SlurmCluster, recipe: Path) -> None:
    job = slurm.stub(recipe, *TWO_NODES, STUB_FAIL="1")
    assert job.await_state("FAILED", timeout_s=240) == "FAILED"
    assert "3 attempts in turn brought no checkpoint" in job.log and "the stub fails as it was told" in job.log


def test_input_at_fault_is_not_tried_again(slurm: SlurmCluster, recipe: Path) -> None:
    job = slurm.stub(recipe, *TWO_NODES, STUB_FAIL="2")
    job.await_state("FAILED", timeout_s=120)
    assert job.show("Restarts") == "0" and job.show("ExitCode") == "2:0", job.log


def test_a_silent_driver_is_ended(slurm: SlurmCluster, recipe: Path) -> None:
    job = slurm.stub(recipe, *TWO_NODES, "--stall-minutes=0.2", STUB_STEP_S="1000")
    job.await_text("requeued")
    assert "stalled: nothing new in" in job.log
    job.cancel()


def test_a_chain_ends_with_a_stage_that_fails(slurm: SlurmCluster, recipe: Path) -> None:
    table = "stages=[{until: 2, context_length: 48}, {until: 3}]"
    second = slurm.stub(recipe, *TWO_NODES, "--chain=stages", table, STUB_FAIL="2")
    assert second.await_state("CANCELLED", "COMPLETED", "FAILED") == "CANCELLED", second.record()
