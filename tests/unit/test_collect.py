"""Refill of one step after another: every informative group is trained on once, also across a resume."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from or1_megatron.collect import (
    Rollout,
    RolloutAhead,
    fill,
    rollout_metrics,
    sampled_entropy,
    training_sampling,
)
from or1_megatron.config import Config
from or1_megatron.data.mixture import PromptMixture
from or1_megatron.errors import RunFailure, UserError
from or1_megatron.recipe import from_tree, override_tree
from or1_megatron.rl.filter import is_informative
from or1_megatron.rollout.engine import SamplingSpec
from or1_megatron.surplus import read_groups, write_groups
from or1_megatron.types import Group, Prompt
from tests.unit.random_policy import PROMPTS, Policy, as_lists, config


def steps(config: Config, count: int, resume_after: int = 0, file: Path = Path("none")) -> tuple[list[Rollout], int]:
    """`count` steps, with a trip through a checkpoint's file after one of them; the rounds they took."""
    policy, stream, carried = Policy(), PromptMixture([PROMPTS], [1.0], 0), []
    rollouts, rounds = [], 0
    for step in range(1, count + 1):
        policy.version, policy.rounds = step, 0
        rollouts.append(fill(config, policy, stream, carried))
        rounds += policy.rounds
        carried = rollouts[-1].surplus
        if step == resume_after:
            write_groups(file, carried)
            state = json.loads(json.dumps(stream.state_dict()))
            stream = PromptMixture([PROMPTS], [1.0], 0)
            stream.load_state_dict(state)
            carried = read_groups(file, stream.prompts)
    return rollouts, rounds


def test_the_surplus_is_trained_on_in_the_next_step():
    rollouts, _ = steps(config(), 30)
    informative = [group for r in rollouts for group in r.generated if is_informative(group)]
    trained = [group for r in rollouts for group in r.kept]
    assert [*trained, *rollouts[-1].surplus] == informative  # each once, in order, none lost
    assert all(len(r.kept) == 16 and len(r.surplus) <= 8 for r in rollouts)
    for before, after in zip(rollouts, rollouts[1:], strict=False):
        assert after.kept[: after.num_carried] == before.surplus[:8]
    assert any(r.num_carried for r in rollouts)
    for number, rollout in enumerate(rollouts, 1):  # one version behind, and said so
        versions = [sample.weight_version for group in rollout.kept for sample in group.samples]
        assert set(versions) <= {number, number - 1} and versions.count(number - 1) == 2 * rollout.num_carried
        metrics = rollout_metrics(rollout)
        assert metrics["groups/carried"] == rollout.num_carried and metrics["groups/surplus"] == len(rollout.surplus)
        assert metrics["groups/dropped"] == sum(not is_informative(group) for group in rollout.generated)


def test_exact_refill_leaves_nothing_and_takes_more_rounds():
    rollouts, rounds = steps(config(refill="exact"), 30)
    assert all(len(r.kept) == 16 and not r.surplus and not r.num_carried for r in rollouts)
    assert rounds > 1.5 * steps(config(), 30)[1]


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_resume_keeps_the_surplus(tmp_path: Path, cut: int):
    def plain(run: tuple[list[Rollout], int]) -> Any:
        kinds = [(r.generated, r.kept, r.surplus) for r in run[0]]
        return [[list(map(as_lists, groups)) for groups in step] for step in kinds], run[1]

    assert plain(steps(config(), 9, resume_after=cut, file=tmp_path / "surplus.npz")) == plain(steps(config(), 9))


def test_more_than_half_a_step_waits():
    smaller = config(rollout_batch_size=4)
    carried = Policy()(PROMPTS[:5])
    rollout = fill(smaller, Policy(), PromptMixture([PROMPTS], [1.0], 0), carried)
    assert rollout.kept[:2] == carried[:2] and rollout.num_carried == 2 and rollout.surplus[:3] == carried[2:]


