"""The driver's state around a step: what a stage start does, what a resume brings back, what a checkpoint may hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from or1_megatron.architecture import parse_architecture
from or1_megatron.collect import Rollout
from or1_megatron.config import Config
from or1_megatron.inputs import Inputs
from or1_megatron.recipe import from_tree
from or1_megatron.run import Run, Stop, group_sizes, learning_rate, probe_tokens
from or1_megatron.runfolder import RunFolder
from or1_megatron.runstate import Checkpoints, Found, newest
from or1_megatron.types import Group, Prompt, Sample
from tests.unit.test_update import QWEN2

PROMPTS = [Prompt(f"p{i}", "x", (1, 2), ("1",)) for i in range(5)]


class Processes:
    """Stands in for the cluster and the display: no process, and what is said is kept."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.message = self.said.append

    def shares_prompts(self) -> bool:
        return False

    def peak_flops(self) -> float:
        return 1.0

    def load(self, directory: Path) -> None:
        pass

    def resumed(self, step: int) -> None:
        self.said.append(f"resumed after step {step}")


class NoFiles:
    """An actor without weights."""

    def begin_save(self, directory: Path) -> None:
        pass

    def finish_save(self) -> dict[str, Any]:
        return {}


def config(run_dir: Path, **changes: Any) -> Config:
    tree = {
        "model": {"path": "/m"},
        "run_dir": str(run_dir),
        "steps": 10,
        "stages": [{"until": 2}, {"until": 8}, {"until": 10}],
        "drop_solved": True,
        "rollout": {"rollout_batch_size": 2, "group_size": 2},
        "loss": {"old_log_probs": "engine"},
        "profiling": {"trace_steps": 0},
    }
    return from_tree([("t", tree), ("more", changes)])


def make(wanted: Config, folder: RunFolder) -> tuple[Run, Processes]:
    there: Any = Processes()
    rewards: Any = None
    inputs = Inputs(parse_architecture(QWEN2, "test"), [PROMPTS], [])
    return Run(wanted, inputs, folder, there, rewards, there, Stop()), there


def group(prompt: Prompt, *, right: int, version: int = 0) -> Group:
    """Two responses, so many of them right."""

    def sample(i: int) -> Sample:
        correct = i < right
        tokens, log_probs = np.array([3], np.int32), np.array([-1.0], np.float32)
        verdict = "correct" if correct else "wrong"
        return Sample(prompt, i, tokens, log_probs, "x", "stop", version, verdict, float(correct))

    return Group(prompt, [sample(0), sample(1)])


def do_steps(run: Run, first: int, last: int, right: Callable[[Prompt], int]) -> list[list[str]]:
    """uids that each step asks, all of whose groups are trained on."""
    asked = []
    for step in range(first, last + 1):
        run.enter(step)
        groups = [group(prompt, right=right(prompt)) for prompt in run.stream.take(2)]
        run._stream_state = run.stream.state_dict()
        run.finish(step, Rollout(generated=groups, kept=groups))
        asked.append([one.prompt.uid for one in groups])
    return asked


def found(run: Run, folder: RunFolder) -> Found:
    """A checkpoint of the run's state now, on the disk but for what is the actor's."""
    actor: Any = NoFiles()
    checkpoints = Checkpoints(folder.checkpoints, actor, run.architecture, keep=1, keep_every=0)
    checkpoints.begin(run.state)
    checkpoints.finish()
    return newest(folder.checkpoints, run.architecture, group_sizes(run.config))


def test_what_was_solved_in_a_stage_is_not_asked_again_even_after_a_resume(tmp_path: Path):
    wanted = config(tmp_path / "run")
    folder = RunFolder.create(wanted)
    run, there = make(wanted, folder)
    order = [prompt.uid for prompt in make(wanted, folder)[0].stream.take(5)]
    solved = {order[0]}

    def right(prompt: Prompt) -> int:
        return 2 if prompt.uid in solved else 1

    assert do_steps(run, 1, 2, right) == [order[:2], order[2:4]]
    solved.add(order[4])  # which the second stage asks first
    assert do_steps(run, 3, 3, right)[0][0] == order[4]
    assert run.stages.dropped == [order[0]] and there.said[0] == "1 problems solved in the stage before are dropped"
    state = found(run, folder)
    resumed, _ = make(wanted, folder)
    resumed.restore(state)
    asked = {uid for step in do_steps(resumed, 4, 8, right) for uid in step}  # ten, of five problems
    assert asked == set(order[1:]), "the resume is inside the stage"
    asked = {uid for step in do_steps(resumed, 9, 10, right) for uid in step}
    assert resumed.stages.dropped == sorted(solved) and asked <= set(order[1:4]), "what both stages solved"


