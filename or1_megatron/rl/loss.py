"""The MAGIC loss (3.1) of one micro-batch, its denominator passed in. T: tokens of the micro-batch.

L = -(1/N) * sum_t w_t * { min(rho_t A_t, clip(rho_t, 1 - eps_low, 1 + eps_high) A_t) + alpha_k H_t }
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossTerms:
    """`loss` carries the gradient; `sums` are detached sums over this micro-batch's response tokens."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


def magic_loss(
    log_probs_T: torch.Tensor,
    old_log_probs_T: torch.Tensor | None,
    advantages_T: torch.Tensor,
    weights_T: torch.Tensor,
    entropy_T: torch.Tensor,
    *,
    entropy_coefficient: float,
    num_tokens: int,
    clip_low: float,
    clip_high: float,
) -> LossTerms:
    """old_log_probs_T None: on-policy, the ratio is 1 in value and carries the policy gradient.

    num_tokens: N, response tokens of the whole mini-batch over all ranks and micro-batches. What stands where weights_T
    is 0 has no influence, infinities and NaN included.
    """
    #   L = -(1/N) sum_ijt l_ijt                           the recipe: N and the sum over the whole mini-batch
    #     = -(1/N) sum_rank sum_micro-batch sum_t w_t l_t  each response token has weight 1 in exactly one micro-batch
    #     = sum_rank sum_micro-batch [-(1/N) sum_t w_t l_t]
    # The bracket is what is returned. It knows of the other tokens only N, so any packing over any number of ranks
    # gives the same L and, gradients being linear, the same dL: parts are added, never averaged.
    unused_T = weights_T == 0
    log_probs_T, entropy_T = log_probs_T.masked_fill(unused_T, 0.0), entropy_T.masked_fill(unused_T, 0.0)
    advantages_T = advantages_T.masked_fill(unused_T, 0.0)
    old_T = log_probs_T.detach() if old_log_probs_T is None else old_log_probs_T.masked_fill(unused_T, 0.0)
    ratio_T = torch.exp(log_probs_T - old_T)
    unclipped_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    policy_T = weights_T * torch.minimum(unclipped_T, clipped_T)
    entropy_T = weights_T * entropy_T
    loss = -(policy_T.sum() + entropy_coefficient * entropy_T.sum()) / num_tokens
    sums = {
        "policy": policy_T.sum(),
        "entropy": entropy_T.sum(),
        "clipped": (weights_T * (clipped_T < unclipped_T)).sum(),
        "ratio": (weights_T * ratio_T).sum(),
    }
    return LossTerms(loss, {name: value.detach() for name, value in sums.items()})
