"""kill -9 at random moments: no checkpoint that was visible is lost, and every resume goes on bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from or1_megatron.architecture import read_architecture
from or1_megatron.recipe import from_tree
from or1_megatron.runstate import newest
from or1_megatron.types import Prompt
from tests.parallel import ranks_kill
from tests.parallel.gloo import run_ranks
from tests.tiny_models import write_tiny_model

NUM_KILLS = 36


def kill_later(folder: Path, draw: random.Random) -> threading.Thread:
    """Kills one rank or both: up to 0.3 s after the next, the second or the third step, or after the start."""
    victims = draw.choice([[0], [1], [0, 1]])
    steps, delay = draw.randrange(4), draw.uniform(0.0, 0.3)
    before = num_steps(folder)

    def kill() -> None:
        files = [folder / f"pid{rank}" for rank in range(2)]
        deadline = time.monotonic() + 50
        while not all(file.is_file() and file.read_text() for file in files) or num_steps(folder) < before + steps:
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.005)
        time.sleep(delay)
        for rank in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(files[rank].read_text()), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def num_steps(folder: Path) -> int:
    path = folder / "losses"
    return path.read_text().count("\n") if path.exists() else 0


def test_kills_lose_no_checkpoint_and_resume_exactly(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "llama", tied=True)
    tree = {
        "model": {"path": str(model), "dtype": "fp32"},
        "parallel": {"num_ranks": 2},
        "rollout": {"context_length": 32},
    }
    config, architecture = from_tree([("test", tree)]), read_architecture(model)
    draw = random.Random(0)
    prompts = [Prompt(f"p{i}", "", tuple(draw.choices(range(256), k=12)), ("1",)) for i in range(50)]
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    interrupted, resumed_from = 0, []
    for kill in range(NUM_KILLS):
        killer = kill_later(tmp_path, draw)
        with pytest.raises(RuntimeError, match=r"rank \d died"):
            run_ranks(2, ranks_kill.train, config, prompts, tmp_path, kill % 2 == 0, timeout_s=60)
        killer.join()
        for rank in range(2):
            (tmp_path / f"pid{rank}").unlink()
        interrupted += any(directory.glob(".step-*"))
        promised = [line for line in (tmp_path / "promised").read_text().split("\n")[:-1] if line]
        if promised:
            found = newest(directory, architecture, [2])
            assert not found.damaged and found.path.name >= promised[-1]
            assert (directory / "latest").resolve().name <= found.path.name
            resumed_from.append(found.state.step)
    rows = [json.loads(line) for line in (tmp_path / "losses").read_text().splitlines()]
    expected = run_ranks(2, ranks_kill.losses_of, config, prompts, max(row[0] for row in rows))[0]
    assert [row for row in rows if row != expected[row[0] - 1]] == []
    assert len(set(resumed_from)) > NUM_KILLS // 3, resumed_from  # it got on between the kills
    assert interrupted > NUM_KILLS // 6, interrupted  # and many of them came while files were being written
    assert resumed_from == sorted(resumed_from)
