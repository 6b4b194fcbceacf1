"""The rule of the study's verdicts, which must be able to come out either way, and the measures by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from benchmarks.entropy_claims import (
    ADAPTIVE,
    FOUR,
    ONE,
    QUESTIONS,
    T_975,
    VARIANTS,
    Measures,
    judge,
    judge_target,
    measures,
)
from benchmarks.entropy_study import RECIPE, SEEDS
from or1_megatron.recipe import load

COLLAPSE, AT_EQUAL_ENTROPY = QUESTIONS[0].claims[:2]


def step(number: int, entropy: float, **more: float) -> dict:
    row = {"step": number, "entropy/signal": entropy, "reward/mean": 0.5, "truncated": 0.1, "entropy/alpha": 0.0}
    return {**row, "length/mean": 30.0, "sgd_steps": 1, "seconds/step": 60.0, **more}


def results(**entropies: tuple[float, ...]) -> dict:
    """Runs whose mean, late and every other number is the one given, per seed."""
    names = {"one": ONE, "four": FOUR, "adaptive": ADAPTIVE}
    fields = [field.name for field in dataclasses.fields(Measures)]

    def run(value: float) -> Measures:
        numbers: dict[str, Any] = dict.fromkeys(fields, value)
        return Measures(**numbers)

    return {
        names[name].name: {seed: run(value) for seed, value in enumerate(values)} for name, values in entropies.items()
    }


def test_measures_by_hand():
    rows = [step(1, 0.5, **{"eval/avg@8": 0.1}), step(2, 0.3), step(3, 0.09, **{"reward/mean": 0.7, "sgd_steps": 0})]
    rows += [step(4, 0.2), step(5, 0.1, **{"entropy/alpha": 0.02}), step(6, 0.2), {"step": 6, "eval/avg@8": 0.9}]
    found = measures(rows)
    assert (found.entropy_start, found.entropy_min, found.entropy_late) == (0.5, 0.09, pytest.approx(0.15))
    assert found.entropy_unrest == pytest.approx(0.05) and found.entropy_mean == pytest.approx(1.39 / 6)
    assert (found.held_out_before, found.held_out, found.idle_steps, found.minutes) == (0.1, 0.9, 1, 6)
    assert found.reward_at_equal_entropy == pytest.approx((0.7 + 3 * 0.5) / 4)  # the steps from the third
    assert (found.alpha_late, found.alpha_max, found.length_late) == (0.01, 0.02, 30)
    assert math.isnan(measures(rows[:2]).reward_at_equal_entropy)


@pytest.mark.parametrize(
    ("one", "four", "outcome", "value"),
    [
        ((0.30, 0.32, 0.31), (0.10, 0.14, 0.15), "confirmed", 3.62),  # 0.18 +- 0.0497
        ((0.10, 0.14, 0.15), (0.30, 0.32, 0.31), "refuted", -3.62),
        ((0.30, 0.32, 0.31), (0.29, 0.26, 0.30), "undecided", 0.37),  # all seeds agree, but within the interval
        ((0.10, 0.50, 0.20), (0.20, 0.30, 0.20), "undecided", 0.09),
        ((0.30,), (0.10,), "undecided", math.nan),  # one seed
    ],
)
def test_a_claim_comes_out_by_the_numbers(one, four, outcome, value):
    verdict = judge(COLLAPSE, results(one=one, four=four))
    assert verdict.outcome == outcome and verdict.value == pytest.approx(value, abs=0.01, nan_ok=True)


def test_runs_are_compared_seed_by_seed():
    """What the prompts of a seed do to both variants is no doubt about their difference."""
    found = results(one=(0.3, 0.6, 0.9), four=(0.2, 0.51, 0.79))
    assert judge(COLLAPSE, found).outcome == "confirmed"
    found = results(one=(0.3, 0.6, 0.9), four=(0.51, 0.79, 0.2))
    assert judge(COLLAPSE, found).outcome == "undecided"


def test_the_interval_is_student_s():
    from scipy.stats import t

    assert {n: pytest.approx(t.ppf(0.975, n - 1), abs=5e-4) for n in T_975} == T_975
    assert len(SEEDS) in T_975


def test_what_a_seed_does_not_show_decides_nothing():
    found = results(one=(0.9, 0.9), four=(0.1, math.nan))
    verdict = judge(AT_EQUAL_ENTROPY, found)
    assert verdict.outcome == "undecided" and math.isnan(verdict.value)


@pytest.mark.parametrize(("late", "outcome"), [((0.16, 0.24), "confirmed"), ((0.2, 0.14), "refuted")])
def test_the_target_has_to_be_held_by_every_seed(late, outcome):
    assert judge_target(results(adaptive=late)).outcome == outcome


def test_variants_differ_and_are_valid_recipes():
    paths = ["model.path=m", "data.train=[t]", "evaluation.files=[e]"]
    configs = [load(RECIPE, [*paths, *variant.overrides]) for variant in VARIANTS]
    assert all(one != other for i, one in enumerate(configs) for other in configs[:i])
    assert [load(RECIPE, [*paths, *v.overrides]).num_sgd_steps for v in (ONE, FOUR)] == [1, 4]
    asked = {variant.name for question in QUESTIONS for variant in question.variants}
    assert asked == {variant.name for variant in VARIANTS}
    for question in QUESTIONS:
        assert {name for claim in question.claims for name in (claim.of.name, claim.than.name)} <= asked
