"""avg@n, pass@k and their intervals against enumeration, a closed form and repeated experiments."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from or1_megatron.accuracy import Outcome, accuracy, estimate, held_out, pass_at_k


def outcome(correct: int, n: int = 4, length: int = 10, truncated: int = 0) -> Outcome:
    return Outcome(correct, (length,) * n, truncated)


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for n in range(1, 7):
        for correct in range(n + 1):
            marks = [1] * correct + [0] * (n - correct)
            for k in range(1, n + 1):
                chosen = [max(pick) for pick in combinations(marks, k)]
                assert pass_at_k(n, correct, k) == pytest.approx(sum(chosen) / len(chosen))


def test_accuracy_of_a_few_problems():
    found = accuracy([outcome(4), outcome(1, length=20, truncated=2), outcome(0)])
    assert (found.num_problems, found.num_samples) == (3, 4)
    assert found.average.value == pytest.approx(5 / 12)
    assert {k: e.value for k, e in found.passing.items()} == pytest.approx({2: (1 + 0.5) / 3, 4: 2 / 3})
    assert found.length == pytest.approx(40 / 3) and found.truncated == pytest.approx(2 / 12)
    assert list(accuracy([outcome(1, n=6)]).passing) == [2, 4, 6]
    assert accuracy([outcome(1, n=1)]).passing == {}


def test_the_interval_is_that_of_the_mean_over_problems():
    values = np.random.default_rng(1).random(400)
    value, low, high = estimate(values)
    half = 1.96 * values.std() / 20
    assert value == pytest.approx(values.mean())
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.1)
    assert estimate([0.5] * 9) == (0.5, 0.5, 0.5)


def test_the_interval_covers_the_truth():
    """Problems whose difficulty differs, four responses each: about 95 of 100 intervals hold the mean, here 0.4."""
    draw = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        difficulty = draw.beta(2, 3, size=60)
        value = estimate(draw.binomial(4, difficulty) / 4)
        hits += value.low <= 0.4 <= value.high
    assert 180 <= hits <= 198, hits


def test_held_out_accuracies_stand_at_the_step_they_were_taken_after():
    """They have lines of their own; in older runs the line of a step holds the evaluation before it."""
    step = {"seconds/step": 1.0}
    rows = [
        {"step": 1, "eval/avg@8": 0.1, "eval/pass@8": 0.2, **step},
        {"step": 2, **step},
        {"step": 3, "eval/T0.6/avg@8": 0.5, "eval/T1/avg@8": 0.4, **step},
        {"step": 3, "eval/avg@8": 0.9},
        {"step": 4, **step},
        {"step": 4, "eval/avg@8": 0.7},
        {"step": 5, **step},
    ]
    assert held_out(rows) == [(0, 0.1), (2, 0.5), (3, 0.9), (4, 0.7)]


def test_the_interval_is_the_same_each_time():
    values = np.random.default_rng(3).random(50)
    assert estimate(values) == estimate(values)
