"""Log-probability and entropy on vocabulary-sharded logits, differentiable, without a gathered vocabulary.

T tokens, V columns of this rank, R ranks. With u = z / temperature over the true columns z, per rank

    m = max z;  s = sum e^(u - m/temperature);  t = sum (u - m/temperature) e^(u - m/temperature)
    y = z[label] if this rank owns the label, else 0

and over ranks, with M = max_r m_r, d_r = (m_r - M) / temperature and w_r = e^(d_r):

    S = sum w s;  logZ = M/temperature + ln S;  ubar = M/temperature + sum w (t + d s) / S
    log pi(label) = (sum y - M)/temperature - ln S;   H = logZ - ubar

Only differences to the maximum enter results and gradients, so nothing is lost when the logits are large. Gradient,
with a = dL/dlog pi and b = dL/dH of the token:

    dL/dz_j = (a 1{j = label} - e^(u_j - logZ) (b u_j + a - b ubar)) / temperature

One all-gather of [4, T] float32 forward, combined in rank order so that all ranks agree to the bit; no collective in
backward. Kept for it: the logits and (M, S, ubar - M/temperature) per token. Logits are read in blocks of tokens, so
no float32 copy of all of them ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

# float32 elements of one block: a cache's worth on a CPU; on a GPU enough to hide the launches, 256 MiB.
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def log_probs_and_entropy(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    first_column: int,
    vocab_size: int,
    temperature: float = 1.0,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log pi(label), entropy in nats), each [T] float32.

    logits_TV: this rank's columns [first_column, first_column + V) of the padded vocabulary; columns at vocab_size
    and above are padding: they take no part and get gradient 0. labels_T: global ids below vocab_size. group: the
    ranks that share the vocabulary, all of which call this; None when it is not sharded. with_entropy False saves its
    passes: the entropy is then NaN, which cannot be mistaken for one. Inputs are left unmodified.
    """
    return _LogProbsAndEntropy.apply(  # type: ignore[return-value]
        logits_TV, labels_T, group, first_column, vocab_size, temperature, with_entropy
    )


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        labels_T: torch.Tensor,
        group: dist.ProcessGroup | None,
        first_column: int,
        vocab_size: int,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns = max(0, min(logits_TV.shape[1], vocab_size - first_column))
        local_T = labels_T - first_column
        owned_T = (local_T >= 0) & (local_T < columns)
        local_T = local_T.clamp(0, max(0, columns - 1))
        stats_4T = _statistics(logits_TV[:, :columns], local_T, owned_T, temperature, with_entropy)
        gathered = [stats_4T]
        if group is not None:
            gathered = [torch.empty_like(stats_4T) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, stats_4T, group=group)
        m_RT, s_RT, t_RT, y_RT = torch.stack(gathered).unbind(1)
        top_T = m_RT.amax(0)
        # A rank of padding only has m = -inf, s = t = 0; the clamp makes its term 0 instead of -inf * 0.
        below_RT = ((m_RT - top_T) / temperature).clamp(min=-1e30)
        scale_RT = below_RT.exp()
        total_T = (scale_RT * s_RT).sum(0)
        log_total_T = total_T.log()
        centred_T = (scale_RT * (t_RT + below_RT * s_RT)).sum(0) / total_T  # ubar - M/temperature
        log_probs_T = (y_RT.sum(0) - top_T) / temperature - log_total_T
        ctx.save_for_backward(logits_TV, local_T, owned_T, top_T, total_T, centred_T)
        ctx.columns, ctx.temperature, ctx.with_entropy = columns, temperature, with_entropy
        if with_entropy:
            return log_probs_T, log_total_T - centred_T
        entropy_T = torch.full_like(log_probs_T, torch.nan)
        ctx.mark_non_differentiable(entropy_T)
        return log_probs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_TV, local_T, owned_T, *rest = ctx.saved_tensors
        a_T1, b_T1, top_T1, total_T1, centred_T1 = (value.unsqueeze(1) for value in (*grads, *rest))
        label_T1 = torch.where(owned_T.unsqueeze(1), a_T1 / ctx.temperature, 0.0)
        # With v = u - M/temperature: e^(u - logZ) (b u + a - b ubar) = e^v (b v + a - b (ubar - M/temperature)) / S
        slope_T1 = -b_T1 / (total_T1 * ctx.temperature)
        offset_T1 = (b_T1 * centred_T1 - a_T1) / (total_T1 * ctx.temperature)
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, ctx.columns :] = 0
        for rows in _blocks(logits_TV) if ctx.columns else ():
            shifted = _shifted(logits_TV[rows, : ctx.columns].float(), top_T1[rows], ctx.temperature)
            grad = shifted.exp()
            if ctx.with_entropy:
                grad.mul_(torch.addcmul(offset_T1[rows], shifted, slope_T1[rows]))
            else:
                grad.mul_(offset_T1[rows])
            grad.scatter_add_(1, local_T[rows, None], label_T1[rows])
            grad_TV[rows, : ctx.columns] = grad
        return grad_TV, None, None, None, None, None, None


def _blocks(logits_TV: torch.Tensor) -> list[slice]:
    rows = max(1, _BLOCK_ELEMENTS[logits_TV.device.type] // max(1, logits_TV.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(logits_TV), rows)]


def _shifted(z: torch.Tensor, top: torch.Tensor, temperature: float) -> torch.Tensor:
    """(z - top) / temperature in memory of its own."""
    shifted = torch.sub(z, top)
    return shifted if temperature == 1 else shifted.div_(temperature)


def _statistics(
    logits_TV: torch.Tensor, local_T: torch.Tensor, owned_T: torch.Tensor, temperature: float, with_entropy: bool
) -> torch.Tensor:
    """[4, T] float32: m, s, t, y of this rank's true columns; t is 0 without entropy."""
    stats_4T = logits_TV.new_zeros(4, len(logits_TV), dtype=torch.float32)
    if logits_TV.shape[1] == 0:
        stats_4T[0] = -torch.inf
        return stats_4T
    for rows in _blocks(logits_TV):
        z = logits_TV[rows].float()
        m = z.amax(1, keepdim=True)
        shifted = _shifted(z, m, temperature)
        weights = shifted.exp()
        stats_4T[0, rows] = m.squeeze(1)
        stats_4T[1, rows] = weights.sum(1)
        if with_entropy:
            stats_4T[2, rows] = weights.mul_(shifted).sum(1)
        stats_4T[3, rows] = torch.where(owned_T[rows], z.gather(1, local_T[rows, None]).squeeze(1), 0.0)
    return stats_4T
