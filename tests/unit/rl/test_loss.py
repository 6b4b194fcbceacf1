"""The MAGIC loss by hand, against the dense reference, and over packings."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from or1_megatron.parallel.packing import pack, plan
from or1_megatron.parallel.vocab import Shard, log_probs_and_entropy
from or1_megatron.rl.loss import LossTerms, magic_loss
from or1_megatron.types import Sequence
from tests.dense_reference import dense_step
from tests.tiny_models import write_tiny_model

VOCAB, ALPHA, TEMPERATURE = 61, 0.05, 0.8
CLIPS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}


def loss_of(log_probs: list[float], old: list[float] | None, advantages: list[float], **options) -> tuple:
    """(terms, dL/dlog pi) with weight 1 everywhere and entropies 1."""
    log_probs_T = torch.tensor(log_probs, requires_grad=True)
    old_T = None if old is None else torch.tensor(old)
    ones_T = torch.ones(len(log_probs))
    settings = {"entropy_coefficient": 0.0, "num_tokens": len(log_probs), **CLIPS} | options
    terms = magic_loss(log_probs_T, old_T, torch.tensor(advantages), ones_T, ones_T, **settings)
    terms.loss.backward()
    return terms, log_probs_T.grad


def make_sequences(count: int, *, old: bool, seed: int = 0) -> list[Sequence]:
    draw = random.Random(seed)
    sequences = []
    for _ in range(count):
        prompt, response = draw.randint(1, 6), draw.randint(1, 12)
        tokens = tuple(draw.randrange(VOCAB) for _ in range(prompt + response))
        # Near the random policy's -ln 61 = -4.1, so that ratios fall on both sides of both clips.
        old_log_probs = tuple(draw.uniform(-6, -3) for _ in range(response)) if old else None
        sequences.append(Sequence(tokens, prompt, draw.choice([-1.3, 0.4, 2.0]), old_log_probs))
    return sequences


# ratio, advantage, surrogate, does the gradient flow, counted as clipped
CLIPPING = [
    (1.50, 2.0, 2.56, False, 1),  # good and already more likely: clipped at 1.28
    (1.50, -2.0, -3.0, True, 0),  # bad and more likely: full force
    (0.50, 2.0, 1.0, True, 0),
    (0.50, -2.0, -1.6, False, 1),  # bad and already less likely: clipped at 0.8
    (1.25, 2.0, 2.5, True, 0),  # above 1 + clip_low, below 1 + clip_high
    (1.00, 2.0, 2.0, True, 0),
]


@pytest.mark.parametrize(("ratio", "advantage", "surrogate", "flows", "clipped"), CLIPPING)
def test_clipping_by_hand(ratio: float, advantage: float, surrogate: float, flows: bool, clipped: int):
    terms, grad_T = loss_of([math.log(ratio) - 1], [-1.0], [advantage], num_tokens=5)
    assert terms.loss.item() == pytest.approx(-surrogate / 5)
    assert float(grad_T[0]) == pytest.approx(-ratio * advantage / 5 if flows else 0.0, abs=1e-7)
    assert float(terms.sums["policy"]) == pytest.approx(surrogate)
    assert float(terms.sums["clipped"]) == clipped
    assert float(terms.sums["ratio"]) == pytest.approx(ratio)


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_on_policy_gradient_is_the_policy_gradient(clip: float):
    terms, grad_T = loss_of([-1.0, -2.0, -0.5], None, [1.5, -0.5, 2.0], clip_low=clip, clip_high=clip)
    assert terms.loss.item() == pytest.approx(-(1.5 - 0.5 + 2.0) / 3)
    assert grad_T.tolist() == pytest.approx([-1.5 / 3, 0.5 / 3, -2.0 / 3])
    assert float(terms.sums["ratio"]) == 3.0 and float(terms.sums["clipped"]) == 0.0


def test_entropy_is_a_bonus_and_sums_are_detached():
    entropy_T = torch.tensor([0.3, 0.1], requires_grad=True)
    log_probs_T = torch.tensor([-1.0, -1.0], requires_grad=True)
    terms = magic_loss(
        log_probs_T, None, torch.zeros(2), torch.ones(2), entropy_T, entropy_coefficient=0.5, num_tokens=4, **CLIPS
    )
    assert terms.loss.item() == pytest.approx(-0.5 * 0.4 / 4)
    terms.loss.backward()
    assert entropy_T.grad is not None and entropy_T.grad.tolist() == [-0.125, -0.125]
    assert float(terms.sums["entropy"]) == pytest.approx(0.4)
    assert not any(value.requires_grad or value.ndim for value in terms.sums.values())


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
@pytest.mark.parametrize("off_policy", [True, False])
def test_masked_positions_have_no_influence(bad: float, off_policy: bool):
    weights_T = torch.tensor([1.0, 0.0, 1.0, 0.0])

    def run(masked: float) -> tuple[LossTerms, list[torch.Tensor]]:
        def values(a: float, b: float) -> torch.Tensor:
            return torch.tensor([a, masked, b, masked])

        inputs = [values(-1.0, -2.0).requires_grad_(), values(0.5, 0.2).requires_grad_()]
        old_T = values(-1.1, -1.9) if off_policy else None
        terms = magic_loss(
            inputs[0], old_T, values(1.0, -1.0), weights_T, inputs[1], entropy_coefficient=0.1, num_tokens=2, **CLIPS
        )
        return terms, list(torch.autograd.grad(terms.loss, inputs))

    terms, grads = run(bad)
    expected, expected_grads = run(0.0)
    assert math.isfinite(expected.loss.item()) and expected.loss.item() != 0
    assert torch.equal(terms.loss, expected.loss) and terms.sums == expected.sums
    for grad, value in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad, value) and grad[1] == grad[3] == 0


@pytest.mark.parametrize("off_policy", [True, False])
def test_packing_and_ranks_do_not_change_the_loss(off_policy: bool):
    """Every sequence has its own logits; each plan packs them differently, on any number of ranks."""
    sequences = make_sequences(12, old=off_policy)
    lengths = [len(s.tokens) for s in sequences]
    num_tokens = sum(len(s.tokens) - s.num_prompt_tokens for s in sequences)

    def run(num_ranks: int, budget: int, alignment: int) -> tuple[list[float], torch.Tensor, int]:
        torch.manual_seed(1)
        logits = [torch.randn(length, VOCAB, requires_grad=True) for length in lengths]
        layout = plan(lengths, num_ranks=num_ranks, token_budget=budget, alignment=alignment, linear_work=10.0)
        totals: dict[str, float] = {}
        for ids in (ids for rank in layout.micro_batches for ids in rank):
            batch = pack(sequences, ids, alignment=alignment)
            logits_TV = torch.zeros(batch.num_tokens, VOCAB, requires_grad=True).clone()
            for i, start in zip(ids, batch.cu_seqlens, strict=False):
                logits_TV[start : start + lengths[i]] = logits[i]
            log_probs_T, entropy_T = log_probs_and_entropy(logits_TV, batch.labels_T, Shard(VOCAB))
            terms = magic_loss(
                log_probs_T, batch.old_log_probs_T, batch.advantages_T, batch.weights_T, entropy_T,
                entropy_coefficient=ALPHA, num_tokens=num_tokens, **CLIPS,
            )  # fmt: skip
            terms.loss.backward()
            for name, value in {"loss": terms.loss.detach(), **terms.sums}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        grads = [row.grad for row in logits if row.grad is not None]
        return [totals[name] for name in sorted(totals)], torch.cat(grads), len(layout.micro_batches[0])

    whole, whole_grad, count = run(1, 1000, 1)
    assert count == 1
    for num_ranks, budget, alignment in [(1, 20, 1), (3, 40, 4), (5, 24, 1), (16, 20, 2)]:
        parts, grad, count = run(num_ranks, budget, alignment)
        assert count * num_ranks > 1
        assert parts == pytest.approx(whole, rel=1e-6)
        torch.testing.assert_close(grad, whole_grad, atol=1e-8, rtol=1e-6)


@pytest.fixture(scope="module")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "qwen2", tied=False, layers=1, vocab=301)


@pytest.mark.parametrize("off_policy", [True, False])
def test_loss_and_gradients_equal_the_dense_reference(off_policy: bool, tiny_qwen2: Path):
    """The same HF model under both; ours through packed micro-batches, the fused statistics and magic_loss."""
    sequences = make_sequences(6, old=off_policy, seed=3)
    num_tokens = sum(len(s.tokens) - s.num_prompt_tokens for s in sequences)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    loss, clipped = 0.0, 0.0
    for ids in [(0, 4, 2), (), (5, 1), (3,)]:
        batch = pack(sequences, ids, alignment=4)
        pieces = [slice(*ends) for ends in itertools.pairwise(batch.cu_seqlens)]
        logits = [model(batch.tokens_T[piece].unsqueeze(0)).logits[0] for piece in pieces]
        log_probs_T, entropy_T = log_probs_and_entropy(
            torch.cat(logits), batch.labels_T, Shard(301, temperature=TEMPERATURE)
        )
        terms = magic_loss(
            log_probs_T, batch.old_log_probs_T, batch.advantages_T, batch.weights_T, entropy_T,
            entropy_coefficient=ALPHA, num_tokens=num_tokens, **CLIPS,
        )  # fmt: skip
        terms.loss.backward()
        loss, clipped = loss + terms.loss.item(), clipped + float(terms.sums["clipped"])
    assert (clipped > 0) == off_policy
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    fresh = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    reference = dense_step(fresh, sequences, alpha=ALPHA, temperature=TEMPERATURE, lr=1e-3, **CLIPS)
    assert loss == pytest.approx(reference.loss, rel=1e-5)
    assert grads.keys() == reference.grads.keys()
    for name, expected in reference.grads.items():
        grad = grads[name]
        assert grad is not None
        assert float((grad - expected).abs().max() / expected.abs().max()) < 1e-5, name
