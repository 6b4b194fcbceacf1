"""The MAGIC loss (3.1) and its relatives, of one micro-batch, the denominator passed in. T: tokens of the micro-batch.

L = -(1/N) sum_t w_t { v_t s_t + alpha_k H_t - beta k_t }

s  clip: min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), rho = pi / pi_old (PPO, 2.3); gradient: A log pi (2.2)
v  truncated importance weight min(pi_old / pi_engine, cap), a constant; 1 without a cap
k  k3 estimate of KL(pi || pi_ref): exp(d) - d - 1 with d = log pi_ref - log pi
w  1 for the mean over tokens (MAGIC); N / (number of responses * length of this one) for the mean over responses of
   the mean over their tokens (GRPO, 2.4); 0 where there is no response token
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossTerms:
    """`loss` carries the gradient; `sums` are detached sums over this micro-batch's response tokens, each counted once
    whatever its weight. "policy" is the exception: the weighted sum that enters the loss."""

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
    surrogate: str = "clip",
    engine_log_probs_T: torch.Tensor | None = None,
    importance_cap: float = 0.0,
    reference_log_probs_T: torch.Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> LossTerms:
    """old_log_probs_T None: on-policy, the ratio is 1 in value and carries the policy gradient.

    num_tokens: N, response tokens of the whole mini-batch over all ranks and micro-batches. What stands where weights_T
    is 0 has no influence, infinities and NaN included. engine_log_probs_T: as sampled; with importance_cap > 0 only.
    reference_log_probs_T: with kl_coefficient > 0 only.
    """
    #   L = -(1/N) sum_ijt l_ijt                           the recipe: N and the sum over the whole mini-batch
    #     = -(1/N) sum_rank sum_micro-batch sum_t w_t l_t  each response token stands in exactly one micro-batch
    #     = sum_rank sum_micro-batch [-(1/N) sum_t w_t l_t]
    # The bracket is what is returned. It knows of the other tokens only N and, in w, how many responses there are, so
    # any packing over any number of ranks gives the same L and, gradients being linear, the same dL: parts are added,
    # never averaged.
    unused_T = weights_T == 0
    used_T = (~unused_T).to(weights_T.dtype)
    log_probs_T, entropy_T = log_probs_T.masked_fill(unused_T, 0.0), entropy_T.masked_fill(unused_T, 0.0)
    advantages_T = advantages_T.masked_fill(unused_T, 0.0)
    old_T = log_probs_T.detach() if old_log_probs_T is None else old_log_probs_T.masked_fill(unused_T, 0.0)
    ratio_T = torch.exp(log_probs_T - old_T)
    unclipped_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    sums = {"entropy": (used_T * entropy_T).sum(), "ratio": (used_T * ratio_T).sum()}
    if surrogate == "clip":
        policy_T = torch.minimum(unclipped_T, clipped_T)
        sums["clipped"] = (used_T * (clipped_T < unclipped_T)).sum()
    else:
        assert surrogate == "gradient", surrogate
        policy_T = advantages_T * log_probs_T
        sums["clipped"] = used_T.sum() * 0
    if importance_cap > 0:
        assert engine_log_probs_T is not None
        importance_T = torch.exp(old_T - engine_log_probs_T.masked_fill(unused_T, 0.0))
        policy_T = policy_T * importance_T.clamp(max=importance_cap)
        sums["importance"] = (used_T * importance_T.clamp(max=importance_cap)).sum()
        sums["importance_capped"] = (used_T * (importance_T > importance_cap)).sum()
    sums["policy"] = (weights_T * policy_T).sum()
    objective = sums["policy"] + entropy_coefficient * (weights_T * entropy_T).sum()
    if kl_coefficient > 0:
        assert reference_log_probs_T is not None
        gap_T = reference_log_probs_T.masked_fill(unused_T, 0.0) - log_probs_T
        kl_T = torch.exp(gap_T) - gap_T - 1
        sums["kl"] = (used_T * kl_T).sum()
        objective = objective - kl_coefficient * (weights_T * kl_T).sum()
    return LossTerms(-objective / num_tokens, {name: value.detach() for name, value in sums.items()})
