"""Refill of one step after another: every informative group is trained on once, also across a resume."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from or1_megatron.collect import (
    Rollout,
    RolloutAhead,
    fill,
    rollout_metrics,
    sampled_entropy,
    score_groups,
    scored,
    training_sampling,
)
from or1_megatron.config import Config
from or1_megatron.data.mixture import PromptMixture
from or1_megatron.errors import RunFailure, UserError
from or1_megatron.profiling.spans import Spans
from or1_megatron.recipe import from_tree, override_tree
from or1_megatron.reward.problem import Task
from or1_megatron.reward.service import RewardService
from or1_megatron.rl.filter import is_informative
from or1_megatron.rollout.engine import SamplingSpec
from or1_megatron.types import Group, Prompt, Sample, Verdict, group_as_dict, group_from_dict

PROMPTS = [Prompt(f"p{i}", "x", (1, 2), ("1",)) for i in range(40)]
SHARE = 0.4  # of the groups, informative


def config(**rollout: Any) -> Config:
    tree = {"rollout_batch_size": 16, "group_size": 2, "refill": "expected", "max_generated_factor": 9, **rollout}
    loss = {"old_log_probs": "engine"}
    return from_tree([("t", {"model": {"path": "/m"}, "rollout": tree, "loss": loss})])


class Policy:
    """Scored groups, as engines and verifiers give them: drawn from the step and the prompt."""

    def __init__(self) -> None:
        self.version, self.rounds = 0, 0

    def __call__(self, prompts: list[Prompt]) -> list[Group]:
        self.rounds += 1
        return [self._group(prompt) for prompt in prompts]

    def _group(self, prompt: Prompt) -> Group:
        draw = random.Random(f"{self.version}/{self.rounds}/{prompt.uid}")
        rewards = (1.0, 0.0) if draw.random() < SHARE else (0.0, 0.0)
        return Group(
            prompt,
            [
                Sample(
                    prompt,
                    i,
                    np.array([draw.randrange(9)]),
                    np.array([-draw.random()], np.float32),
                    "x",
                    "stop",
                    self.version,
                    "wrong",
                    reward,
                )
                for i, reward in enumerate(rewards)
            ],
        )


def steps(config: Config, count: int, resume_after: int = 0) -> tuple[list[Rollout], int]:
    """`count` steps, with a trip through JSON after one of them; the rounds they took."""
    policy, stream, carried = Policy(), PromptMixture([PROMPTS], [1.0], 0), []
    rollouts, rounds = [], 0
    for step in range(1, count + 1):
        policy.version, policy.rounds = step, 0
        rollouts.append(fill(config, policy, stream, carried))
        rounds += policy.rounds
        carried = rollouts[-1].surplus
        if step == resume_after:
            state = json.loads(json.dumps([[group_as_dict(group) for group in carried], stream.state_dict()]))
            stream = PromptMixture([PROMPTS], [1.0], 0)
            stream.load_state_dict(state[1])
            carried = [group_from_dict(row, stream.prompts) for row in state[0]]
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
def test_a_resume_keeps_the_surplus(cut: int):
    def plain(run: tuple[list[Rollout], int]) -> Any:
        kinds = [(r.generated, r.kept, r.surplus) for r in run[0]]
        return [[list(map(group_as_dict, groups)) for groups in step] for step in kinds], run[1]

    assert plain(steps(config(), 9, resume_after=cut)) == plain(steps(config(), 9))


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


class Decoding:
    """Stands in for the engines of a cluster: two groups, and how many checks were done when each had been decoded."""

    num_engines = 1

    def __init__(self, config: Config, rewards: RewardService, patience_s: float):
        self.config, self._rewards, self._patience_s = config, rewards, patience_s
        self.checked: list[int] = []

    def generate(self, shares: list[list[Prompt]], group_size: int, sampling: SamplingSpec) -> Iterator[Group]:
        for prompt in shares[0]:
            texts = ("\\boxed{1}", "\\boxed{2}")
            yield Group(
                prompt,
                [self._sample(sampling, prompt, i, text) for i, text in enumerate(texts)],
            )
            until = time.monotonic() + self._patience_s
            while not self._rewards.spans and time.monotonic() < until:
                time.sleep(0.01)
            self.checked.append(len(self._rewards.spans))

    @staticmethod
    def _sample(sampling: SamplingSpec, prompt: Prompt, index: int, text: str) -> Sample:
        tokens: Any = [index]
        log_probs: Any = [-0.1]
        sample = Sample(prompt, index, tokens, log_probs, text, "stop", 0)
        return sample.pack() if sampling.pack else sample


@pytest.mark.parametrize("during", [True, False])
def test_responses_are_checked_while_others_are_decoded_or_afterwards(during: bool):
    layers = [("t", {"model": {"path": "/m"}, "reward": {"num_workers": 1, "during_rollout": during}})]
    wanted = from_tree(layers)
    with RewardService(wanted.reward) as rewards:
        while not rewards.spans:  # its first check starts a worker
            rewards.submit(Task("\\boxed{1}", ("1",))).result(60)
        rewards.spans.clear()
        decoding: Any = Decoding(wanted, rewards, patience_s=60 if during else 0.3)
        groups = score_groups(decoding, rewards, PROMPTS[:2], 2, training_sampling(wanted), Spans())
    assert (decoding.checked[0] > 0) == during and (during or decoding.checked == [0, 0])
    assert [group.prompt for group in groups] == PROMPTS[:2]
    assert [[sample.reward for sample in group.samples] for group in groups] == [[1.0, 0.0]] * 2


@pytest.mark.parametrize("early", [True, False])
def test_tokens_and_log_probs_are_arrays_whoever_packs_them(early: bool):
    tree = {"model": {"path": "/m"}, "reward": {"num_workers": 1}, "rollout": {"pack_while_decoding": early}}
    wanted, spans = from_tree([("t", tree)]), Spans()
    with RewardService(wanted.reward) as rewards:
        decoding: Any = Decoding(wanted, rewards, patience_s=0)
        groups = score_groups(decoding, rewards, PROMPTS[:2], 2, training_sampling(wanted), spans)
        pieces = [PROMPTS[:2] * 2], 2
        larger = score_groups(decoding, rewards, PROMPTS[:2], 4, training_sampling(wanted), Spans(), pieces)
    assert [sorted(sample.tokens.tolist() for sample in group.samples) for group in larger] == [
        [[0]] * 2 + [[1]] * 2
    ] * 2
    samples = [sample for group in groups for sample in group.samples]
    assert [(sample.tokens.dtype, sample.log_probs.dtype) for sample in samples] == [("int32", "float32")] * 4
    assert [sample.tokens.tolist() for sample in samples] == [[0], [1]] * 2
    assert ("seconds/pack" in spans.take()) == (not early)


def test_failed_checks_count_over_all_rounds_of_a_step(monkeypatch: pytest.MonkeyPatch):
    """One in the last small refill is a small part of the step, and one too many in it is one too many."""
    wanted = from_tree([("t", {"model": {"path": "/m"}, "reward": {"num_workers": 1, "max_failure_rate": 0.03}})])
    failed: Future[Verdict] = Future()
    failed.set_result(Verdict("infrastructure_error", 0.0))
    with RewardService(wanted.reward) as rewards:
        monkeypatch.setattr(rewards, "submit", lambda task: failed)
        decoding: Any = Decoding(wanted, rewards, patience_s=0)
        checked = [Verdict("wrong", 0.0)] * 98
        settings = decoding, rewards, PROMPTS[:1], 2, training_sampling(wanted), Spans(), None, checked
        assert score_groups(*settings) == [] and len(checked) == 100
        with pytest.raises(RunFailure, match="4 of 102 responses could not be checked"):
            score_groups(*settings)


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


class Given:
    """Stands in for engines and verifiers: these groups in this order, of which the check of "lost" fails."""

    def __init__(self, groups: list[Group]):
        self.config, self.num_engines = config(), 1
        self.checked: list[str] = []
        self._groups = groups

    def generate(self, *_: Any) -> Iterator[Group]:
        yield from self._groups

    def submit(self, task: Task) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        future.set_result(Verdict("infrastructure_error" if task.response == "lost" else "wrong", 0.0))
        return future

    def check_failure_rate(self, verdicts: list[Verdict]) -> None:
        self.checked = [verdict.name for verdict in verdicts]


def test_two_groups_of_one_prompt_stand_in_an_order_of_their_own():
    """By their tokens, whichever has ended first."""
    groups = Policy()(PROMPTS[:1] * 2)
    for first in (3, 5):
        groups[0].samples[0].tokens, groups[1].samples[0].tokens = np.array([first]), np.array([8 - first])
        there: Any = Given(groups)
        found = score_groups(there, there, PROMPTS[:1] * 2, 2, training_sampling(there.config), Spans())
        assert [group.samples[0].tokens.tolist() for group in found] == [[3], [5]]


def test_groups_for_a_caller_who_keeps_each_at_once():
    """Without the one whose check failed, which counts all the same."""
    groups = Policy()(PROMPTS[:3])
    groups[1].samples[0].text = "lost"
    there: Any = Given(groups)
    found = list(scored(there, there, PROMPTS[:3], 2, training_sampling(there.config)))
    assert [group.prompt for group in found] == [PROMPTS[0], PROMPTS[2]]
    assert {sample.verdict for group in found for sample in group.samples} == {"wrong"}
    assert sorted(there.checked) == ["infrastructure_error"] + ["wrong"] * 5
