"""Weighted sources: exact shares, epochs per source, dropping, resuming anywhere; and the message of the bound."""

from __future__ import annotations

import json

import pytest

from or1_megatron.collect import Rollout, shortfall
from or1_megatron.config import Config
from or1_megatron.data.mixture import PromptMixture
from or1_megatron.data.prompts import PromptStream
from or1_megatron.errors import UserError
from or1_megatron.recipe import from_tree
from or1_megatron.types import Group, Prompt

MATH = [Prompt(f"m{i}", "", (i,), ("",)) for i in range(7)]
CODE = [Prompt(f"c{i}", "", (i,), ("",)) for i in range(3)]


def make(weights: tuple[float, float] = (3.0, 1.0)) -> PromptMixture:
    return PromptMixture([MATH, CODE], list(weights), seed=5)


@pytest.mark.parametrize("count", range(1, 40))
def test_shares_are_exact_to_one_prompt(count: int):
    taken = make().take(count)
    assert abs(sum(p.uid[0] == "m" for p in taken) - 0.75 * count) <= 1


def test_every_source_has_its_own_epochs():
    code = [p.uid for p in make((1.0, 1.0)).take(12) if p.uid[0] == "c"]
    assert sorted(code[:3]) == sorted(code[3:6]) == ["c0", "c1", "c2"]


def test_one_source_is_a_plain_stream():
    assert PromptMixture([MATH], [1.0], seed=5).take(20) == PromptStream(MATH, seed=5).take(20)


@pytest.mark.parametrize("cut", range(0, 23, 3))
def test_a_resumed_mixture_goes_on_as_if_never_stopped(cut: int):
    first, second = make(), make()
    before = first.take(cut)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + second.take(23 - cut) == make().take(23)
    with pytest.raises(UserError, match="1 weighted sources, the checkpoint was made with 2"):
        PromptMixture([MATH], [1.0], seed=5).load_state_dict(first.state_dict())


def test_other_weights_count_from_a_resume_on():
    first = PromptMixture([MATH, CODE], [9.0, 1.0], seed=5)
    first.take(1000)
    second = PromptMixture([MATH, CODE], [1.0, 1.0], seed=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert sum(prompt in CODE for prompt in second.take(100)) == 50


def test_an_emptied_source_leaves_its_share():
    mixture = make()
    mixture.take(5)
    mixture.drop(["c0", "c1", "c2", "m1"])
    assert {p.uid for p in mixture.take(30)} == {p.uid for p in MATH} - {"m1"}
    with pytest.raises(UserError, match="all problems"):
        mixture.drop(p.uid for p in MATH + CODE)


def config(**rollout: object) -> Config:
    return from_tree([("t", {"model": {"path": "/m"}, "rollout": {"rollout_batch_size": 4, **rollout}})])


def test_the_bound_says_what_happened():
    groups = [Group(prompt) for prompt in MATH]
    told = shortfall(config(), Rollout(groups, groups[:3]))
    assert told.startswith("3 of 4 groups are informative after 7 were rolled out") and "factor=2.0" in told
    assert shortfall(config(), Rollout(groups, groups[:4])) == ""
    assert shortfall(config(max_generated_factor=1.0), Rollout(groups, groups[:3])) == ""  # no refill was asked for


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, 2.0, 3.0]])
def test_weights_must_fit_the_files(weights: list[float]):
    data = {"train": ["a.jsonl", "b.jsonl"], "weights": weights}
    with pytest.raises(UserError, match=r"data.weights=.*each of the 2 files"):
        from_tree([("t", {"model": {"path": "/m"}, "data": data})])


def test_the_source_with_the_largest_share_comes_first():
    assert make((1.0, 3.0)).take(1)[0] in CODE


def test_a_state_is_not_changed_by_what_is_dealt_later():
    """A checkpoint's files are written while the next rollout is under way."""
    first, second = make(), make()
    first.take(5)
    state = first.state_dict()
    before = json.dumps(state)
    first.take(5)
    second.load_state_dict(state)
    second.take(5)
    assert json.dumps(state) == before


def test_the_shares_of_those_that_are_left_are_exact():
    more = [Prompt(f"d{i}", "", (i,), ("",)) for i in range(3)]
    mixture = PromptMixture([MATH, CODE, more], [2.0, 1.0, 1.0], seed=5)
    mixture.take(40)
    mixture.drop([prompt.uid for prompt in more])
    assert abs(sum(prompt in MATH for prompt in mixture.take(30)) - 20) <= 1
