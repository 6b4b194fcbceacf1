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
backward. `log_probs_and_entropy` takes logits that exist: the plain head, and the dense twin of vocab_head.py, which
never has more than a chunk of them. The passes over the logits are in vocab_kernels.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from or1_megatron.parallel import vocab_kernels


@dataclass(frozen=True)
class Shard:
    """This rank's columns [first_column, first_column + V) of the padded vocabulary.

    Columns at vocab_size and above are padding: they take no part and get gradient 0. group: the ranks that share
    the vocabulary, all of which make the same calls; None when it is not sharded.
    """

    vocab_size: int
    first_column: int = 0
    group: dist.ProcessGroup | None = None
    temperature: float = 1.0

    def real_columns(self, columns: int) -> int:
        return max(0, min(columns, self.vocab_size - self.first_column))

    def own(self, labels_T: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels as columns of this rank, and whether it owns them; where it does not, some column it has."""
        real = self.real_columns(columns)
        local_T = labels_T - self.first_column
        return local_T.clamp(0, max(0, real - 1)), (local_T >= 0) & (local_T < real)


@dataclass(frozen=True)
class Combined:
    """Per token, over all ranks, float32: M, S, ubar - M/temperature, and the two results."""

    top_T: torch.Tensor
    total_T: torch.Tensor
    centred_T: torch.Tensor
    log_probs_T: torch.Tensor
    entropy_T: torch.Tensor


def log_probs_and_entropy(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, shard: Shard
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log pi(label), entropy in nats), each [T] float32; labels_T: global ids below vocab_size. Inputs are left
    unmodified."""
    return _LogProbsAndEntropy.apply(logits_TV, labels_T, shard)  # type: ignore[return-value]


class _LogProbsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor, shard: Shard
    ) -> tuple[torch.Tensor, torch.Tensor]:
        combined = combine(logits_TV, labels_T, shard)
        ctx.save_for_backward(logits_TV, labels_T, combined.top_T, combined.total_T, combined.centred_T)
        ctx.shard = shard
        return combined.log_probs_T, combined.entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_TV, labels_T, *rest = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        write_gradient(logits_TV, labels_T, ctx.shard, *rest, *grads, out_TV=grad_TV)
        return grad_TV, None, None


def combine(logits_TV: torch.Tensor, labels_T: torch.Tensor, shard: Shard) -> Combined:
    """The statistics of all ranks' columns. Collective over the group."""
    temperature = shard.temperature
    stats_4T = _statistics(logits_TV, labels_T, shard)
    gathered = [stats_4T]
    if shard.group is not None:
        gathered = [torch.empty_like(stats_4T) for _ in range(dist.get_world_size(shard.group))]
        dist.all_gather(gathered, stats_4T, group=shard.group)
    m_RT, s_RT, t_RT, y_RT = torch.stack(gathered).unbind(1)
    top_T = m_RT.amax(0)
    # A rank of padding only has m = -inf, s = t = 0; the clamp makes its term 0 instead of -inf * 0.
    below_RT = ((m_RT - top_T) / temperature).clamp(min=-1e30)
    scale_RT = below_RT.exp()
    total_T = (scale_RT * s_RT).sum(0)
    log_total_T = total_T.log()
    centred_T = (scale_RT * (t_RT + below_RT * s_RT)).sum(0) / total_T
    log_probs_T = (y_RT.sum(0) - top_T) / temperature - log_total_T
    return Combined(top_T, total_T, centred_T, log_probs_T, log_total_T - centred_T)


def _statistics(logits_TV: torch.Tensor, labels_T: torch.Tensor, shard: Shard) -> torch.Tensor:
    """[4, T] float32: m, s, t, y of this rank's true columns."""
    stats_4T = logits_TV.new_zeros(4, len(logits_TV), dtype=torch.float32)
    real = shard.real_columns(logits_TV.shape[1])
    if real == 0:
        stats_4T[0] = -torch.inf
        return stats_4T
    local_T, owned_T = shard.own(labels_T, logits_TV.shape[1])
    for row, value_T in enumerate(vocab_kernels.statistics(logits_TV[:, :real], shard.temperature)):
        stats_4T[row] = value_T
    stats_4T[3] = torch.where(owned_T, logits_TV.gather(1, local_T[:, None]).squeeze(1).float(), 0.0)
    return stats_4T


def write_gradient(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    shard: Shard,
    top_T: torch.Tensor,
    total_T: torch.Tensor,
    centred_T: torch.Tensor,
    a_T: torch.Tensor,
    b_T: torch.Tensor,
    *,
    out_TV: torch.Tensor,
) -> None:
    """dL/dlogits for a = dL/dlog pi and b = dL/dH; `out_TV` may be `logits_TV` itself."""
    columns = logits_TV.shape[1]
    real, temperature = shard.real_columns(columns), shard.temperature
    out_TV[:, real:] = 0
    if real == 0:
        return
    local_T, owned_T = shard.own(labels_T, columns)
    # With v = u - M/temperature: e^(u - logZ) (b u + a - b ubar) = e^v (b v + a - b (ubar - M/temperature)) / S
    slope_T = -b_T / (total_T * temperature)
    offset_T = (b_T * centred_T - a_T) / (total_T * temperature)
    label_T = torch.where(owned_T, a_T / temperature, 0.0)
    # The label's element again in float32 with its own term, which can cancel most of it.
    at_label_T = (logits_TV.gather(1, local_T[:, None]).squeeze(1).float() - top_T) / temperature
    exact_T = at_label_T.exp() * (at_label_T * slope_T + offset_T) + label_T
    inside = logits_TV if real == columns else logits_TV[:, :real]
    target = inside if out_TV is logits_TV else out_TV[:, :real]
    vocab_kernels.gradient(inside, top_T, slope_T, offset_T, temperature, target)
    out_TV.scatter_(1, local_T[:, None], exact_T.to(out_TV.dtype)[:, None])
