"""What the paper says of entropy in training, as claims with measures, and the rule by which runs decide them.

The rule: per seed, the difference of a measure between two variants is taken; every seed has the same prompts and
first model in both. A claim is `confirmed` when the 95 % interval of the mean difference (Student's t over the seeds)
lies wholly on the claimed side of zero, `refuted` when it lies wholly on the other, and `undecided` otherwise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

TARGET, DELTA = 0.2, 0.005  # the paper's; nats per token, and the step of c_k
EQUAL_ENTROPY = 0.1  # at which rewards are compared
FROM_THERE = 5  # steps of the mean that is compared
NEAR = 0.25  # "holds the target": within this share of it
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # number of seeds -> quantile

LOW_TARGET = 0.1

CONTROL = ("entropy.rule=paper", f"entropy.target={TARGET}", f"entropy.delta={DELTA}")


@dataclass(frozen=True)
class Variant:
    """Keys of the recipe that differ from the other variants'."""

    name: str
    overrides: tuple[str, ...]


ONE = Variant("1 SGD step", ())
FOUR = Variant("4 SGD steps", ("loss.mini_batch_size=8", "loss.old_log_probs=recompute"))
ADAPTIVE = Variant("adaptive control", CONTROL)
ALL_GROUPS = Variant("adaptive control, no rejection", (*CONTROL, "loss.rejection=false"))
MASKED = Variant("mask before", ("loss.advantage_mask=before",))
# Added after the claims were decided, and part of none: what control costs when its target is below the first entropy.
LOW = Variant(f"adaptive control, target {LOW_TARGET}", (*CONTROL, f"entropy.target={LOW_TARGET}"))
VARIANTS = (ONE, FOUR, ADAPTIVE, ALL_GROUPS, MASKED, LOW)


@dataclass(frozen=True)
class Measures:
    """Of one run. Entropies (e_k) in nats per token, the rest shares unless said. late: mean over the last third of the
    steps."""

    entropy_start: float
    entropy_min: float
    entropy_mean: float
    entropy_late: float
    entropy_unrest: float  # standard deviation of the late ones
    reward_late: float
    reward_at_equal_entropy: float  # FROM_THERE steps from the first with an entropy below that; NaN: there was none
    truncated_late: float
    length_late: float  # tokens
    held_out_before: float
    held_out: float
    alpha_late: float
    alpha_max: float
    idle_steps: int  # steps without an update: no group was informative
    minutes: float


@dataclass(frozen=True)
class Claim:
    """That a measure of variant `of` is below or above that of variant `than`; the paper's section in `text`."""

    name: str
    text: str
    measure: str
    of: Variant
    relation: Literal["below", "above"]
    than: Variant


@dataclass(frozen=True)
class Question:
    title: str
    metric: str  # drawn over the steps
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...]
    file: str
    level: float | None = None
    percent: bool = False


QUESTIONS = (
    Question(
        "Entropy by SGD steps per rollout, nats per token", "entropy/signal", (ONE, FOUR),
        (
            Claim("collapse", "4 SGD steps lower the entropy sooner (4.4): mean over all steps",
                  "entropy_mean", FOUR, "below", ONE),
            Claim("collapse_reward", f"and buy less with it: reward once the entropy is below {EQUAL_ENTROPY}",
                  "reward_at_equal_entropy", FOUR, "below", ONE),
            Claim("collapse_held_out", "and end with a lower held-out accuracy", "held_out", FOUR, "below", ONE),
        ), "sgd-steps.svg",
    ),
    Question(
        "Entropy under adaptive control; dotted: target", "entropy/signal", (ONE, ADAPTIVE, LOW),
        (
            Claim("control", "control keeps the entropy up (3.2.5): late", "entropy_late", ADAPTIVE, "above", ONE),
            Claim("control_held_out", "and the held-out accuracy ends higher", "held_out", ADAPTIVE, "above", ONE),
        ), "control.svg", level=TARGET,
    ),
    Question(
        "Entropy with and without rejection; dotted: target", "entropy/signal", (ADAPTIVE, ALL_GROUPS),
        (
            Claim("rejection", "without rejection the entropy loss weighs more (3.1): late entropy",
                  "entropy_late", ALL_GROUPS, "above", ADAPTIVE),
            Claim("rejection_unrest", "and training is less steady: deviation of the late entropies",
                  "entropy_unrest", ALL_GROUPS, "above", ADAPTIVE),
        ), "rejection.svg", level=TARGET,
    ),
    Question(
        "Share of truncated responses with and without mask", "truncated", (ONE, MASKED),
        (
            Claim("mask", "with the mask more responses are truncated (3.2.3): late share",
                  "truncated_late", MASKED, "above", ONE),
            Claim("mask_reward", "and the training reward is lower: late", "reward_late", MASKED, "below", ONE),
        ), "mask.svg", percent=True,
    ),
)  # fmt: skip

