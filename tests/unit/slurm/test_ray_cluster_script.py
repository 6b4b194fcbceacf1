"""launch/ray_cluster.sh on this machine, with stand-ins for ssh and for the host's Python: a start that fails."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "launch" / "ray_cluster.sh"
SSH = '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift 2; done\nshift\necho "$*" >>"$SEEN/ssh"\nexec bash -c "$*"\n'
# Ray starts and answers, and never has its nodes.
PYTHON = """#!/bin/bash
case "$*" in
  *"scripts start"*) cp "$RAY_AUTH_TOKEN_PATH" "$SEEN/token"; sleep 60 ;;
  *health-check*) until [ -s "$SEEN/token" ]; do sleep 0.1; done ;;
  *) exit 1 ;;
esac
"""


class Host:
    """This machine as the only host."""

    def __init__(self, folder: Path):
        self.seen, self.port = folder, 20000 + os.getpid() % 10000
        self.state = Path(f"/tmp/or1-ray-{getpass.getuser()}-{self.port}")
        for name, text in {"ssh-here": SSH, "python": PYTHON}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(self, python: Path) -> str:
        """A start that has to fail; its stderr."""
        settings = {"SSH": self.seen / "ssh-here", "PYTHON": python, "PORT": self.port, "GPUS": 1, "SEEN": self.seen}
        environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        command = [SCRIPT, "start", "localhost"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode != 0 and not self.state.exists(), done.stderr
        return done.stderr


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    if shutil.which("ip") is None:
        pytest.skip("needs ip: apt-get install iproute2")
    host = Host(tmp_path)
    yield host
    shutil.rmtree(host.state, ignore_errors=True)


def test_a_host_that_cannot_start_is_left_as_it_was(host: Host) -> None:
    for _ in range(2):
        assert host.start(Path("/nowhere")) == "no Python at /nowhere\n"


def test_what_was_started_is_stopped_once(host: Host) -> None:
    said = host.start(host.seen / "python")
    assert said.count("stopping what was started") == 1, said


def test_nobody_sees_the_token_in_a_list_of_processes(host: Host) -> None:
    host.start(host.seen / "python")
    token = (host.seen / "token").read_text()
    assert len(token) == 64 and token not in (host.seen / "ssh").read_text()
