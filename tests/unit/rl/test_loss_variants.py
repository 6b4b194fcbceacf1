"""Each member of the loss family against a dense reference written from the formulas, values and gradients.

The reference loops over responses and tokens of a padded [B, T] batch in float64, with autograd for the
gradient; ours sees the same batch packed, over several micro-batches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest
import torch

from or1_megatron.parallel.packing import pack
from or1_megatron.rl.advantage import group_advantages
from or1_megatron.rl.loss import magic_loss
from or1_megatron.types import Sequence
from or1_megatron.update import mini_batches, mismatch_metrics, weighted

LOSSES: dict[str, dict[str, Any]] = {
    "magic": {},
    "magic on-policy": {"old": False},
    "grpo": {"mean_over": "responses", "kl_coefficient": 0.04, "alpha": 0.0},
    "ppo": {"alpha": 0.0},
    "policy gradient": {"surrogate": "gradient", "old": False, "alpha": 0.0},
    "clip higher": {"clip_high": 0.28},
    "truncated importance": {"importance_cap": 1.1},
    "truncated importance on-policy": {"importance_cap": 1.1, "old": False},
    "everything": {"mean_over": "responses", "kl_coefficient": 0.5, "importance_cap": 1.3, "clip_high": 0.28},
}


def settings_of(name: str) -> dict[str, Any]:
    defaults = {
        "surrogate": "clip", "mean_over": "tokens", "clip_low": 0.2, "clip_high": 0.2, "importance_cap": 0.0,
        "kl_coefficient": 0.0, "alpha": 0.05, "old": True,
    }  # fmt: skip
    return defaults | LOSSES[name]


def dense_loss(rows: list[dict], s: dict[str, Any]) -> torch.Tensor:
    """-(1/N) sum over tokens, or -(1/R) sum over responses of (1/len) sum over tokens, term by term."""
    total = torch.zeros((), dtype=torch.float64)
    num_tokens = sum(len(row["log_probs"]) for row in rows)
    for row in rows:
        for t, log_prob in enumerate(row["log_probs"]):
            old = row["old"][t] if s["old"] else log_prob.detach()
            advantage = row["advantage"]
            if s["surrogate"] == "gradient":
                term = advantage * log_prob
            else:
                ratio = torch.exp(log_prob - old)
                bounded = min(max(ratio.item(), 1 - s["clip_low"]), 1 + s["clip_high"])
                clipped = ratio if bounded == ratio.item() else torch.tensor(bounded, dtype=torch.float64)
                term = ratio * advantage
                if float(clipped) * advantage < float(term):
                    term = clipped * advantage
            if s["importance_cap"]:
                term = term * min(math.exp(float(old) - row["engine"][t]), s["importance_cap"])
            term = term + s["alpha"] * row["entropy"][t]
            if s["kl_coefficient"]:
                gap = row["reference"][t] - log_prob
                term = term - s["kl_coefficient"] * (torch.exp(gap) - gap - 1)
            share = num_tokens if s["mean_over"] == "tokens" else len(rows) * len(row["log_probs"])
            total = total - term / share
    return total


def make_rows(seed: int) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for _ in range(7):
        length = draw.randint(1, 9)
        log_probs = [draw.uniform(-3, -0.2) for _ in range(length)]
        row: dict[str, Any] = {"advantage": draw.choice([-1.5, 0.5, 2.0])}
        row["log_probs"] = torch.tensor(log_probs, dtype=torch.float64, requires_grad=True)
        row["entropy"] = torch.tensor([draw.uniform(0, 2) for _ in range(length)], dtype=torch.float64)
        row["entropy"].requires_grad_()
        for name in ("old", "engine", "reference"):
            row[name] = [x + draw.uniform(-0.5, 0.5) for x in log_probs]
        rows.append(row)
    return rows


def ours(rows: list[dict], s: dict[str, Any], packs: list[tuple[int, ...]]) -> tuple[float, dict, list, list]:
    sequences = []
    for row in rows:
        length = len(row["log_probs"])
        given: dict[str, Any] = {"engine_log_probs": tuple(row["engine"])} if s["importance_cap"] else {}
        given |= {"reference_log_probs": tuple(row["reference"])} if s["kl_coefficient"] else {}
        old = tuple(row["old"]) if s["old"] else None
        sequences.append(Sequence(tuple(range(length + 2)), 2, row["advantage"], old, **given))
    chosen = weighted(sequences, s["mean_over"])
    loss, sums = 0.0, {}
    log_grads: list[Any] = [None] * len(rows)
    entropy_grads: list[Any] = [None] * len(rows)
    for ids in packs:
        batch = pack(chosen, ids, alignment=4)
        log_T, entropy_T = (torch.full((batch.num_tokens,), math.nan) for _ in range(2))
        starts = list(zip(ids, batch.cu_seqlens, strict=False))
        for i, start in starts:
            log_T[start + 1 : start + 1 + len(rows[i]["log_probs"])] = rows[i]["log_probs"].detach().float()
            entropy_T[start + 1 : start + 1 + len(rows[i]["log_probs"])] = rows[i]["entropy"].detach().float()
        log_T.requires_grad_()
        entropy_T.requires_grad_()
        terms = magic_loss(
            log_T, batch.old_log_probs_T, batch.advantages_T, batch.weights_T, entropy_T,
            entropy_coefficient=s["alpha"], num_tokens=sum(len(row["log_probs"]) for row in rows),
            clip_low=s["clip_low"], clip_high=s["clip_high"], surrogate=s["surrogate"],
            engine_log_probs_T=batch.engine_log_probs_T, importance_cap=s["importance_cap"],
            reference_log_probs_T=batch.reference_log_probs_T, kl_coefficient=s["kl_coefficient"],
        )  # fmt: skip
        a_T, b_T = torch.autograd.grad(terms.loss, (log_T, entropy_T))
        loss += float(terms.loss)
        for name, value in terms.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        for i, start in starts:
            place = slice(start + 1, start + 1 + len(rows[i]["log_probs"]))
            log_grads[i], entropy_grads[i] = a_T[place], b_T[place]
    return loss, sums, log_grads, entropy_grads


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("packs", [[(0, 1, 2, 3, 4, 5, 6)], [(6, 0), (), (3, 2, 5), (1,), (4,)]])
def test_value_and_gradient_equal_the_dense_reference(name: str, packs: list[tuple[int, ...]]):
    s, rows = settings_of(name), make_rows(5)
    expected = dense_loss(rows, s)
    expected.backward()
    loss, sums, log_grads, entropy_grads = ours(rows, s, packs)
    assert loss == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
    for row, a, b in zip(rows, log_grads, entropy_grads, strict=True):
        torch.testing.assert_close(a.double(), row["log_probs"].grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(b.double(), row["entropy"].grad, rtol=1e-4, atol=1e-8)
    clipping = s["surrogate"] == "clip" and s["old"]
    assert (sums["clipped"] > 0) == clipping
    assert sums["entropy"] == pytest.approx(sum(float(row["entropy"].detach().sum()) for row in rows), rel=1e-5)
    if s["importance_cap"]:
        assert 0 < sums["importance_capped"] < sum(len(row["log_probs"]) for row in rows)
    if s["kl_coefficient"]:
        assert sums["kl"] > 0


def test_the_losses_differ_from_each_other():
    values = {name: float(dense_loss(make_rows(5), settings_of(name)).detach()) for name in LOSSES}
    assert len({round(value, 6) for value in values.values()}) == len(values), values


def test_k3_by_hand():
    one = torch.ones(1)
    log_probs_T = torch.tensor([-1.0], requires_grad=True)
    terms = magic_loss(
        log_probs_T, None, torch.zeros(1), one, one, entropy_coefficient=0.0, num_tokens=1, clip_low=0.2,
        clip_high=0.2, reference_log_probs_T=torch.tensor([-1.0 + math.log(2)]), kl_coefficient=3.0,
    )  # fmt: skip
    assert float(terms.loss) == pytest.approx(3 * (2 - math.log(2) - 1))
    terms.loss.backward()
    assert log_probs_T.grad is not None
    assert float(log_probs_T.grad) == pytest.approx(3 * (1 - 2))  # beta * (1 - e^d)


def test_every_response_weighs_the_same_under_the_mean_over_responses():
    sequences = [Sequence(tuple(range(n + 1)), 1, 1.0, None) for n in (1, 3, 8)]
    assert weighted(sequences, "tokens") == sequences
    heavy = weighted(sequences, "responses")
    assert [s.weight * s.num_response_tokens for s in heavy] == pytest.approx([4.0] * 3)  # 12 tokens, 3 responses
    assert [dataclasses.replace(s, weight=1.0) for s in heavy] == sequences


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        # rewards 1 0 0 1, the last two truncated
        ("none", [0.8660254, -0.8660254, -0.8660254, 0.8660254]),
        ("before", [0.70710678, -0.70710678, 0.0, 0.0]),  # statistics of (1, 0)
        ("after", [0.8660254, -0.8660254, 0.0, 0.0]),
    ],
)
def test_advantage_masks_by_hand(mask: str, expected: list[float]):
    rewards, truncated = [1.0, 0.0, 0.0, 1.0], [False, False, True, True]
    assert group_advantages(rewards, truncated, mask=mask) == pytest.approx(expected)
    flat = group_advantages(rewards, truncated, mask=mask, normalise_std=False)
    assert flat == pytest.approx([0.5 * math.copysign(1, a) if a else 0.0 for a in expected])


def test_masked_groups_without_contrast_are_worth_nothing():
    """Before: the only wrong answer was cut. After: all contrast is in the cut answer, but the others keep theirs."""
    rewards, truncated = [1.0, 1.0, 0.0], [False, False, True]
    assert group_advantages(rewards, truncated, mask="before") == [0.0] * 3
    assert group_advantages(rewards, truncated, mask="after")[2] == 0.0 < group_advantages(rewards, truncated)[0]
    assert group_advantages(rewards, [True, True, False], mask="before") == [0.0] * 3  # one counted: no statistics


def test_mini_batches_are_whole_groups():
    assert mini_batches([4, 4, 4, 4], 2) == [(0, 8), (8, 16)]
    assert mini_batches([4, 4, 4, 4, 4], 3) == [(0, 8), (8, 20)]
    assert mini_batches([4] * 129, 128) == [(0, 4 * 129)], "one group would make a step of its own"
    assert mini_batches([4], 64) == [(0, 4)]
    for (_, end), (start, _) in itertools.pairwise(mini_batches([2, 3, 4], 1)):
        assert end == start


def test_mismatch_by_hand():
    import numpy as np

    gap = math.log(2)
    found = mismatch_metrics([np.array([-1.0, -2.0])], [np.array([-1.0, -2.0 - gap])])
    assert found["mismatch/mean"] == pytest.approx(gap / 2) and found["mismatch/max"] == pytest.approx(gap)
    assert found["mismatch/kl"] == pytest.approx((2 - gap - 1) / 2)
    assert found["mismatch/ess"] == pytest.approx((1 + 2) ** 2 / (2 * (1 + 4)))
