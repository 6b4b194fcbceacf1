"""The fused head on one rank: equal to the plain one, adding to what is there, never more than a chunk of logits."""

from __future__ import annotations

import pytest
import torch

from or1_megatron.parallel import compiler, vocab_head, weight_gradients
from or1_megatron.parallel.vocab import Shard, log_probs_and_entropy
from or1_megatron.parallel.vocab_head import TokenLoss, head_log_probs_and_entropy, head_loss

TOKENS, HIDDEN, PADDED, VOCAB = 29, 24, 256, 250


def case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """hidden states, weight, labels, and the upstream gradients of log-prob and entropy."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in (TOKENS, PADDED))
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    a, b = (torch.randn(TOKENS, generator=generator) for _ in range(2))
    return hidden, weight, labels, a, b


def weighted(a: torch.Tensor, b: torch.Tensor) -> TokenLoss:
    def token_loss(log_probs: torch.Tensor, entropy: torch.Tensor, rows: slice) -> torch.Tensor:
        return (a[rows] * log_probs + b[rows] * entropy).sum()

    return token_loss


@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 29, 1000])
def test_equals_the_plain_head_for_every_chunk(tokens_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_head, "_CHUNK_BYTES", {"cpu": (tokens_per_chunk * PADDED * 4,) * 2})
    hidden, weight, labels, a, b = case()
    shard = Shard(VOCAB, temperature=0.6)
    mine, grad = hidden.clone().requires_grad_(), torch.zeros_like(weight)
    loss, *values = head_loss(mine, weight, grad, labels, shard, weighted(a, b))
    loss.backward()
    plain_hidden, plain_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    plain = log_probs_and_entropy(plain_hidden @ plain_weight.T, labels, shard)
    plain_loss = weighted(a, b)(*plain, slice(None))
    plain_loss.backward()
    for found, wanted in zip([loss, *values], [plain_loss, *plain], strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=5e-6, atol=2e-5)
    assert mine.grad is not None and plain_hidden.grad is not None and plain_weight.grad is not None
    torch.testing.assert_close(mine.grad, plain_hidden.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, plain_weight.grad, rtol=1e-5, atol=1e-5)
    assert not grad[VOCAB:].any()
    assert torch.equal(mine.detach(), hidden)
    for found, wanted in zip(head_log_probs_and_entropy(hidden, weight, labels, shard), values, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adds_to_the_gradient_buffer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches, each of several chunks, into one float32 buffer, also from bf16 logits."""
    monkeypatch.setattr(vocab_head, "_CHUNK_BYTES", {"cpu": (8 * PADDED * dtype.itemsize,) * 2})
    monkeypatch.setattr(weight_gradients, "_ROWS", 100)
    hidden, weight, labels, a, b = case(dtype)
    shard, once, twice = Shard(VOCAB), torch.zeros(PADDED, HIDDEN), torch.ones(PADDED, HIDDEN)
    head_loss(hidden.clone().requires_grad_(), weight, once, labels, shard, weighted(a, b))
    for _ in range(2):
        head_loss(hidden.clone().requires_grad_(), weight, twice, labels, shard, weighted(a, b))
    torch.testing.assert_close(twice, 1 + 2 * once, rtol=1e-5, atol=1e-5)
    dense = weight.double().requires_grad_()
    plain = log_probs_and_entropy((hidden.double() @ dense.T).float(), labels, shard)
    weighted(a, b)(*plain, slice(None)).backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1  # bf16: logits and their gradients are rounded
    assert dense.grad is not None
    torch.testing.assert_close(once.double(), dense.grad, rtol=tolerance, atol=tolerance)


def test_one_chunk_of_logits_is_all_that_is_ever_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, a, b = case()
    chunk = 4 * PADDED
    monkeypatch.setattr(vocab_head, "_CHUNK_BYTES", {"cpu": (chunk * 4,) * 2})
    monkeypatch.setattr(vocab_head, "_buffers", {})
    monkeypatch.setenv("OR1_COMPILE", "0")
    compiler.forget()
    grad = torch.zeros_like(weight)
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        head_loss(hidden.requires_grad_(), weight, grad, labels, Shard(VOCAB), weighted(a, b))
    compiler.forget()
    largest = max(event.cpu_memory_usage for event in profile.events() or ())
    assert largest < TOKENS * PADDED * 4 / 2, "all logits at once"
    (buffer,) = vocab_head._buffers.values()
    assert buffer.numel() <= chunk


@pytest.mark.parametrize("tile", [1, 128])
@pytest.mark.parametrize("tokens", [1, 127, 128, 500, 640, 641, 1000, 32_768])
def test_chunks_cover_all_tokens_in_whole_tiles(tokens: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(1000, 1, dtype=torch.bfloat16)
    monkeypatch.setattr(vocab_head, "_CHUNK_BYTES", {"cpu": (650 * 2000,) * 2})
    monkeypatch.setattr(vocab_head, "_TILE_TOKENS", {"cpu": tile})
    slices = list(vocab_head.chunks(tokens, weight))
    assert [row for rows in slices for row in range(rows.start, rows.stop)] == list(range(tokens))
    assert all(rows.stop - rows.start <= 650 for rows in slices)
    assert all((rows.stop - rows.start) % tile == 0 for rows in slices[:-1])
    assert len(slices) == -(-tokens // (650 // tile * tile))


def test_a_chunk_that_is_no_tile_has_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab_head, "_CHUNK_BYTES", {"cpu": (50 * 2000,) * 2})
    monkeypatch.setattr(vocab_head, "_TILE_TOKENS", {"cpu": 128})
    sizes = [rows.stop - rows.start for rows in vocab_head.chunks(120, torch.empty(1000, 1, dtype=torch.bfloat16))]
    assert sizes == [50, 50, 20]


def test_a_scaled_loss_is_refused() -> None:
    hidden, weight, labels, a, b = case()
    loss, *_ = head_loss(
        hidden.requires_grad_(), weight, torch.zeros_like(weight), labels, Shard(VOCAB), weighted(a, b)
    )
    with pytest.raises(AssertionError, match="scale 1"):
        (2 * loss).backward()
