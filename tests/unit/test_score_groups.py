"""Groups are checked while others are decoded, keep their order, and failed checks count."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from or1_megatron.collect import (
    score_groups,
    scored,
    training_sampling,
)
from or1_megatron.config import Config
from or1_megatron.errors import RunFailure
from or1_megatron.profiling.spans import Spans
from or1_megatron.recipe import from_tree
from or1_megatron.reward.problem import Task
from or1_megatron.reward.service import RewardService
from or1_megatron.rollout.engine import SamplingSpec
from or1_megatron.types import Group, Prompt, Sample, Verdict
from tests.unit.random_policy import PROMPTS, Policy, config


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