Results = dict[str, dict[int, Measures]]  # variant's name -> seed -> measures


@dataclass(frozen=True)
class Verdict:
    """value: mean difference over half of its 95 % interval, positive in the claimed direction; NaN: cannot be said."""

    name: str
    text: str
    outcome: Literal["confirmed", "refuted", "undecided"]
    value: float


def measures(rows: Sequence[dict[str, Any]]) -> Measures:
    """From the lines of a complete run's metrics.jsonl."""
    steps = [row for row in rows if "entropy/signal" in row]
    late = steps[-max(1, len(steps) // 3) :]
    entropies, late_entropies = ([row["entropy/signal"] for row in part] for part in (steps, late))
    below = next((place for place, entropy in enumerate(entropies) if entropy < EQUAL_ENTROPY), len(steps))
    then = [row["reward/mean"] for row in steps[below : below + FROM_THERE]]
    held_out = [row[name] for row in rows for name in row if name.startswith("eval/avg@")]
    return Measures(
        entropy_start=entropies[0],
        entropy_min=min(entropies),
        entropy_mean=statistics.fmean(entropies),
        entropy_late=statistics.fmean(late_entropies),
        entropy_unrest=statistics.pstdev(late_entropies),
        reward_late=statistics.fmean(row["reward/mean"] for row in late),
        reward_at_equal_entropy=statistics.fmean(then) if then else math.nan,
        truncated_late=statistics.fmean(row["truncated"] for row in late),
        length_late=statistics.fmean(row["length/mean"] for row in late),
        held_out_before=held_out[0],
        held_out=held_out[-1],
        alpha_late=statistics.fmean(row["entropy/alpha"] for row in late),
        alpha_max=max(row["entropy/alpha"] for row in steps),
        idle_steps=sum(not row["sgd_steps"] for row in steps),
        minutes=sum(row.get("seconds/step", 0.0) for row in steps) / 60,
    )


def judge(claim: Claim, results: Results) -> Verdict:
    """By the rule at the top of this file."""
    of, than = results.get(claim.of.name, {}), results.get(claim.than.name, {})
    sign = -1 if claim.relation == "below" else 1
    gains = [
        sign * (getattr(of[seed], claim.measure) - getattr(than[seed], claim.measure)) for seed in of.keys() & than
    ]
    if len(gains) < 2 or any(math.isnan(gain) for gain in gains):
        return Verdict(claim.name, f"{claim.text}: takes two seeds that both show it", "undecided", math.nan)
    mean, half = statistics.fmean(gains), T_975[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
    outcome = "undecided" if abs(mean) <= half else "confirmed" if mean > 0 else "refuted"
    sides = [statistics.fmean(getattr(run, claim.measure) for run in runs.values()) for runs in (of, than)]
    told = f"{claim.of.name} {sides[0]:.3f}, {claim.than.name} {sides[1]:.3f}; {sign * mean:+.3f} +- {half:.3f}"
    return Verdict(claim.name, f"{claim.text}: {told}", outcome, mean / half if half else math.copysign(9, mean))


def judge_target(results: Results) -> Verdict:
    """Whether the late entropy of every seed is near the target."""
    found = [run.entropy_late for run in results[ADAPTIVE.name].values()]
    far = max(abs(value - TARGET) for value in found) / TARGET
    told = ", ".join(f"{value:.3f}" for value in found)
    text = f"control holds the target {TARGET} within {NEAR:.0%}: late entropies {told}"
    return Verdict("target", text, "confirmed" if far <= NEAR else "refuted", NEAR / max(far, 1e-9))
