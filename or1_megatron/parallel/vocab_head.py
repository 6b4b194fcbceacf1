"""The LM head fused with log-probability, entropy and their gradients, chunk by chunk over the tokens.

T tokens, H hidden size, V columns of this rank. For each chunk of tokens:

    logits = hidden @ weight'           into a buffer that all chunks and all calls share
    log pi, H  <- statistics            one all-gather of [4, chunk] over the ranks of the vocabulary
    a, b       <- the token loss        known at once: old log-probs, advantages, alpha_k and 1/N are given beforehand
    gradient of the logits              in place of the logits
    d hidden = gradient @ weight;  d weight += gradient' @ hidden    into the parameter's gradient buffer

So the gradient is made in the forward pass, nothing is computed twice, and one chunk of logits is all that is ever
alive. Without gradients only the first two lines run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from or1_megatron.parallel.vocab import Shard, combine, write_gradient
from or1_megatron.parallel.weight_gradients import add_product

TokenLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]

# Bytes of a chunk of logits: at least, at most; between them a tenth of the logits of all tokens. On a CPU each chunk
# costs a pass over the weight's gradient, which large chunks make up for. On CUDA below 200 MB with all else, and whole
# tiles of the products: 640 tokens of 150,000 columns, where 600 take as long.
_CHUNK_BYTES = {"cpu": (128 << 20, 512 << 20), "cuda": (195_000_000, 195_000_000)}
_TILE_TOKENS = {"cpu": 1, "cuda": 128}
_buffers: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def head_log_probs_and_entropy(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, shard: Shard
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log pi(label), entropy in nats), each [T] float32, without gradients."""
    with torch.no_grad():
        parts = [
            combine(_logits(hidden_TH[rows], weight_VH), labels_T[rows], shard)
            for rows in chunks(len(hidden_TH), weight_VH)
        ]
    return torch.cat([part.log_probs_T for part in parts]), torch.cat([part.entropy_T for part in parts])


def head_loss(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    weight_grad_VH: torch.Tensor | None,
    labels_T: torch.Tensor,
    shard: Shard,
    token_loss: TokenLoss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, log pi(label), entropy): a scalar and two [T] float32 without gradient.

    hidden_TH: of all tokens, on every rank of the vocabulary; its gradient is this rank's share, to be summed over
    them. weight_grad_VH: float32 or of the weight's dtype; the gradient is ADDED to it now, so backward must be called
    with gradient 1 exactly once; None: not wanted. token_loss(log_probs_C, entropy_C, rows): the loss of a chunk's
    tokens, a differentiable scalar; losses of chunks add up.
    """
    if not torch.is_grad_enabled():
        raise AssertionError("head_loss computes gradients; without them use head_log_probs_and_entropy")
    return _HeadLoss.apply(hidden_TH, weight_VH.detach(), weight_grad_VH, labels_T, shard, token_loss)  # type: ignore[return-value]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        weight_grad_VH: torch.Tensor | None,
        labels_T: torch.Tensor,
        shard: Shard,
        token_loss: TokenLoss,
    ) -> tuple[torch.Tensor, ...]:
        hidden_grad_TH = torch.empty_like(hidden_TH)
        log_probs_T, entropy_T = (hidden_TH.new_empty(len(hidden_TH), dtype=torch.float32) for _ in range(2))
        loss = hidden_TH.new_zeros((), dtype=torch.float32)
        for rows in chunks(len(hidden_TH), weight_VH):
            logits_CV = _logits(hidden_TH[rows], weight_VH)
            found = combine(logits_CV, labels_T[rows], shard)
            log_probs_T[rows], entropy_T[rows] = found.log_probs_T, found.entropy_T
            chunk_loss, a_C, b_C = _with_gradients(token_loss, found.log_probs_T, found.entropy_T, rows)
            loss += chunk_loss
            whole = (found.top_T, found.total_T, found.centred_T, a_C, b_C)
            write_gradient(logits_CV, labels_T[rows], shard, *whole, out_TV=logits_CV)
            torch.mm(logits_CV, weight_VH, out=hidden_grad_TH[rows])
            if weight_grad_VH is not None:
                add_product(weight_grad_VH, logits_CV.t(), hidden_TH[rows])
        ctx.save_for_backward(hidden_grad_TH)
        ctx.mark_non_differentiable(log_probs_T, entropy_T)
        return loss, log_probs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        assert float(grad) == 1, f"the weight's gradient was added for a loss of scale 1, not {float(grad)}"
        return ctx.saved_tensors[0], None, None, None, None, None


def _with_gradients(
    token_loss: TokenLoss, log_probs_C: torch.Tensor, entropy_C: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        inputs = log_probs_C.detach().requires_grad_(), entropy_C.detach().requires_grad_()
        loss = token_loss(*inputs, rows)
        a_C, b_C = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return loss.detach(), a_C, b_C


def chunks(num_tokens: int, weight_VH: torch.Tensor) -> Iterator[slice]:
    """Of one size but the last, as few as fit the buffer, of whole tiles where one fits. The same on all ranks of the
    vocabulary, whose shards are equal."""
    (least_bytes, most_bytes), tile = _CHUNK_BYTES[weight_VH.device.type], _TILE_TOKENS[weight_VH.device.type]
    row_bytes = len(weight_VH) * weight_VH.element_size()
    fitting = max(1, min(max(least_bytes, num_tokens * row_bytes // 10), most_bytes) // row_bytes)
    most = fitting // tile * tile or fitting
    count = -(-num_tokens // most)
    size = min(most, -(-num_tokens // count // tile) * tile)
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def _logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """[C, V] in the shared buffer: valid until the next call. A buffer that stays costs no page faults."""
    return torch.mm(hidden_CH, weight_VH.t(), out=logits_buffer(len(hidden_CH), weight_VH))


def logits_buffer(num_tokens: int, weight_VH: torch.Tensor) -> torch.Tensor:
    """[num_tokens, V], uninitialised: the same memory on every call."""
    size = num_tokens * len(weight_VH)
    key = (weight_VH.device, weight_VH.dtype)
    if key not in _buffers or _buffers[key].numel() < size:
        _buffers.pop(key, None)
        _buffers[key] = weight_VH.new_empty(size)
    return _buffers[key][:size].view(num_tokens, len(weight_VH))


def forget_buffers() -> None:
    """Gives their memory back; the next call makes them anew."""
    _buffers.clear()
