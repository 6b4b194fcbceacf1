"""Unknown code that wants out, wants everything, or wants a reward it has not earned: see attack_programs.py."""

from __future__ import annotations

import ctypes
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from or1_megatron.reward.isolation import adopt_orphans
from or1_megatron.reward.problem import Task
from or1_megatron.reward.service import RewardService
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Verdict
from tests.unit.reward import attack_programs
from tests.unit.reward.attack_programs import EXHAUST, FORGE, HARM, HARMLESS, LEAVING, TESTS

# What does harm does it at once, and must not pass for slow on a busy machine; what exhausts takes all it is given.
LONG = RewardConfig(num_workers=2, code_timeout_s=4, code_total_s=6, code_memory_mb=512)
SHORT = RewardConfig(num_workers=2, code_timeout_s=0.6, code_total_s=0.9, code_memory_mb=512)
OUTPUT_TESTS = json.dumps({"inputs": [""], "outputs": ["breached"]})
CALL_TESTS = json.dumps({"test_list": TESTS.splitlines()})
CONTAINED = {"wrong", "unparsable", "timeout", "memory", "sandbox_violation"}
TRACES = [Path("/tmp/or1-attack"), Path("/dev/shm/or1-attack")]
NAIVE = "code, tests = {!r}, {!r}\nnames = {{}}\nexec(code, names)\nexec(tests, names)"


@pytest.fixture(scope="module", params=[LONG])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardService]:
    """Whatever it leaves behind would become a child of this process."""
    adopt_orphans()
    before = set(psutil.Process().children(recursive=True))
    with RewardService(request.param, tmp_path_factory.mktemp("logs")) as service:
        assert solve(service, "print('breached')", OUTPUT_TESTS).name == "correct", "the attacks could not be told"
        assert solve(service, SOLVED, CALL_TESTS).name == "correct"
        yield service
        assert solve(service, SOLVED, CALL_TESTS).name == "correct", "the service has suffered"
    time.sleep(0.1)
    left = set(psutil.Process().children(recursive=True)) - before
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
    assert not left
    assert [trace for trace in TRACES if trace.exists()] == []
    for kind in ("shm", "msg"):
        keys = [int(line.split()[0]) for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]]
        assert 0x0A77AC4 not in keys


SOLVED = "def f(x):\n    if isinstance(x, list): return {'n': 1}\n    return x if x < 2 else f(x - 1) + f(x - 2)"


@pytest.fixture
def places(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What the words in the programs stand for; the canary must sing at the end."""
    canary = tmp_path / "canary"
    canary.write_text("sings = True\n")
    mode, when = canary.stat().st_mode, canary.stat().st_mtime
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield words_for(canary, listener)
    assert [canary] == list(tmp_path.iterdir())
    assert (canary.read_text(), canary.stat().st_mode, canary.stat().st_mtime) == ("sings = True\n", mode, when)


def words_for(canary: Path, listener: socket.socket) -> dict[str, str]:
    return {
        "CANARY": str(canary),
        "HOME": str(Path.home()),
        "ITSELF": attack_programs.__file__,
        "PORT": str(listener.getsockname()[1]),
        "PARENT": str(psutil.Process().pid),
    }


def solve(service: RewardService, code: str, tests: str) -> Verdict:
    return service.submit(Task(f"```python\n{code}\n```", (tests,))).result(30)


def all_of(classes: dict[str, dict[str, str]]) -> list[tuple[str, str]]:
    return [(kind, name) for kind, programs in classes.items() for name in programs]


def filled(program: str, places: dict[str, str]) -> str:
    for word, value in places.items():
        program = program.replace(word, value)
    return program


def test_the_harm_is_real(tmp_path: Path) -> None:
    """Outside the sandbox the same programs do reach what they want."""
    canary = tmp_path / "canary"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = words_for(canary, listener)
        kinds = {kind: HARM[kind] for kind in ("processes", "network", "reading", "writing")}
        for kind, name in all_of(kinds):
            canary.write_text("sings = True\n")
            if name not in LEAVING:
                done = subprocess.run(
                    [sys.executable, "-c", filled(HARM[kind][name], words)],
                    capture_output=True, text=True, timeout=20, check=False,
                )  # fmt: skip
                assert "breached" in done.stdout, (name, done.stderr)


def test_the_forgeries_would_pass() -> None:
    """An exit code of 0 after running solution and tests together, as simple harnesses do it."""
    for kind, name in all_of({kind: FORGE[kind] for kind in ("exits", "equality")}):
        program = NAIVE.format(FORGE[kind][name], TESTS)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=20, check=False)
        assert (done.returncode == 0) == (name not in HARMLESS), (name, done.stderr)


@pytest.mark.parametrize(("kind", "name"), all_of(HARM))
def test_no_harm(service: RewardService, places: dict[str, str], kind: str, name: str) -> None:
    verdict = solve(service, filled(HARM[kind][name], places), OUTPUT_TESTS)
    assert verdict.name in CONTAINED - {"unparsable", "timeout"}, verdict


@pytest.mark.parametrize("service", [SHORT], indirect=True)
@pytest.mark.parametrize("name", EXHAUST)
def test_no_exhaustion(service: RewardService, name: str) -> None:
    verdict = solve(service, EXHAUST[name], OUTPUT_TESTS)
    assert verdict.name in CONTAINED and verdict.seconds < 4, verdict


@pytest.mark.parametrize(("kind", "name"), all_of(FORGE))
def test_no_forgery(service: RewardService, kind: str, name: str) -> None:
    verdict = solve(service, FORGE[kind][name], CALL_TESTS)
    assert verdict.name in CONTAINED - {"unparsable"}, verdict
