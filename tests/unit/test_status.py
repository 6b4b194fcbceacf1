"""`or1 status` and `or1 logs`, with a Slurm that answers as it does: late, with nothing, or not at all."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from pathlib import Path

import pytest

from or1_megatron import cli, status
from or1_megatron.runfolder import RunFolder
from or1_megatron.status import JobState, ask_slurm, status_lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one job: a failed attempt and one that goes on."""
    run = tmp_path / "run"
    for number in (0, 1):
        (run / "slurm" / "job-7" / f"attempt-{number}").mkdir(parents=True)
    (run / "slurm" / "job-7" / "attempt-0" / "end").write_text("requeued node3: no answer\n")
    (run / "slurm" / "job-7" / "attempt-1" / "driver-node1.log").write_text("".join(f"line {i}\n" for i in range(50)))
    (run / "slurm" / "jobs").write_text("7\n")
    (run / "slurm" / "job.json").write_text("{}")
    (run / "config.yaml").write_text("name: tiny\nsteps: 10\n")
    row = {"step": 4, "reward/mean": 0.25, "entropy/signal": 0.5, "tokens_per_second": 123.0, "seconds/step": 30.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n" + '{"step": 5, "rewa')
    (run / "checkpoints" / "step-000004").mkdir(parents=True)
    (run / "checkpoints" / "step-000004" / "driver.json").write_text("{}")
    return run


def answers(monkeypatch: pytest.MonkeyPatch, **said: list[str]) -> None:
    """Slurm's commands, by name: each call takes the next answer; the last one stays."""
    monkeypatch.setattr(status, "_ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(status.shutil, "which", lambda name: name)

    def ask(*words: str) -> str:
        left = said.get(words[0], [""])
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(status, "_ask", ask)


def test_state_step_reward_and_attempts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, squeue=["RUNNING|3:02:11|None\n"])
    text = "\n".join(status_lines(run))
    assert "step      4 of 10; checkpoint after 4; 30.0 s a step, about 3 minutes to go" in text
    assert "reward    0.250, entropy 0.500" in text and "123 tokens/s" in text
    assert "job       7: RUNNING, 3:02:11 to the time limit; attempts 2" in text
    assert "attempt-0: requeued node3: no answer" in text


def test_one_empty_answer_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, squeue=["", "PENDING|1:00:00|BeginTime\n"])
    assert ask_slurm("7") == JobState("PENDING", "1:00:00", "BeginTime")


def test_records_are_asked_when_the_queue_stays_empty(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, scontrol=["JobId=7 JobState=CANCELLED Reason=None\n"])
    assert ask_slurm("7").state == "CANCELLED"
    answers(monkeypatch, scontrol=["JobId=7 JobState=FAILED Reason=None WorkDir=/r Comment=no node is fit StdErr=x\n"])
    assert ask_slurm("7") == JobState("FAILED", "", "no node is fit")
    answers(monkeypatch, sacct=["COMPLETED\n"])
    assert ask_slurm("7").state == "COMPLETED"
    answers(monkeypatch)
    assert "has not said that it ended" in status_lines(run)[-2]
    (run / "slurm" / "job-7" / "attempt-1" / "end").write_text("0 done\n")
    assert "job       7: ended; attempts 2" in status_lines(run)


