"""Sentences on entropy and off-policy samples; those on time and lengths are asked of test_report.py's whole run."""

from __future__ import annotations

from pathlib import Path

import pytest

from or1_megatron.recipe import load
from or1_megatron.report.advice import advice
from or1_megatron.report.rundata import RunData
from or1_megatron.runfolder import RunFolder

RISING = [0.3 + i / 50 for i in range(24)]
FALLING = [0.6 - i / 50 for i in range(16)]


def folder(tmp_path: Path, *options: str) -> RunFolder:
    tmp_path.mkdir(exist_ok=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 60\n")
    return RunFolder.create(load(recipe, [f"run_dir={tmp_path / 'run'}", "model.path=model", *options]))


def run(tmp_path: Path, rewards: list[float], alphas: list[float], entropy: float = 0.2, stages: int = 0) -> RunData:
    """A run of a step per reward; its second stage, if any, begins after `stages` steps."""
    steps = [
        {"step": step, "stage": 1 + (0 < stages < step), "reward/mean": reward, "entropy/alpha": alpha,
         "entropy/signal": entropy, "groups/kept": 8, "groups/generated": 8}
        for step, (reward, alpha) in enumerate(zip(rewards, alphas, strict=True), 1)
    ]  # fmt: skip
    return RunData("run", folder(tmp_path), steps, [])


@pytest.mark.parametrize(
    ("rewards", "alphas", "stages", "found"),
    [
        (RISING + FALLING, [i / 100 for i in range(40)], 0, True),
        (RISING + FALLING, [0.1] * 40, 0, False),  # whatever it is, the coefficient did not do it
        (RISING + [0.6] * 16, [i / 100 for i in range(40)], 0, False),
        (RISING + FALLING, [i / 100 for i in range(40)], 24, True),
        (RISING + [0.2] * 16, [i / 100 for i in range(40)], 24, False),  # another stage's problems are others
        (RISING[:5], [0.1] * 5, 0, False),
    ],
)
def test_a_coefficient_that_costs_reward(
    rewards: list[float], alphas: list[float], stages: int, found: bool, tmp_path: Path
) -> None:
    said = " ".join(advice(run(tmp_path, rewards, alphas, stages=stages)))
    assert ("the entropy loss outweighs the policy's" in said) is found
    if found and not stages:
        assert "fell from 0.69 about step 17 to 0.37 while the entropy coefficient rose from 0.195 to 0.355" in said


@pytest.mark.parametrize(("entropy", "found"), [(0.09, True), (0.11, False)])
def test_an_entropy_far_below_its_target(entropy: float, found: bool, tmp_path: Path) -> None:
    said = " ".join(advice(run(tmp_path, RISING, [0.0] * 24, entropy)))
    assert ("Entropy ended at 0.090, less than half of its target 0.2" in said) is found


@pytest.mark.parametrize(
    ("options", "staleness", "said"),
    [
        (
            [],
            0.0,
            "Engine and actor disagree: at the worst step only 90% of the tokens count (ESS). loss.importance_cap=2",
        ),
        (
            ["loss.old_log_probs=recompute", "loss.importance_cap=3"],
            0.0,
            "(ESS). loss.importance_cap=3 corrects for it.",
        ),
        (["loss.old_log_probs=engine", "rollout.overlap=true"], 1.0, "The samples are of older weights: at the worst"),
        (["loss.old_log_probs=engine"], 0.0, "loss.old_log_probs=engine has it in the ratio, where it is clipped."),
    ],
)
def test_samples_that_are_not_of_the_policy(options: list[str], staleness: float, said: str, tmp_path: Path) -> None:
    steps = [{"step": step, "mismatch/ess": ess, "staleness": staleness} for step, ess in ((1, 0.99), (2, 0.9))]
    assert said in " ".join(advice(RunData("run", folder(tmp_path, *options), steps, [])))
    assert "ESS" not in " ".join(advice(RunData("run", folder(tmp_path / "other"), steps[:1], [])))
