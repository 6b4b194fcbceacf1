"""What the ranks of test_vocab_tp.py run."""

from __future__ import annotations

import torch
import torch.distributed as dist

from or1_megatron.parallel.vocab import log_probs_and_entropy


def sharded(
    rank: int,
    world_size: int,
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    a_T: torch.Tensor,
    b_T: torch.Tensor,
    vocab_size: int,
    temperature: float,
) -> dict[str, object]:
    """Results and gradient of this rank's columns of logits_TV; a_T, b_T: upstream gradients."""
    columns = logits_TV.shape[1] // world_size
    mine = logits_TV[:, rank * columns : (rank + 1) * columns].clone()
    before, labels = mine.clone(), labels_T.clone()
    mine.requires_grad_()
    log_probs_T, entropy_T = log_probs_and_entropy(
        mine,
        labels,
        group=dist.group.WORLD,
        first_column=rank * columns,
        vocab_size=vocab_size,
        temperature=temperature,
    )
    dist.destroy_process_group()  # a collective in backward would fail
    torch.autograd.backward([log_probs_T, entropy_T], [a_T, b_T])
    return {
        "log_probs": log_probs_T.detach(),
        "entropy": entropy_T.detach(),
        "grad": mine.grad,
        "unmodified": torch.equal(mine.detach(), before) and torch.equal(labels, labels_T),
    }
