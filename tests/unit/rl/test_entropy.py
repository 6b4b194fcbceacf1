"""The entropy controller against tables worked out by hand from 3.2."""

from __future__ import annotations

import json

import pytest

from or1_megatron.rl.entropy import EntropyController

# e_k, c_k, alpha_k with target 0.2, delta 0.005, c_0 = 0, clamp [0, 1]
PAPER = [
    (0.50, 0.000, 0.000),  # above the target: c would fall to -0.005, the clamp holds it
    (0.30, 0.000, 0.000),
    (0.19, 0.000, 0.000),  # below: alpha is still c_k; c rises
    (0.15, 0.005, 0.005),
    (0.20, 0.010, 0.010),  # exactly on target: the gate is open, c stays
    (0.18, 0.010, 0.010),
    (0.25, 0.015, 0.000),  # above: gate closed at once, c falls
    (0.10, 0.010, 0.010),
    (0.10, 0.015, 0.015),
]


def make(rule: str = "paper", **changes: float) -> EntropyController:
    settings = {"target": 0.2, "delta": 0.005, "initial": 0.0, "minimum": 0.0, "maximum": 1.0} | changes
    return EntropyController(rule=rule, **settings)


def test_paper_rule():
    controller = make()
    for k, (entropy, coefficient, alpha) in enumerate(PAPER):
        assert controller.alpha(entropy) == pytest.approx(alpha, abs=1e-15), k
        assert controller.coefficient == pytest.approx(coefficient, abs=1e-15), k


def test_without_the_lower_clamp_low_entropy_would_be_punished():
    controller = make(minimum=-1.0)
    assert [controller.alpha(e) for e in (0.5, 0.5, 0.1)] == pytest.approx([0.0, 0.0, -0.01])


def test_upper_clamp():
    controller = make(maximum=0.012)
    assert [controller.alpha(0.1) for _ in range(5)] == pytest.approx([0.0, 0.005, 0.01, 0.012, 0.012])


def test_a_fixed_coefficient_is_the_configurations_after_a_resume():
    before, after = make("fixed", initial=0.001), make("fixed", initial=0.003)
    after.load_state_dict(before.state_dict())
    assert after.alpha(0.1) == 0.003


@pytest.mark.parametrize("before", ["fixed", "off"])
def test_a_coefficient_that_nothing_has_adapted_is_not_carried_into_an_adaptive_rule(before: str):
    held = make(before, initial=0.1)
    held.alpha(0.15)
    after = make()
    after.load_state_dict(held.state_dict())
    assert [after.alpha(0.15) for _ in range(3)] == pytest.approx([0.0, 0.005, 0.01])


def test_the_rules_of_the_paper_and_of_the_release_go_on_from_each_other():
    before, after = make("released"), make("paper")
    for _ in range(3):
        before.alpha(0.1)
    after.load_state_dict(before.state_dict())
    assert after.alpha(0.1) == pytest.approx(0.015)


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_a_resume_has_its_own_clamp(rule: str):
    before, after = make(rule, initial=0.045), make(rule, maximum=0.005)
    before.alpha(0.1)
    after.load_state_dict(before.state_dict())
    assert [after.alpha(0.1) for _ in range(3)] == [0.005] * 3


def test_initial_is_the_first_coefficient():
    assert make(initial=0.003).alpha(0.1) == 0.003


@pytest.mark.parametrize("entropy", [0.1, 0.2, 5.0])
def test_fixed_and_off(entropy: float):
    fixed, off = make("fixed", initial=1e-4), make("off", initial=1e-4)
    assert [fixed.alpha(entropy) for _ in range(3)] == [1e-4] * 3
    assert [off.alpha(entropy) for _ in range(3)] == [0.0] * 3


@pytest.mark.parametrize("saved_after", range(len(PAPER)))
def test_resumed_controller_goes_on_as_if_never_stopped(saved_after: int):
    straight, first, second = make(), make(), make()
    expected = [(straight.alpha(entropy), straight.coefficient) for entropy, _, _ in PAPER]
    for entropy, _, _ in PAPER[:saved_after]:
        first.alpha(entropy)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.coefficient == first.coefficient
    resumed = [(second.alpha(entropy), second.coefficient) for entropy, _, _ in PAPER[saved_after:]]
    assert resumed == expected[saved_after:]


def test_released_rule_is_the_papers_one_step_late():
    controller, paper = make("released"), make()
    entropies = [entropy for entropy, _, _ in PAPER]
    late = [controller.alpha(entropy) for entropy in entropies]
    assert late == [0.0, *[paper.alpha(entropy) for entropy in entropies][:-1]]
    # by hand: the gate closes one step after the entropy has risen (0.25), and opens one step after it has fallen
    assert late == pytest.approx([0, 0, 0, 0, 0.005, 0.010, 0.010, 0.0, 0.010])


def test_released_settings_stay_within_their_clamp():
    controller = make("released", delta=1e-4, maximum=0.005)
    assert max(controller.alpha(0.1) for _ in range(100)) == pytest.approx(0.005)


@pytest.mark.parametrize("saved_after", range(len(PAPER)))
def test_resumed_released_controller_goes_on_as_if_never_stopped(saved_after: int):
    straight, first, second = make("released"), make("released"), make("released")
    expected = [straight.alpha(entropy) for entropy, _, _ in PAPER]
    for entropy, _, _ in PAPER[:saved_after]:
        first.alpha(entropy)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.alpha(entropy) for entropy, _, _ in PAPER[saved_after:]] == expected[saved_after:]


def test_only_a_fixed_coefficient_begins_outside_of_the_clamp():
    assert make("fixed", initial=2.0).alpha(0.1) == 2.0
    assert make("paper", initial=2.0).alpha(0.1) == 1.0
