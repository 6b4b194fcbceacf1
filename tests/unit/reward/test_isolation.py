"""What level of isolation this machine gives, to root and to an ordinary user; what happens below the required one."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import psutil
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

# Without landlock any file of the same user opens, unless the kernel says that its owner is nobody's equal.
SNOOP = """
import os, socket, sys
from or1_megatron.reward import code, sandbox, worker
from or1_megatron.reward.problem import CodeTests

serve = "forkserver.serve"
sandbox._BOOT = sandbox._BOOT.replace(serve, "forkserver.isolation.landlock_version = int; " + serve)
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
verifier = os.fork()
if not verifier:
    ours.close()
    worker.math.warm_up = int
    worker.main(theirs, {})
ours.recv(100)
here = sandbox.Sandbox(512)
files = ["'/etc/hostname'", "f'/proc/{os.getppid()}/mem'", f"'/proc/{verifier}/mem'"]
programs = [f"import os\\nopen({file}, 'rb')\\nprint('yes')" for file in files]
tests, limits = CodeTests(runs=(("", "yes"),)), code.Limits(2.0, 4.0)
print(os.getuid(), here.level)
print(*(code.score(f"```python\\n{program}\\n```", tests, here, limits)[0] for program in programs))
"""


def probe_as(*command: str, level: str = "full", probe: str = PROBE) -> list[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "-c", probe, level],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def ordinary_python() -> list[str]:
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
    # The interpreter of a virtual environment may lie where only its owner can go; the sandbox needs no package.
    pythons = [path for path in (sys.executable, "/usr/bin/python3") if usable([*command, path])]
    if not pythons:
        pytest.skip("an ordinary user can run no Python 3.11 here, or not read this repository")
    return [*command, pythons[0]]


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
    found = probe_as(*ordinary_python())
    assert found[0].startswith("65534 full landlock ")
    assert found[1] == CONTAINED


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become somebody else")
def test_without_landlock_the_memory_that_holds_tests_stays_closed() -> None:
    found = probe_as(*ordinary_python(), probe=SNOOP)
    if found[0] != "65534 partial":
        pytest.skip("the kernel has no seccomp")
    assert found[1] == "correct wrong wrong"


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


def test_bubblewrap_that_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    before = psutil.Process().children()  # of other tests
    with pytest.raises(UserError, match="the sandbox of tested code does not start here, as said above; allow"):
        reached_isolation(RewardConfig(require_isolation="namespaces"))
    assert set(psutil.Process().children()) <= set(before)


def test_the_line_before_a_run_names_problems_and_level() -> None:
    code = Prompt("c", "", (), ('{"inputs": ["1"], "outputs": ["1"]}',))
    math = Prompt("m", "", (), ("7",))
    config = RewardConfig(require_isolation="rlimits")
    assert check_rewards(config, [math]) == ""
    assert check_rewards(config, [math, code]).startswith("1 code problems; isolation of tested code: ")
    with pytest.raises(UserError, match="^a.jsonl line 2: .* no test"):
        check_rewards(
            config, [code, Prompt("a.jsonl:1", "", (), ('{"inputs": [], "outputs": []}',), "", "a.jsonl line 2")]
        )


def test_a_dead_fork_server_is_reported() -> None:
    sandbox = Sandbox(512)
    sandbox.close()
    with pytest.raises((SandboxFailed, OSError)):
        sandbox.start("program", [0], 1)


CPU_AND_STACK = (0, 3)  # of setrlimit, on every machine


def ruling(program: bytes, call: int, *arguments: int) -> int:
    """What the kernel would find by this filter."""
    words = dict(enumerate((call, isolation._AUDIT_ARCH[platform.machine()], 0, 0)))
    for place, argument in enumerate((*arguments, *[0] * (6 - len(arguments)))):
        words[4 + 2 * place], words[5 + 2 * place] = argument & 0xFFFFFFFF, argument >> 32
    place, held = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("HBBI", program, 8 * place)
        if code == 0x06:
            return value
        if code == 0x20:
            held = words[value // 4]
        met = {0x15: held == value, 0x35: held >= value, 0x45: held & value}.get(code, False)
        place += 1 + (value if code == 0x05 else 0 if code == 0x20 else if_true if met else if_false)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_rules_every_call_as_listed(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    program = isolation.for_process(isolation.seccomp_program(isolation._NO_PID), 1234)
    assert program == isolation.seccomp_program(1234) and len(program) < 8 * 4096
    column = list(isolation._AUDIT_ARCH).index(machine)
    allowed, killed = (set(isolation._numbers(table, column)) for table in (isolation._ALLOWED, isolation._KILLED))
    by_argument = {
        table[machine] for table in (isolation._CLONE, isolation._TGKILL, isolation._PRLIMIT, isolation._SETRLIMIT,
        isolation._OPEN, isolation._OPENAT, isolation._FCNTL, isolation._IOCTL, isolation._PRCTL)
    }  # fmt: skip
    assert not allowed & killed and not by_argument & (allowed | killed)
    refused, death, may = isolation._RET_ERRNO, isolation._RET_KILL, isolation._RET_ALLOW
    for call in {*range(1000), 0x3FFFFFFF} - by_argument - {isolation._CLONE3}:
        expected = may if call in allowed else death if call in killed else refused | isolation._EPERM
        assert ruling(program, call) == expected, call
    tgkill, prlimit, openat = isolation._TGKILL[machine], isolation._PRLIMIT[machine], isolation._OPENAT[machine]
    assert [ruling(program, tgkill, *who) for who in ((1234, 1, 6), (1235, 1, 6), (1234, 1, 9))] == [may, death, death]
    assert [ruling(program, prlimit, who) for who in (0, 1234, 1)] == [may, may, death]
    never = refused | isolation._EPERM
    for new, verdict in ((0, may), (1, never), (1 << 32, never)):
        assert [ruling(program, prlimit, 0, limit, new) for limit in CPU_AND_STACK] == [verdict, may]
    assert [ruling(program, isolation._SETRLIMIT[machine], limit, 1) for limit in CPU_AND_STACK] == [never, may]
    assert [ruling(program, openat, 3, 0, how) for how in (os.O_RDONLY, os.O_RDWR)] == [
        may,
        refused | isolation._EACCES,
    ]
    assert [ruling(program, isolation._CLONE[machine], flags) for flags in (0x10F00, 17)] == [may, death]
