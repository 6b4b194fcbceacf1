"""train.sbatch from attempt to attempt, with stand-ins for Slurm's commands: when it tries again, and how it asks."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "slurm" / "train.sbatch"

# Each writes down what it was asked, and fails as often as STUBS/fails/NAME says.
ASKED = """#!/bin/bash
name=$(basename "$0")
[ "$name" != scontrol ] || name+=-$1
echo "$name $*" >>"$STUBS/calls"
left=$(cat "$STUBS/fails/$name" 2>/dev/null)
if [ "${left:-0}" -gt 0 ]; then echo $((left - 1)) >"$STUBS/fails/$name"; exit 1; fi
"""
STUBS = {
    "sleep": "#!/bin/bash\nexec /bin/sleep 0.02\n",
    "scontrol": ASKED + '[ "$1" != show ] || tr , "\\n" <<<"$3"\n',
    "squeue": ASKED
    + """case "$*:${SLURM_TIME_FORMAT:-standard}" in
  *%x:*) echo "${STUB_EXCLUDED:-(null)}" ;;
  *%e:standard) echo "${STUB_END:-2030-01-01T00:00:00}" ;;
  *) echo 'Tue 1 tomorrow' ;;
esac
""",
    # The pre-flight is answered by STUB_FIT; the run ends with STUB_CODE and saves step STUB_SAVES, if any.
    "srun": ASKED
    + """run=${*: -2:1} attempt=${*: -1}
env | grep ^OR1_ >"$STUBS/environment"
if [[ $* == *preflight.log* ]]; then
  for node in $STUB_FIT; do echo ok >"$attempt/preflight/$node"; done
  exit "${STUB_PREFLIGHT:-0}"
fi
if [ -n "${STUB_SAVES:-}" ]; then
  mkdir -p "$run/checkpoints/step-$STUB_SAVES" && touch "$run/checkpoints/step-$STUB_SAVES/driver.json"