def test_what_a_stage_has_no_room_for_is_not_carried_over():
    carried = Policy()(PROMPTS[:5])
    carried[1].samples[0].tokens = np.arange(200)
    shorter = config(rollout_batch_size=4, context_length=128)
    rollout = fill(shorter, Policy(), PromptMixture([PROMPTS], [1.0], 0), carried)
    assert rollout.kept[:2] == [carried[0], carried[2]] and rollout.surplus[:2] == carried[3:]


@pytest.mark.parametrize(("mask", "kept"), [("none", 2), ("before", 1)])
def test_rejection_heeds_the_mask(mask: str, kept: int):
    """In the second group the only wrong answer was cut."""
    wanted = config(rollout_batch_size=2, max_generated_factor=1, refill="exact")
    wanted.loss.advantage_mask = mask

    def answer(prompts: list[Prompt]) -> list[Group]:
        groups = Policy()(prompts)
        for group, rewards in zip(groups, ((1.0, 0.0, 0.0), (1.0, 1.0, 0.0)), strict=True):
            drawn = group.samples[0]
            group.samples = [dataclasses.replace(drawn, index=i, reward=r) for i, r in enumerate(rewards)]
            group.samples[2].finish_reason = "length"
        return groups

    assert len(fill(wanted, answer, PromptMixture([PROMPTS], [1.0], 0), []).kept) == kept


def test_sampled_entropy_is_the_mean_over_every_sampled_token():
    """Of rejected groups, too, and per token, not per response."""
    groups = Policy()(PROMPTS[:2])
    for group, log_probs in zip(groups, ([-1.0], [-2.0, -4.0, -9.0]), strict=True):
        for sample in group.samples:
            sample.log_probs = np.array(log_probs, np.float32)
    rollout = Rollout(generated=groups, kept=groups[:1])
    assert sampled_entropy(rollout) == (1 + 2 + 4 + 9) / 4


def test_training_samples_as_the_stage_says():
    tree = {
        "model": {"path": "/m"},
        "rollout": {"top_p": 0.9, "max_response_length": 7, "stop": ["x"], "pack_while_decoding": False},
        "steps": 9,
        "stages": [{"until": 5, "context_length": 24}, {"until": 9, "context_length": 48, "temperature": 0.5}],
    }
    second = from_tree([("t", tree)]).all_stages()[1]
    assert training_sampling(second) == SamplingSpec(
        temperature=0.5, top_p=0.9, max_response_length=7, stop=("x",), context_length=48, pack=False
    )


def test_a_rollout_that_was_told_to_stop_is_waited_for():
    ahead, free = RolloutAhead(), threading.Event()

    def sample() -> Rollout:
        assert free.wait(10)
        time.sleep(0.1)
        ended.append(1)
        raise RunFailure("stopped")

    ended: list[int] = []
    ahead.start(sample)
    free.set()
    ahead.abandon()
    assert ended and not ahead.under_way and ahead.take() is None


def test_a_rollout_ahead_is_taken_once_and_its_failure_is_raised():
    ahead, rollout, free = RolloutAhead(), Rollout(), threading.Event()
    assert ahead.take() is None

    def sample() -> Rollout:
        assert free.wait(10)
        return rollout

    ahead.start(sample)  # returns at once: the sample waits for what comes next
    free.set()
    ahead.wait()
    assert ahead.take() is rollout and ahead.take() is None

    def fail() -> Rollout:
        raise RunFailure("engine0 died")

    ahead.start(fail)
    with pytest.raises(RunFailure, match="engine0 died"):
        ahead.wait()


@pytest.mark.parametrize("stale", ["refill=expected", "overlap=true"])
@pytest.mark.parametrize("loss", [{"old_log_probs": "current"}, {"old_log_probs": "recompute"}])
def test_old_samples_need_the_log_probs_they_were_sampled_with(loss: dict, stale: str):
    layers = [("t", {"model": {"path": "/m"}}), override_tree(f"rollout.{stale}")]
    with pytest.raises(UserError, match=rf"rollout.{stale} .* use loss.old_log_probs=engine"):
        from_tree([*layers, ("t", {"loss": loss})])
    from_tree([*layers, ("t", {"loss": {**loss, "importance_cap": 2.0}})])


