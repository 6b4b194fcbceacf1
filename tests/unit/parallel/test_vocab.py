"""Log-probs and entropy on one rank against the dense computation in float64, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from or1_megatron.parallel import compiler, vocab_kernels
from or1_megatron.parallel.vocab import Shard, log_probs_and_entropy
from tests.dense_reference import dense_log_probs_and_entropy

# float32 results of sums over about a thousand terms, each rounded to 6e-8 of its size.
TOLERANCE = 1e-6


def make_case(
    tokens: int, columns: int, vocab_size: int, scale: float = 3.0, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """logits with huge values in the padding, labels, and upstream gradients of both results."""
    torch.manual_seed(seed)
    logits_TV = torch.randn(tokens, columns) * scale
    logits_TV[:, vocab_size:] = 1e4
    labels_T = torch.randint(0, vocab_size, (tokens,))
    labels_T[:2] = torch.tensor([0, vocab_size - 1])
    return logits_TV, labels_T, torch.randn(tokens), torch.randn(tokens)


def ours(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, vocab_size: int, temperature: float = 1.0
) -> tuple[torch.Tensor, ...]:
    return log_probs_and_entropy(logits_TV, labels_T, Shard(vocab_size, temperature=temperature))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("upstream", ["log_prob", "entropy", "both"])
def test_values_and_gradients_equal_dense(temperature: float, upstream: str):
    logits_TV, labels_T, a_T, b_T = make_case(37, 1024, 1003)
    a_T, b_T = a_T * (upstream != "entropy"), b_T * (upstream != "log_prob")
    mine, dense = logits_TV.clone().requires_grad_(), logits_TV[:, :1003].double().requires_grad_()
    results = ours(mine, labels_T, 1003, temperature=temperature)
    expected = dense_log_probs_and_entropy(dense, labels_T, temperature)
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), value, atol=TOLERANCE, rtol=TOLERANCE)
    torch.autograd.backward(results, [a_T, b_T])
    torch.autograd.backward(expected, [a_T.double(), b_T.double()])
    assert mine.grad is not None and dense.grad is not None
    torch.testing.assert_close(mine.grad[:, :1003].double(), dense.grad, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(mine.grad[:, 1003:], torch.zeros(37, 21))


def test_analytic_gradient_equals_finite_differences():
    logits_TV, labels_T, a_T, b_T = make_case(4, 9, 7, scale=1.0)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        log_probs_T, entropy_T = ours(logits, labels_T, 7, temperature=0.7)
        return (a_T * log_probs_T + b_T * entropy_T).sum()

    logits_TV.requires_grad_()
    (grad_TV,) = torch.autograd.grad(objective(logits_TV), logits_TV)
    step = 1e-2  # truncation 1e-4 of the third derivative, rounding 1e-5
    with torch.no_grad():
        for t in range(4):
            for v in range(9):
                shift = torch.zeros_like(logits_TV)
                shift[t, v] = step
                slope = (objective(logits_TV + shift) - objective(logits_TV - shift)) / (2 * step)
                assert float(slope) == pytest.approx(float(grad_TV[t, v]), abs=1e-3), (t, v)


def test_entropy_of_bf16_logits_is_as_good_as_of_float64():
    """A bf16 softmax over this vocabulary is wrong by 0.1 nats, half the target entropy."""
    logits_TV, labels_T, _, _ = make_case(8, 152_064, 151_665)
    logits_TV = logits_TV.bfloat16()
    log_probs_T, entropy_T = ours(logits_TV, labels_T, 151_665)
    log_probs, entropy = dense_log_probs_and_entropy(logits_TV[:, :151_665].double(), labels_T)
    assert float((entropy_T.double() - entropy).abs().max()) <= 1e-5
    assert float((log_probs_T.double() - log_probs).abs().max()) <= 1e-5
    naive = torch.softmax(logits_TV[:, :151_665], -1), torch.log_softmax(logits_TV[:, :151_665], -1)
    assert float((-(naive[0] * naive[1]).sum(-1).double() - entropy).abs().max()) > 1e-3, "the case is too easy"


def test_gradient_of_bf16_logits_is_the_rounded_gradient():
    logits_TV, labels_T, a_T, b_T = make_case(16, 1024, 1003)
    mine = logits_TV.bfloat16().requires_grad_()
    dense = mine.detach()[:, :1003].double().requires_grad_()
    torch.autograd.backward(ours(mine, labels_T, 1003), [a_T, b_T])
    torch.autograd.backward(dense_log_probs_and_entropy(dense, labels_T), [a_T.double(), b_T.double()])
    assert mine.grad is not None and dense.grad is not None and mine.grad.dtype == torch.bfloat16
    # One rounding of a float32 value to 8 significant bits.
    torch.testing.assert_close(mine.grad[:, :1003].double(), dense.grad, rtol=2**-8, atol=TOLERANCE)


@pytest.mark.parametrize("shift", [0.0, 1e3, -1e4])
def test_a_common_shift_of_the_logits_costs_no_digits(shift: float):
    """Multiples of 1/8 stay exact under the shift, so the results have to be the very same."""
    logits_TV, labels_T, _, _ = make_case(16, 512, 512)
    logits_TV = (logits_TV * 8).round() / 8
    for plain, shifted in zip(ours(logits_TV, labels_T, 512), ours(logits_TV + shift, labels_T, 512), strict=True):
        assert torch.equal(plain, shifted)


def test_a_nearly_certain_token_has_finite_results_and_gradients():
    logits_TV = torch.full((2, 64), -1e4)
    logits_TV[:, 5] = 1e4
    logits_TV.requires_grad_()
    log_probs_T, entropy_T = ours(logits_TV, torch.tensor([5, 6]), 60)
    assert log_probs_T.tolist() == [0.0, -2e4] and entropy_T.tolist() == [0.0, 0.0]
    torch.autograd.backward([log_probs_T, entropy_T], [torch.ones(2), torch.ones(2)])
    expected = torch.zeros(2, 64)
    expected[1, 5], expected[1, 6] = -1.0, 1.0
    assert logits_TV.grad is not None
    torch.testing.assert_close(logits_TV.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_inputs_are_left_unmodified(dtype: torch.dtype, temperature: float):
    logits_TV, labels_T, a_T, b_T = make_case(9, 300, 290)
    logits_TV = logits_TV.to(dtype)
    mine, labels = logits_TV.clone().requires_grad_(), labels_T.clone()
    results = ours(mine, labels, 290, temperature=temperature)
    upstream = [a_T.clone(), b_T.clone()]
    torch.autograd.backward(results, upstream)
    assert torch.equal(mine, logits_TV) and torch.equal(labels, labels_T)
    assert torch.equal(upstream[0], a_T) and torch.equal(upstream[1], b_T)


class LargestFloat32(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def test_bf16_logits_never_get_a_float32_copy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OR1_COMPILE", "0")  # what a compiled pass keeps, it keeps in registers
    compiler.forget()
    logits_TV = torch.randn(128, 16_384, dtype=torch.bfloat16).requires_grad_()
    labels_T, ones_T = torch.zeros(128, dtype=torch.int64), torch.ones(128)
    with LargestFloat32() as forward:
        results = ours(logits_TV, labels_T, 16_384)
    with LargestFloat32() as backward:
        torch.autograd.backward(results, [ones_T, ones_T])
    compiler.forget()
    for largest in (forward, backward):
        assert 16_384 <= largest.elements <= vocab_kernels._BLOCK_ELEMENTS < logits_TV.numel()


def test_no_gradient_is_kept_where_none_is_wanted():
    logits_TV, labels_T, _, _ = make_case(3, 16, 16)
    assert not any(result.requires_grad for result in ours(logits_TV, labels_T, 16))
    with torch.no_grad():
        assert not any(result.requires_grad for result in ours(logits_TV.requires_grad_(), labels_T, 16))
