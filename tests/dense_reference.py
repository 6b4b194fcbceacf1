"""One training step of the recipe in plain torch: no packing, no sharding, nothing of the package but its types.

L = -(1/N) sum_ijt { v s + alpha H - beta k };  AdamW after a global gradient-norm clip.
s = min(rho A, clip(rho, 1-eps, 1+eps) A), or A log pi; v, k: importance weight and KL, where the sequences have what
they compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from or1_megatron.types import Sequence


@dataclass
class Reference:
    loss: float
    grad_norm: float  # before clipping
    log_probs: list[torch.Tensor]  # per sequence, of its response tokens
    entropies: list[torch.Tensor]
    grads: dict[str, torch.Tensor]  # before clipping
    optimizer: torch.optim.Optimizer


def dense_log_probs_and_entropy(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(label) and entropy of each token, in the type of the logits, by softmax over the whole vocabulary."""
    log_softmax_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    return log_softmax_TV.gather(1, labels_T[:, None]).squeeze(1), -(log_softmax_TV.exp() * log_softmax_TV).sum(-1)


def token_quantities(
    model: torch.nn.Module, sequence: Sequence, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi and entropy of the response tokens of one sequence."""
    tokens = torch.tensor(sequence.tokens)
    logits = model(tokens.unsqueeze(0)).logits[0, sequence.num_prompt_tokens - 1 : -1]
    return dense_log_probs_and_entropy(logits, tokens[sequence.num_prompt_tokens :], temperature)


def dense_step(
    model: torch.nn.Module,
    sequences: list[Sequence],
    *,
    alpha: float,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    surrogate: str = "clip",
    importance_cap: float = 0.0,
    kl_coefficient: float = 0.0,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_grad: float = 1.0,
    optimizer: torch.optim.Optimizer | None = None,
) -> Reference:
    """Updates `model` in place. optimizer: that of the step before, to go on with its moments."""
    num_tokens = sum(len(s.tokens) - s.num_prompt_tokens for s in sequences)
    objective = torch.zeros(())
    log_probs, entropies = [], []
    for sequence in sequences:
        log_prob, entropy = token_quantities(model, sequence, temperature)
        old = log_prob.detach() if sequence.old_log_probs is None else torch.tensor(sequence.old_log_probs)
        ratio = torch.exp(log_prob - old)
        clipped = torch.clip(ratio, 1 - clip_low, 1 + clip_high)
        policy = torch.minimum(ratio * sequence.advantage, clipped * sequence.advantage)
        if surrogate == "gradient":
            policy = sequence.advantage * log_prob
        if importance_cap:
            policy = policy * torch.exp(old - torch.tensor(sequence.engine_log_probs)).clip(max=importance_cap)
        if kl_coefficient:
            gap = torch.tensor(sequence.reference_log_probs) - log_prob
            policy = policy - kl_coefficient * (torch.exp(gap) - gap - 1)
        objective = objective + (policy + alpha * entropy).sum()
        log_probs.append(log_prob.detach())
        entropies.append(entropy.detach())
    loss = -objective / num_tokens
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad or torch.inf)  # 0: no clipping
    # Megatron decays matrices only: norms and biases are left alone.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = optimizer or torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
    optimizer.step()
    return Reference(loss.item(), float(norm), log_probs, entropies, grads, optimizer)