@pytest.mark.parametrize(("at_stage", "coefficient"), [("carry", 0.01), ("reset", 0.0)])
def test_the_controller_at_a_stage_start(tmp_path: Path, at_stage: str, coefficient: float):
    wanted = config(tmp_path / "run", drop_solved=False, entropy={"at_stage": at_stage})
    run, _ = make(wanted, RunFolder.create(wanted))
    for step in (1, 2):
        run.enter(step)
        run.controller.alpha(0.0)
    run.enter(3)
    assert run.controller.alpha(0.0) == pytest.approx(coefficient)


def test_a_checkpoint_knows_nothing_of_the_rollout_that_is_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It would skip the problems that were asked for it."""
    wanted = config(tmp_path / "run", stages=[], rollout={"overlap": True})
    run, _ = make(wanted, RunFolder.create(wanted))

    def collect(*_: Any) -> Rollout:
        groups = [group(prompt, right=1) for prompt in run.stream.take(2)]
        return Rollout(generated=groups, kept=groups)

    monkeypatch.setattr(run, "_collect", collect)
    rollout = run.rollout(run.enter(1), 1)
    run._ahead.wait()
    run.finish(1, rollout)
    again, _ = make(wanted, run.folder)
    assert [one.prompt for one in rollout.generated] == again.stream.take(2)
    assert run.state.stream == again.stream.state_dict() != run.stream.state_dict()
    following = run.rollout(run.enter(2), 2)
    assert [one.prompt for one in following.generated] == again.stream.take(2), "the one that was ahead"


@pytest.mark.parametrize(
    ("loss", "kept"),
    [
        ({"old_log_probs": "engine"}, 1),
        ({"old_log_probs": "recompute"}, 0),
        ({"old_log_probs": "current"}, 0),
        ({"old_log_probs": "recompute", "importance_cap": 2.0}, 1),
    ],
)
def test_groups_of_earlier_weights_are_carried_only_where_the_loss_allows_for_them(
    tmp_path: Path, loss: dict[str, Any], kept: int
):
    before = config(tmp_path / "run", stages=[], drop_solved=False, rollout={"refill": "expected"})
    folder = RunFolder.create(before)
    run, _ = make(before, folder)
    run.carried = [group(PROMPTS[0], right=1)]
    run.finish(1, Rollout(generated=[group(PROMPTS[1], right=1)]))
    state = found(run, folder)
    after = config(tmp_path / "run", stages=[], drop_solved=False, loss=loss)
    resumed, there = make(after, folder)
    resumed.restore(state)
    assert len(resumed.carried) == kept
    assert any("1 groups left over" in line for line in there.said) == (not kept)


def test_a_failure_saves_what_is_completed_and_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = config(tmp_path / "run")
    run, there = make(wanted, RunFolder.create(wanted))
    saved = []
    monkeypatch.setattr(run, "save", lambda: saved.append(run.state.step))
    run.rescue()  # nothing is done yet
    assert do_steps(run, 1, 1, lambda _: 1)
    run.updater.midway = True  # in the update of the second step
    run.rescue()
    assert saved == []
    do_steps(run, 2, 2, lambda _: 1)
    run.rescue()
    assert saved == [2] and there.said[0].startswith("saved step 2, the last that was completed; continue with: or1 ")


def test_the_learning_rate_warms_up_and_stays(tmp_path: Path):
    wanted = config(tmp_path / "run", optimizer={"lr": 1e-3, "warmup_steps": 4})
    assert [learning_rate(wanted, step) for step in (1, 2, 4, 5, 99)] == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-3, 1e-3])
    wanted.optimizer.warmup_steps = 0
    assert learning_rate(wanted, 1) == 1e-3


def test_the_probe_has_a_token_to_give_a_log_prob_to():
    one, two = (Prompt("p", "", tokens, ("",)) for tokens in ((7,), (8, 9)))
    assert probe_tokens([one, two]) == [8, 9] and probe_tokens([one]) == [7, 7]
    assert len(probe_tokens([Prompt("p", "", (1,) * 300, ("",))])) == 256
