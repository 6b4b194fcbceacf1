"""One process at a time may write in a run folder, and who that is can be asked."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from or1_megatron.driver_lock import driver_of, held
from or1_megatron.errors import UserError
from or1_megatron.parallel.file_sums import take_lock

HOLD = """
import sys
from pathlib import Path

from or1_megatron.driver_lock import held

with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_driver_at_a_time(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"belongs to process {other.pid} on .*; wait for its end, or remove "):
            held(tmp_path).__enter__()
        other.kill()
    with held(tmp_path):
        assert json.loads((tmp_path / "driver.lock").read_text())[1] == os.getpid()


@pytest.mark.parametrize("job", ["71", "72"])
@pytest.mark.parametrize("forgets", [True, False])
def test_a_driver_of_another_host_is_waited_for(
    job: str, forgets: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """What its node left locked the file server forgets at some time; one of the same job is dead if it does not."""
    with ExitStack() as stack, monkeypatch.context() as there:
        there.setenv("SLURM_JOB_ID", "71")
        there.setattr("platform.node", lambda: "node3")
        stack.enter_context(held(tmp_path))
        there.undo()
        monkeypatch.setattr("or1_megatron.driver_lock._LEAVE_S", 0.1)
        wait = time.sleep
        monkeypatch.setattr("or1_megatron.driver_lock.time.sleep", lambda _: stack.close() if forgets else wait(0.2))
        monkeypatch.setenv("SLURM_JOB_ID", job)
        if not forgets and job == "72":
            with pytest.raises(UserError, match="belongs to process .* on node3 of job 71"):
                held(tmp_path).__enter__()
        else:
            with held(tmp_path), (tmp_path / "driver.lock").open("a+") as file:
                assert not take_lock(file), "by this one, or still by the dead node"
                assert json.loads((tmp_path / "driver.lock").read_text())[2] == job
    assert "waiting for process" in (said := capsys.readouterr().err) and "on node3 of job 71" in said


def test_outside_of_slurm_a_driver_of_another_host_is_never_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("or1_megatron.driver_lock._LEAVE_S", -1.0)
    with ExitStack() as stack, monkeypatch.context() as there:
        there.setattr("platform.node", lambda: "node3")
        stack.enter_context(held(tmp_path))
        there.undo()
        with pytest.raises(UserError, match="belongs to process .* on node3"):
            stack.enter_context(held(tmp_path))


def test_who_drives_is_asked_without_taking_the_lock(tmp_path: Path):
    assert driver_of(tmp_path) is None
    lock = tmp_path / "driver.lock"
    lock.write_text(json.dumps(["node3", 5, "71"]))
    assert driver_of(tmp_path) is None, "what is left of one that has ended"
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert driver_of(tmp_path) is None, "another that asks"
        fcntl.flock(file, fcntl.LOCK_EX)
        assert str(driver_of(tmp_path)) == "process 5 on node3 of job 71"


def test_a_driver_that_begins_while_one_asks_is_not_refused(tmp_path: Path):
    """The lock names this host's driver of before, as after any stop and resume."""
    with held(tmp_path):
        pass
    with (tmp_path / "driver.lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (asking, fcntl.LOCK_UN)).start()
        with held(tmp_path):
            pass