def test_overlap_and_patience_exclude_each_other():
    stages = [{"until": 5, "patience": 2}, {"until": 9}]
    tree = {"model": {"path": "/m"}, "steps": 9, "stages": stages, "loss": {"old_log_probs": "engine"}}
    from_tree([("t", tree)])
    with pytest.raises(UserError, match=r"rollout.overlap=true .* patience"):
        from_tree([("t", {**tree, "rollout": {"overlap": True}})])


def test_a_group_that_fills_the_context_is_carried_over():
    carried = Policy()(PROMPTS[:1])
    carried[0].samples[0].tokens = np.arange(126)  # behind a prompt of two
    wanted = config(rollout_batch_size=4, context_length=128)
    assert fill(wanted, Policy(), PromptMixture([PROMPTS], [1.0], 0), carried).num_carried == 1


def test_the_share_that_a_refill_expects_is_that_of_this_steps_groups():
    """Two of the eight sampled here: the six missing ones take 24, of which six and half a step are asked for."""
    policy, asked = Policy(), []

    def answer(prompts: list[Prompt]) -> list[Group]:
        asked.append(len(prompts))
        groups = policy(prompts)
        for i, group in enumerate(groups):
            group.samples[0].reward, group.samples[1].reward = float(i < 2), 0.0
        return groups

    fill(config(), answer, PromptMixture([PROMPTS], [1.0], 0), policy(PROMPTS[:8]))
    assert asked[:2] == [8, 14]


def test_without_rejection_every_group_is_trained_on():
    wanted = config(refill="exact")
    wanted.loss.rejection = False
    rollout = fill(wanted, Policy(), PromptMixture([PROMPTS], [1.0], 0), [])
    assert rollout.kept == rollout.generated and len(rollout.kept) == 16


def test_what_still_waits_was_not_dropped_by_this_step():
    wanted = config(rollout_batch_size=4)
    rollout = fill(wanted, Policy(), PromptMixture([PROMPTS], [1.0], 0), Policy()(PROMPTS[:5]))
    dropped = sum(not is_informative(group) for group in rollout.generated)
    assert rollout_metrics(rollout)["groups/dropped"] == dropped


def test_metrics_are_of_every_response():
    groups = Policy()(PROMPTS[:2])
    for i, sample in enumerate(sample for group in groups for sample in group.samples):
        sample.tokens, sample.reward = np.arange(i + 1), float(i == 0)
        sample.finish_reason, sample.verdict = ("length", "truncated") if i == 3 else ("stop", "wrong")
    metrics = rollout_metrics(Rollout(generated=groups, kept=groups[:1]))
    assert (metrics["verdict/wrong"], metrics["verdict/truncated"]) == (3, 1)
    assert (metrics["reward/mean"], metrics["truncated"]) == (0.25, 0.25)
    assert (metrics["length/mean"], metrics["length/max"]) == (2.5, 4)


def test_what_could_not_be_checked_counts_as_asked():
    """A round of refill that brings nothing must not be followed by others for ever."""
    asked = []

    def answer(prompts: list[Prompt]) -> list[Group]:
        asked.append(len(prompts))
        return Policy()(prompts)[1:]

    wanted = config(refill="exact", max_generated_factor=1.0)
    rollout = fill(wanted, answer, PromptMixture([PROMPTS], [1.0], 0), [])
    assert asked == [16] and rollout_metrics(rollout)["groups/left_out"] == 1
    asked.clear()
    wanted = config(refill="exact", max_generated_factor=2.0)
    fill(wanted, answer, PromptMixture([PROMPTS], [1.0], 0), [])
    assert sum(asked) <= 32
    with pytest.raises(RunFailure, match="none of the 32 groups could be checked"):
        fill(wanted, lambda prompts: [], PromptMixture([PROMPTS], [1.0], 0), [])