fi
if [ -n "${STUB_USR1:-}" ]; then kill -USR1 $PPID; /bin/sleep 0.1; fi
[ "$STUB_CODE" != 130 ] || touch "$attempt/stop"
echo "{\\"code\\": $STUB_CODE, \\"reason\\": \\"as told\\"}" >"$attempt/result.json"
exit "$STUB_CODE"
""",
}


class BatchJob:
    """Job 71 of a run folder; every call of `attempt` is one start of it."""

    def __init__(self, folder: Path):
        self.run, self.stubs, self.number = folder / "run", folder / "stubs", 0
        (self.run / "slurm").mkdir(parents=True)
        (self.run / "slurm" / "job.json").write_text("{}")
        (self.stubs / "fails").mkdir(parents=True)
        for name, text in STUBS.items():
            (self.stubs / name).write_text(text)
            (self.stubs / name).chmod(0o755)
        settings = f"RUNS=({self.run}) MAX_RESTARTS=20 PREFLIGHT_S=20 LEAD_S=600 CONTAINER='' MOUNTS='' "
        settings += "PYTHON=python OR1_SHM_MB=1"
        self.script = folder / "train.sbatch"
        self.script.write_text(SCRIPT.read_text().replace("#@SETTINGS@", settings))

    def attempt(self, code: int = 0, saves: int | None = None, nodes: str = "node1,node2", **changed: str) -> str:
        """Starts it once more; what it wrote to `end`."""
        names = nodes.split(",")
        slurm = {"JOB_ID": "71", "JOB_NODELIST": nodes, "JOB_NUM_NODES": str(len(names)), "RESTART_COUNT": self.number}
        environment = {
            **os.environ, "PATH": f"{self.stubs}:{os.environ['PATH']}", "STUBS": str(self.stubs),
            **{f"SLURM_{name}": str(value) for name, value in slurm.items()}, "SLURMD_NODENAME": names[0],
            "STUB_FIT": " ".join(names), "STUB_CODE": str(code),
            "STUB_SAVES": "" if saves is None else f"{saves:06d}", **changed,
        }  # fmt: skip
        subprocess.run(["bash", self.script], env=environment, check=False, capture_output=True, timeout=60)
        end = self.run / "slurm" / "job-71" / f"attempt-{self.number}" / "end"
        self.number += 1
        return end.read_text().strip()

    def calls(self, name: str) -> list[str]:
        return [line for line in (self.stubs / "calls").read_text().splitlines() if line.startswith(name)]

    def fail(self, name: str, times: int) -> None:
        (self.stubs / "fails" / name).write_text(str(times))


@pytest.fixture
def job(tmp_path: Path) -> BatchJob:
    return BatchJob(tmp_path)


def test_failures_between_saves_are_not_in_turn(job: BatchJob) -> None:
    for saves in (100, 200, 300):
        assert job.attempt(code=1) == "requeued as told"
        assert job.attempt(code=130, saves=saves) == f"requeued saved step {saves:06d}"
    for saves in (400, 500, 600):  # saved, and then ended by Slurm: the script had no time to say anything
        assert job.attempt(code=1) == "requeued as told"
        assert job.attempt(code=143, saves=saves).startswith("requeued Slurm ended the tasks")


def test_saves_of_the_same_step_are_given_up(job: BatchJob) -> None:
    job.attempt(code=130, saves=0)
    assert [job.attempt(code=130, saves=0) for _ in range(2)] == ["requeued saved step 000000"] * 2
    end = job.attempt(code=130, saves=0)
    assert end == "1 saved step 000000; not requeued: 3 attempts in turn brought no checkpoint"


def test_who_is_preempted_before_a_save_is_not_given_up(job: BatchJob) -> None:
    """With USR1, as where Slurm sends it; at the end of its time an attempt that saves nothing counts."""
    for _ in range(5):
        assert job.attempt(code=130, STUB_USR1="yes") == "requeued stopped before a first checkpoint"
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 650))
    ends = [job.attempt(code=130, STUB_USR1="yes", STUB_END=soon) for _ in range(3)]
    assert ends[:2] == ["requeued stopped before a first checkpoint"] * 2
    assert ends[2] == "1 stopped before a first checkpoint; not requeued: 3 attempts in turn brought no checkpoint"


def test_a_preflight_that_starts_nowhere_is_tried_again(job: BatchJob) -> None:
    """As when Slurm's controller is busy: no node is to blame."""
    assert job.attempt(STUB_FIT="", STUB_PREFLIGHT="1") == "requeued the pre-flight's srun ended with 1"
    assert not job.calls("scontrol-update") and not (job.run / "slurm" / "job-71" / "bad-nodes").exists()
    assert job.attempt(STUB_FIT="node1").startswith("requeued pre-flight: node2: no answer")
    assert job.calls("scontrol-update")[-1].endswith("ExcNodeList=node2")


def test_a_single_node_that_is_silent_is_left_out(job: BatchJob) -> None:
    job.attempt(nodes="node1", STUB_FIT="", STUB_PREFLIGHT="124")
    assert job.calls("scontrol-update")[-1].endswith("ExcNodeList=node1")


def test_slurm_may_be_away_for_a_moment(job: BatchJob) -> None:
    for name in ("squeue", "scontrol-requeue", "scontrol-update"):
        job.fail(name, 3)
    assert job.attempt(STUB_FIT="node1", STUB_EXCLUDED="node8").startswith("requeued pre-flight")
    assert len(job.calls("scontrol-requeue")) == 4
    assert job.calls("scontrol-update")[-1].endswith("ExcNodeList=node8,node2"), "the user's own stays"


def test_without_an_answer_the_users_nodes_stay_excluded(job: BatchJob) -> None:
    job.fail("squeue", 10**6)
    job.attempt(STUB_FIT="node1", STUB_EXCLUDED="node8")
    assert job.calls("scontrol-requeue") and not job.calls("scontrol-update")


def test_the_end_is_known_whatever_format_the_user_likes(job: BatchJob) -> None:
    job.attempt(SLURM_TIME_FORMAT="relative", TZ="UTC")
    assert "OR1_END=1893456000" in (job.stubs / "environment").read_text().split()


def test_what_srun_is_told(job: BatchJob) -> None:
    """The environment goes along where the site's default is NONE, and the CPUs are there on every node."""
    job.attempt(SLURM_JOB_CPUS_PER_NODE="128(x2),96,112(x3)", SLURM_CPUS_ON_NODE="128", SLURM_EXPORT_ENV="NONE")
    assert len(job.calls("srun")) == 2
    for call in job.calls("srun"):
        assert "--export=ALL" in call and "--cpus-per-task=96" in call
