"""Rejection of groups, and how much to roll out again."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from or1_megatron.rl.advantage import group_advantages
from or1_megatron.rl.filter import informative_share, is_informative, refill_size
from or1_megatron.types import Group, Prompt, Sample


def make_group(rewards: list[float], truncated: tuple[int, ...] = ()) -> Group:
    prompt = Prompt("p", "text", (1,), ("4",))
    ends = ["length" if i in truncated else "stop" for i in range(len(rewards))]
    samples = [
        Sample(prompt, i, np.array([2]), np.array([-0.5]), "x", ends[i], 0, reward=r) for i, r in enumerate(rewards)
    ]
    return Group(prompt, samples)


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=2, max_size=16))
def test_informative_is_a_non_zero_advantage(rewards: list[float]):
    assert is_informative(make_group(rewards)) == any(group_advantages(rewards))


@pytest.mark.parametrize(("mask", "informative"), [("none", True), ("after", True), ("before", False)])
def test_a_group_whose_contrast_is_masked_is_not_informative(mask: str, informative: bool):
    assert is_informative(make_group([1.0, 1.0, 0.0], truncated=(2,)), mask) == informative
    assert is_informative(make_group([1.0, 0.0, 0.0], truncated=(2,)), mask)


@pytest.mark.parametrize(
    ("kept", "wanted", "generated", "limit", "size"),
    [
        (0, 64, 0, 128, 64),
        (40, 64, 64, 128, 24),  # the missing ones
        (40, 64, 120, 128, 8),  # what the bound leaves
        (40, 64, 128, 128, 0),  # bound reached: the step goes on with 40
        (64, 64, 70, 128, 0),
    ],
)
def test_refill_by_hand(kept: int, wanted: int, generated: int, limit: int, size: int):
    assert refill_size(kept=kept, wanted=wanted, generated=generated, limit=limit) == size


def test_expected_refill_by_hand():
    def size(kept: int, generated: int, carried: int = 0) -> int:
        return refill_size(kept=kept, wanted=64, generated=generated, limit=400, carried=carried, expected=True)

    assert size(0, 0) == 64
    assert size(40, 64) == 39  # 24 missing at 40 of 64
    assert size(40, 32, carried=32) == 24 + 32  # 96 expected at 8 of 32, of which half of 64 may be left over
    assert size(70, 100) == 0


@given(
    st.integers(1, 40),
    st.integers(0, 80),
    st.floats(0, 1),
    st.integers(0, 2**16),
    st.integers(0, 20),
)
def test_expected_refilling_ends_with_a_bounded_surplus(
    wanted: int, extra: int, chance: float, seed: int, carried: int
):
    draw, limit, carried = random.Random(seed), wanted + extra, min(carried, wanted // 2)
    kept, generated, size = carried, 0, wanted - carried
    while size:
        generated += size
        kept += sum(draw.random() < chance for _ in range(size))
        size = refill_size(kept=kept, wanted=wanted, generated=generated, limit=limit, carried=carried, expected=True)
    assert kept - wanted <= wanted // 2 and generated <= limit
    assert kept >= wanted or generated == limit


@given(
    st.integers(1, 40),
    st.integers(0, 80),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
def test_refilling_ends_without_surplus(wanted: int, extra: int, chance: float, seed: int):
    draw, limit = random.Random(seed), wanted + extra
    kept = generated = 0
    while size := refill_size(kept=kept, wanted=wanted, generated=generated, limit=limit):
        generated += size
        kept += sum(draw.random() < chance for _ in range(size))
    assert kept <= wanted and generated <= limit
    assert kept == wanted or generated == limit


def test_the_informative_share_of_another_group_size():
    rng = random.Random(0)
    chances = [rng.betavariate(0.5, 2.0) for _ in range(20_000)]
    groups = {n: [sum(rng.random() < p for _ in range(n)) for p in chances] for n in (4, 8, 16)}
    seen = {n: sum(0 < right < n for right in rights) / len(rights) for n, rights in groups.items()}
    for n, rights in groups.items():
        found = [informative_share([(n, right) for right in rights], size) for size in seen]
        assert found == pytest.approx(list(seen.values()), abs=0.02)
    assert seen[16] > seen[8] + 0.05 > seen[4] + 0.15


def test_the_informative_share_where_prompts_do_not_differ():
    assert informative_share([(2, 1)] * 9, 2) == pytest.approx(0.5)  # less spread than chance gives: p is 1/2 for all
    assert informative_share([(4, 0), (4, 0)], 8) == informative_share([(4, 4)], 8) == 0
    assert informative_share([(4, 0), (4, 4)], 8) == 0
