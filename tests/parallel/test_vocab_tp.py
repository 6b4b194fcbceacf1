"""Vocabulary-sharded log-probs and entropy against the dense computation in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.dense_reference import dense_log_probs_and_entropy
from tests.parallel import ranks_vocab
from tests.parallel.gloo import run_ranks

# tp, true vocabulary, padded vocabulary
SHARDINGS = {
    "tp2": (2, 1003, 1024),
    "tp4": (4, 1003, 1024),
    "tp4, last rank all padding": (4, 259, 384),
    "tp4, one column each": (4, 3, 4),
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_sharded_equals_dense(sharding: str, temperature: float):
    tp, vocab_size, padded = SHARDINGS[sharding]
    torch.manual_seed(0)
    logits_TV = torch.randn(23, padded) * 3
    logits_TV[:4, : padded // tp] -= 300  # a rank whose share of these tokens underflows to nothing
    logits_TV[:, vocab_size:] = 1e4
    labels_T = torch.randint(0, vocab_size, (23,))
    labels_T[:2] = torch.tensor([0, vocab_size - 1])
    a_T, b_T = torch.randn(23), torch.randn(23)
    ranks = run_ranks(tp, ranks_vocab.sharded, logits_TV, labels_T, a_T, b_T, vocab_size, temperature)

    dense = logits_TV[:, :vocab_size].double().requires_grad_()
    log_probs_T, entropy_T = dense_log_probs_and_entropy(dense, labels_T, temperature)
    torch.autograd.backward([log_probs_T, entropy_T], [a_T.double(), b_T.double()])
    assert dense.grad is not None
    for rank in ranks:
        assert rank["unmodified"]
        assert torch.equal(rank["log_probs"], ranks[0]["log_probs"]), "ranks must agree to the bit"
        assert torch.equal(rank["entropy"], ranks[0]["entropy"])
        torch.testing.assert_close(rank["log_probs"].double(), log_probs_T, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(rank["entropy"].double(), entropy_T, atol=1e-6, rtol=1e-6)
    grad_TV = torch.cat([rank["grad"] for rank in ranks], dim=1)
    assert not grad_TV[:, vocab_size:].any()
    torch.testing.assert_close(grad_TV[:, :vocab_size].double(), dense.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_sharded_fused_head_equals_dense(sharding: str):
    tp, vocab_size, padded = SHARDINGS[sharding]
    torch.manual_seed(0)
    hidden_TH, weight_VH = torch.randn(23, 16), torch.randn(padded, 16)
    labels_T = torch.randint(0, vocab_size, (23,))
    a_T, b_T = torch.randn(23), torch.randn(23)
    ranks = run_ranks(tp, ranks_vocab.fused, hidden_TH, weight_VH, labels_T, a_T, b_T, vocab_size, 0.6)
    hidden, weight = hidden_TH.double().requires_grad_(), weight_VH.double().requires_grad_()
    log_probs_T, entropy_T = dense_log_probs_and_entropy(hidden @ weight[:vocab_size].T, labels_T, 0.6)
    loss = (a_T * log_probs_T + b_T * entropy_T).sum()
    loss.backward()
    for rank in ranks:
        torch.testing.assert_close(rank["log_probs"].double(), log_probs_T, atol=5e-6, rtol=1e-6)
        torch.testing.assert_close(rank["entropy"].double(), entropy_T, atol=5e-6, rtol=1e-6)
        torch.testing.assert_close(rank["loss"].double(), loss, atol=1e-4, rtol=1e-6)
        torch.testing.assert_close(rank["hidden_grad"].double(), hidden.grad, atol=2e-5, rtol=1e-5)
    weight_grad = torch.cat([rank["weight_grad"] for rank in ranks])
    torch.testing.assert_close(weight_grad.double(), weight.grad, atol=2e-5, rtol=1e-5)
