"""Log-probability and entropy on vocabulary-sharded logits, differentiable, without a gathered vocabulary.

T tokens, V columns of this rank. With u = logits / temperature over the true columns, per rank

    m = max u;  s = sum e^(u-m);  t = sum (u-m) e^(u-m);  y = u[label] if this rank owns the label, else 0

and over ranks, with M = max_r m_r and w_r = e^(m_r - M):

    S = sum w s;  logZ = M + ln S;  ubar = M + sum w (t + (m - M) s) / S
    log pi(label) = sum y - logZ;   H = logZ - ubar

Gradient, a = dL/dlog pi and b = dL/dH of the token:

    dL/dlogit_j = (a 1{j = label} - e^(u_j - logZ) (b u_j + a - b ubar)) / temperature

One all-gather of [4, T] float32 forward, combined in rank order so that all ranks agree to the bit; no collective in
backward. Logits are read in blocks of tokens, so no float32 copy of all of them ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_BLOCK_ELEMENTS = 1 << 22  # float32 working set of one block: 16 MiB


def log_probs_and_entropy(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    first_column: int,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log pi(label), entropy), each [T] float32.

    logits_TV: this rank's columns [first_column, first_column + V) of the padded vocabulary; columns at vocab_size
    and above are padding and take no part. labels_T: global ids below vocab_size. group: the ranks that share the
    vocabulary; None when it is not sharded. Inputs are left unmodified.
    """
    return _LogProbsAndEntropy.apply(logits_TV, labels_T, group, first_column, vocab_size, temperature)  # type: ignore[return-value]


def _blocks(logits_TV: torch.Tensor) -> list[slice]:
    rows = max(1, _BLOCK_ELEMENTS // max(1, logits_TV.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(logits_TV), rows)]


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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns = max(0, min(logits_TV.shape[1], vocab_size - first_column))
        local_T = labels_T - first_column
        owned_T = (local_T >= 0) & (local_T < columns)
        local_T = local_T.clamp(0, max(0, columns - 1))
        stats_4T = _statistics(logits_TV[:, :columns], local_T, owned_T, temperature)
        if group is not None:
            gathered = [torch.empty_like(stats_4T) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, stats_4T, group=group)
            stats_R4T = torch.stack(gathered)
        else:
            stats_R4T = stats_4T.unsqueeze(0)
        m_RT, s_RT, t_RT, y_RT = stats_R4T.unbind(1)
        top_T = m_RT.amax(0)
        below_RT = m_RT - top_T
        scale_RT = below_RT.exp()
        total_T = (scale_RT * s_RT).sum(0)
        # A rank of padding only has m = -inf, s = t = 0: its term is 0, not 0 * inf.
        shifted_RT = torch.where(scale_RT > 0, scale_RT * (t_RT + below_RT.clamp(min=-1e30) * s_RT), 0.0)
        centred_T = shifted_RT.sum(0) / total_T  # ubar - M
        log_total_T = total_T.log()
        log_z_T = top_T + log_total_T
        ctx.save_for_backward(logits_TV, local_T, owned_T, log_z_T, top_T + centred_T)
        ctx.columns, ctx.temperature = columns, temperature
        return y_RT.sum(0) - log_z_T, log_total_T - centred_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_log_prob_T, grad_entropy_T = grads
        logits_TV, local_T, owned_T, log_z_T, mean_T = ctx.saved_tensors
        grad_TV = torch.zeros_like(logits_TV)
        for rows in _blocks(logits_TV):
            a, b = grad_log_prob_T[rows, None], grad_entropy_T[rows, None]
            u = logits_TV[rows, : ctx.columns].float() / ctx.temperature
            p = torch.exp(u - log_z_T[rows, None])
            d = -p * (b * (u - mean_T[rows, None]) + a)
            d.scatter_add_(1, local_T[rows, None], torch.where(owned_T[rows, None], a, 0.0))
            grad_TV[rows, : ctx.columns] = (d / ctx.temperature).to(grad_TV.dtype)
        return grad_TV, None, None, None, None, None


def _statistics(
    logits_TV: torch.Tensor, local_T: torch.Tensor, owned_T: torch.Tensor, temperature: float
) -> torch.Tensor:
    """[4, T] float32: m, s, t, y of this rank's true columns."""
    stats_4T = logits_TV.new_zeros(4, len(logits_TV), dtype=torch.float32)
    if logits_TV.shape[1] == 0:
        stats_4T[0] = -torch.inf
        return stats_4T
    for rows in _blocks(logits_TV):
        u = logits_TV[rows].float() / temperature
        m = u.amax(1, keepdim=True)
        y = u.gather(1, local_T[rows, None]).squeeze(1)
        shifted = u.sub_(m)
        e = shifted.exp()
        stats_4T[0, rows] = m.squeeze(1)
        stats_4T[1, rows] = e.sum(1)
        stats_4T[2, rows] = e.mul_(shifted).sum(1)
        stats_4T[3, rows] = torch.where(owned_T[rows], y, 0.0)
    return stats_4T
