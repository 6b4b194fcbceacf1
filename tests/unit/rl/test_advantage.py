"""Group advantages against statistics' own standard deviation."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from or1_megatron.rl.advantage import group_advantages

REWARDS = st.lists(st.sampled_from([0.0, 0.25, 1.0, -1.0, 3.0]), min_size=2, max_size=64)


def test_by_hand():
    # mean 1/4; squared deviations 9/16 + 3 * 1/16 = 3/4; unbiased variance 1/4, std 1/2.
    assert group_advantages([1, 0, 0, 0]) == [1.5, -0.5, -0.5, -0.5]


@given(REWARDS)
def test_unbiased_standard_deviation(rewards: list[float]):
    advantages = group_advantages(rewards)
    if len(set(rewards)) == 1:
        assert advantages == [0.0] * len(rewards)
        return
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    assert advantages == pytest.approx([(reward - mean) / std for reward in rewards], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_equal_rewards_give_exactly_zero(reward: float, size: int):
    """Also where the mean of equal numbers is not that number: 3 * 0.1 / 3."""
    assert group_advantages([reward] * size) == [0.0] * size


def test_a_group_of_which_nothing_counts_has_no_advantage():
    assert group_advantages([0.0, 1.0], [True, True], mask="before") == [0.0, 0.0]
