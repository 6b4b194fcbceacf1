"""What the ranks of test_vocab_tp.py run."""

from __future__ import annotations

import torch
import torch.distributed as dist

from or1_megatron.parallel import vocab_head
from or1_megatron.parallel.vocab import Shard, log_probs_and_entropy
from or1_megatron.parallel.vocab_head import head_log_probs_and_entropy, head_loss


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
    shard = Shard(vocab_size, rank * columns, dist.group.WORLD, temperature)
    log_probs_T, entropy_T = log_probs_and_entropy(mine, labels, shard)
    dist.destroy_process_group()  # a collective in backward would fail
    torch.autograd.backward([log_probs_T, entropy_T], [a_T, b_T])
    return {
        "log_probs": log_probs_T.detach(),
        "entropy": entropy_T.detach(),
        "grad": mine.grad,
        "unmodified": torch.equal(mine.detach(), before) and torch.equal(labels, labels_T),
    }


def fused(
    rank: int,
    world_size: int,
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    a_T: torch.Tensor,
    b_T: torch.Tensor,
    vocab_size: int,
    temperature: float,
) -> dict[str, torch.Tensor]:
    """The fused head on this rank's rows of weight_VH, in chunks of a few tokens; loss sum(a log pi + b H)."""
    rows = len(weight_VH) // world_size
    weight = weight_VH[rank * rows : (rank + 1) * rows].clone()
    shard = Shard(vocab_size, rank * rows, dist.group.WORLD, temperature)
    vocab_head._CHUNK_BYTES = {"cpu": 5 * 4 * rows}
    hidden, grad = hidden_TH.clone().requires_grad_(), torch.zeros(weight.shape)

    def token_loss(log_probs_C: torch.Tensor, entropy_C: torch.Tensor, rows: slice) -> torch.Tensor:
        return (a_T[rows] * log_probs_C + b_T[rows] * entropy_C).sum()

    values = head_log_probs_and_entropy(hidden, weight, labels_T, shard)
    loss, log_probs_T, entropy_T = head_loss(hidden, weight, grad, labels_T, shard, token_loss)
    assert torch.equal(values[0], log_probs_T) and torch.equal(values[1], entropy_T)
    loss.backward()
    assert hidden.grad is not None
    dist.all_reduce(hidden.grad)
    return {
        "loss": loss.detach(),
        "log_probs": log_probs_T,
        "entropy": entropy_T,
        "hidden_grad": hidden.grad,
        "weight_grad": grad,
    }