def test_a_job_is_found_by_its_id(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    answers(monkeypatch, scontrol=[f"JobId=7 JobState=RUNNING WorkDir={run} StdOut=x\n"])
    assert cli.main(["status", "7"]) == 0 and str(run) in capsys.readouterr().out
    assert cli.main(["status", "8"]) == 2 and "job 8" in capsys.readouterr().err
    assert cli.main(["status", str(run.parent)]) == 2 and "is no run folder" in capsys.readouterr().err


def test_a_run_of_an_array(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Slurm has the first run's folder for all of them; a task may also go by the number that it got when it began."""
    other = run.parent / "other"
    (other / "slurm").mkdir(parents=True)
    for number, one in enumerate((other, run)):
        (one / "slurm" / "jobs").write_text(f"5_{number}\n")
    (other / "config.yaml").touch()
    for target, wanted in (("5_1", run), ("5_0", other), ("5", other), ("7", run)):
        answers(monkeypatch, scontrol=[f"JobId=9 WorkDir={other}\n"])
        assert status.find_run(target) == wanted
    assert cli.main(["status", "5_2"]) == 2 and "job 5_2: Slurm knows no run of it" in capsys.readouterr().err
    assert cli.main(["status", "5_"]) == 2 and "neither a run folder nor a job id" in capsys.readouterr().err


def test_logs(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["logs", str(run), "-n", "2"]) == 0
    assert "line 48\nline 49" in (out := capsys.readouterr().out) and "line 47" not in out
    assert cli.main(["logs", str(run), "node1"]) == 0
    capsys.readouterr()
    assert cli.main(["logs", str(run), "driver"]) == 0 and "line 49" in capsys.readouterr().out
    assert cli.main(["logs", str(run), "rank9"]) == 2 and "there are driver-node1" in capsys.readouterr().err


def alone(run: Path) -> Path:
    """The same run without Slurm."""
    shutil.rmtree(run / "slurm")
    return run


def state(run: Path) -> str:
    return next(line for line in status_lines(run) if line.startswith("state"))


def test_who_runs_it_and_how_it_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    alone(run)
    again = f"state     not running; go on with: or1 train --resume {run}"
    assert state(run) == again and "to go" not in "\n".join(status_lines(run)), "nobody has begun"
    with RunFolder(run, None).driven():  # type: ignore[arg-type]
        assert state(run) == f"state     running: process {os.getpid()} on {platform.node()}"
        assert "about 3 minutes to go" in "\n".join(status_lines(run))
    assert state(run) == again and "to go" not in "\n".join(status_lines(run))
    with (run / "metrics.jsonl").open("w") as file:
        file.write('{"step": 10, "seconds/step": 30.0, "seconds/sync": 1.0}\n{"step": 10, "eval/length": 2.0}\n')
    assert state(run) == again, "its last evaluation was cut off"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "seconds/evaluation": 9.0, "seconds/sync": 1.0}\n')
    assert state(run) == "state     complete"
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    assert state(run) == "state     not running; it has no checkpoint to go on from"


def test_without_locks_it_is_not_said_to_stand_still(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    (alone(run) / "driver.lock").touch()

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    assert state(run) == f"state     not known: {run}/driver.lock: Function not implemented"


def test_a_job_that_waits_is_not_to_be_resumed_by_hand(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, squeue=["PENDING|1:00:00|BeginTime\n"])
    text = "\n".join(status_lines(run))
    assert "job       7: PENDING (BeginTime)" in text and "--resume" not in text and "to go" not in text


def test_damaged_files_end_it_with_one_line(run: Path, capsys: pytest.CaptureFixture) -> None:
    for name, content, said in (
        ("config.yaml", b"name: [tiny\nsteps", "config.yaml is not valid YAML"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml is not valid YAML"),
        ("config.yaml", b"- 1\n", "config.yaml holds a list"),
        ("slurm/job.json", b'{"na', "job.json is not JSON"),
    ):
        (run / "config.yaml").write_text("name: tiny\n")
        (run / name).write_bytes(content)
        assert cli.main(["status", str(run)]) == 2
        assert said in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_damaged_metrics_do_not_hide_the_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, squeue=["RUNNING|3:02:11|None\n"])
    with (run / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "seconds/step": 2}\n{"step": 2, "sec\n{"step": 3}\n')
    text = "\n".join(status_lines(run))
    assert f"step      {run}/metrics.jsonl line 2 is no JSON object with a step; remove that line" in text
    assert "job       7: RUNNING" in text


def test_a_recipe_that_waits_for_its_job_inherits(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    (run / "config.yaml").unlink()
    (run / "slurm" / "recipe-1.yaml").write_text("name: parent\nsteps: 20\n")
    (run / "slurm" / "recipe.yaml").write_text("inherits: recipe-1.yaml\nname: child\n")
    assert {"name      child", "step      4 of 20; checkpoint after 4; 30.0 s a step"} < set(status_lines(run))
