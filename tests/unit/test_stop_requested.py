"""USR1 while a run is not at its steps: it ends as after a step, and not by the signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from or1_megatron import train
from or1_megatron.config import Config
from or1_megatron.errors import StopRequested, UserError, WorkerDied

METRICS = SimpleNamespace(open_boards=lambda: None)
FOLDER = SimpleNamespace(path=Path("/run"), checkpoints=Path("/run/checkpoints"), driven=nullcontext, metrics=METRICS)
CONFIG = SimpleNamespace(reward=None, max_restarts=3, steps=4)
FOUND = SimpleNamespace(path=Path("/run/checkpoints/step-000004"), state=SimpleNamespace(step=4))


def usr1() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run without any; a USR1 that nobody takes is no end of the tests."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    inputs = SimpleNamespace(sources=[], held_out=[], architecture=None)
    monkeypatch.setattr(train, "check_inputs", lambda config: inputs)
    monkeypatch.setattr(train, "check_rewards", lambda reward, problems: "")
    monkeypatch.setattr(train, "group_sizes", lambda config: [])
    monkeypatch.setattr(train, "newest", lambda *words: FOUND)
    monkeypatch.setattr(train, "RunFolder", SimpleNamespace(open=lambda path: FOLDER, create=lambda config: FOLDER))
    yield
    signal.signal(signal.SIGUSR1, before)


def begin(resume: Path | None) -> None:
    train.train(CONFIG, resume)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("resume", [None, Path("/run")])
def test_while_the_run_is_got_ready(monkeypatch: pytest.MonkeyPatch, resume: Path | None) -> None:
    monkeypatch.setattr(train, "check_rewards", lambda reward, problems: usr1())
    monkeypatch.setattr(train, "_attempt", lambda *words: pytest.fail("the run was begun"))
    with pytest.raises(StopRequested, match="before the next step"):
        begin(resume)


def test_between_a_death_and_the_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def attempt(config: Config, *words: object) -> None:
        begun.append(config)
        usr1()
        raise WorkerDied("a rank died", "", [])

    monkeypatch.setattr(train, "_attempt", attempt)
    with pytest.raises(StopRequested, match="--resume /run"):
        begin(Path("/run"))
    assert len(begun) == 1


def test_fewer_steps_than_are_done_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_attempt", lambda *words: pytest.fail("the run was begun"))
    monkeypatch.setattr(CONFIG, "steps", 3)
    with pytest.raises(UserError, match="steps=3 is below step-000004 to go on from; give more steps"):
        begin(Path("/run"))
