"""What level of isolation this machine gives, to root and to an ordinary user; what happens below the required one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from or1_megatron.errors import UserError
from or1_megatron.reward import isolation
from or1_megatron.reward.preflight import check_rewards, reached_isolation
from or1_megatron.reward.sandbox import Sandbox, SandboxFailed
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Prompt

ROOT = Path(__file__).resolve().parents[3]
# What an attack would show first: does anything of the file system open, does a process start?
PROBE = """
import os, sys
from or1_megatron.reward import code
from or1_megatron.reward.problem import CodeTests
from or1_megatron.reward.sandbox import Sandbox

sandbox = Sandbox(512, bubblewrap=sys.argv[1] == "namespaces")
print(os.getuid(), sandbox.level, sandbox.description)
programs = ["print('yes')", "open('/etc/hostname').read()\\nprint('yes')", "import os\\nos.fork()\\nprint('yes')",
            "import socket\\nsocket.socket()\\nprint('yes')", "import os\\nos.kill(os.getppid(), 9)"]
tests, limits = CodeTests(runs=(("", "yes"),)), code.Limits(2.0, 4.0)
print(*(code.score(f"```python\\n{program}\\n```", tests, sandbox, limits)[0] for program in programs))
"""


def probe_as(*command: str, level: str = "full") -> list[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "-c", PROBE, level],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def has_landlock() -> bool:
    return isolation.landlock_version() > 0 and platform.machine() in ("x86_64", "aarch64")


def usable(command: list[str]) -> bool:
    """Whether it is Python 3.11 or newer, can read the package and start itself again."""
    if not os.path.exists(command[-1]):
        return False
    asks = (
        "import subprocess, sys; import or1_megatron.reward.sandbox; subprocess.run([sys.executable, '-V'], check=True)"
    )
    done = subprocess.run(
        [*command, "-c", asks + "; assert sys.version_info >= (3, 11)"],
        env={"PYTHONPATH": str(ROOT)}, cwd="/", capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode == 0


CONTAINED = "correct wrong sandbox_violation sandbox_violation sandbox_violation"


@pytest.mark.skipif(not has_landlock(), reason="the kernel has no landlock")
def test_full_isolation_as_this_user() -> None:
    found = probe_as(sys.executable)
    assert found[0].startswith(f"{os.getuid()} full landlock ")
    assert found[1] == CONTAINED


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become somebody else")
@pytest.mark.skipif(not has_landlock(), reason="the kernel has no landlock")
def test_full_isolation_as_an_ordinary_user() -> None:
    command = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
    # The interpreter of a virtual environment may lie where only its owner can go; the sandbox needs no package.
    pythons = [path for path in (sys.executable, "/usr/bin/python3") if usable([*command, path])]
    if not pythons:
        pytest.skip("an ordinary user can run no Python 3.11 here, or not read this repository")
    found = probe_as(*command, pythons[0])
    assert found[0].startswith("65534 full landlock ")
    assert found[1] == CONTAINED


def test_less_than_required_is_refused() -> None:
    isolation.require("full", "partial", "")
    for reached, required in (("partial", "full"), ("rlimits", "partial"), ("full", "namespaces")):
        with pytest.raises(UserError, match=f"require_isolation={required}, but this machine reaches {reached} .no x."):
            isolation.require(reached, required, "no x")


@pytest.mark.skipif(shutil.which("bwrap") is not None, reason="bubblewrap is here")
def test_bubblewrap_where_there_is_none() -> None:
    with pytest.raises(UserError, match="install bubblewrap"):
        reached_isolation(RewardConfig(require_isolation="namespaces"))


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_bubblewrap() -> None:
    found = probe_as(sys.executable, level="namespaces")
    assert found == [f"{os.getuid()} namespaces {found[0].split(maxsplit=2)[2]}", CONTAINED]


def test_the_line_before_a_run_names_problems_and_level() -> None:
    code = Prompt("c", "", (), ('{"inputs": ["1"], "outputs": ["1"]}',))
    math = Prompt("m", "", (), ("7",))
    config = RewardConfig(require_isolation="rlimits")
    assert check_rewards(config, [math]) == ""
    assert check_rewards(config, [math, code]).startswith("1 code problems; isolation of tested code: ")
    with pytest.raises(UserError, match="problem bad: .* no test"):
        check_rewards(config, [code, Prompt("bad", "", (), ('{"inputs": [], "outputs": []}',))])


def test_a_dead_fork_server_is_reported() -> None:
    sandbox = Sandbox(512)
    sandbox.close()
    with pytest.raises((SandboxFailed, OSError)):
        sandbox.start("program", [0], 1)


def test_filter_is_whole_and_ends_in_refusal() -> None:
    """Every jump lands inside the program; what no rule names is refused."""
    program = isolation.seccomp_program(1234)
    steps = [program[place : place + 8] for place in range(0, len(program), 8)]
    assert len(steps) < 4096
    for place, step in enumerate(steps):
        code, if_true, if_false = int.from_bytes(step[:2], "little"), step[2], step[3]
        if code in (0x15, 0x35, 0x45):
            assert place + 1 + max(if_true, if_false) < len(steps)
    assert steps[-1] == isolation._ret(0x00050001)
