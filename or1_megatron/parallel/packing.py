"""Training sequences -> packed micro-batches, the same number on every data-parallel rank (pure).

Invariants: every sequence is in exactly one micro-batch; none is cut; no micro-batch exceeds the token budget;
every rank has the same number of micro-batches (some may be empty); the plan depends on nothing but its arguments.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from or1_megatron.errors import UserError
from or1_megatron.types import MicroBatch, Sequence


@dataclass(frozen=True)
class Plan:
    """`micro_batches[rank][i]` are indices of sequences; `imbalance` is the largest rank's work over the mean."""

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    imbalance: float


def aligned(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment


def plan(lengths: Seq[int], *, num_ranks: int, token_budget: int, alignment: int = 1, linear_work: float) -> Plan:
    """Balances ranks by work linear_work * L + L^2, then fills micro-batches of at most token_budget aligned tokens.

    Raises UserError when one sequence alone exceeds the budget.
    """
    assert lengths, "nothing to pack"
    for index, length in enumerate(lengths):
        if aligned(length, alignment) > token_budget:
            raise UserError(
                f"sequence {index} has {length} tokens, {aligned(length, alignment)} when padded to a multiple of "
                f"{alignment}, above parallel.token_budget={token_budget}; use at least {aligned(length, alignment)}"
            )
    work = [linear_work * length + length * length for length in lengths]
    longest_first = sorted(range(len(lengths)), key=lambda i: (-work[i], i))
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]  # a heap: the least loaded rank takes the next longest
    for i in longest_first:
        load, rank = heapq.heappop(loads)
        ranks[rank].append(i)
        heapq.heappush(loads, (load + work[i], rank))
    filled = [_fill(mine, lengths, token_budget, alignment) for mine in ranks]
    count = max(len(batches) for batches in filled)
    padded = tuple(tuple(tuple(b) for b in batches) + ((),) * (count - len(batches)) for batches in filled)
    mean = sum(work) / num_ranks
    return Plan(padded, max(load for load, _ in loads) / mean)


def _fill(mine: list[int], lengths: Seq[int], token_budget: int, alignment: int) -> list[list[int]]:
    """First fit, longest first."""
    batches: list[list[int]] = []
    free: list[int] = []
    for i in mine:
        size = aligned(lengths[i], alignment)
        slot = next((k for k, room in enumerate(free) if room >= size), None)
        if slot is None:
            batches.append([])
            free.append(token_budget)
            slot = len(free) - 1
        batches[slot].append(i)
        free[slot] -= size
    return batches


def pack(sequences: Seq[Sequence], ids: Seq[int], *, alignment: int) -> MicroBatch:
    """The sequences `ids`, end to end, each padded to a multiple of `alignment` with tokens of weight 0.

    What belongs to a response token stands at the position that predicts it. No ids: one aligned stretch of padding,
    which still has to run through the model where other ranks have work. Every prompt has at least one token.
    """
    chosen = [sequences[i] for i in ids]
    stretches = [aligned(len(sequence.tokens), alignment) for sequence in chosen] or [max(alignment, 2)]
    offsets = [0, *np.cumsum(stretches).tolist()]
    total = offsets[-1]
    tokens, labels = np.zeros(total, np.int64), np.zeros(total, np.int64)
    weights, advantages, old = (np.zeros(total, np.float32) for _ in range(3))
    positions = np.concatenate([np.arange(length) for length in stretches])
    off_policy = len(sequences) > 0 and sequences[0].old_log_probs is not None  # also of a pack of nothing
    for sequence, start in zip(chosen, offsets, strict=False):
        length = len(sequence.tokens)
        assert 1 <= sequence.num_prompt_tokens <= length, sequence
        assert (sequence.old_log_probs is not None) == off_policy, "old log-probs for all sequences or for none"
        predicts = slice(start + sequence.num_prompt_tokens - 1, start + length - 1)
        tokens[start : start + length] = sequence.tokens
        labels[start : start + length - 1] = sequence.tokens[1:]
        weights[predicts] = 1.0
        advantages[predicts] = sequence.advantage
        if sequence.old_log_probs is not None:
            assert len(sequence.old_log_probs) == length - sequence.num_prompt_tokens, sequence
            old[predicts] = sequence.old_log_probs
    return MicroBatch(
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(positions),
        labels_T=torch.from_numpy(labels),
        weights_T=torch.from_numpy(weights),
        advantages_T=torch.from_numpy(advantages),
        old_log_probs_T=torch.from_numpy(old) if off_policy else None,
        cu_seqlens=tuple(offsets),
        sequence_ids=tuple(ids),
    )


def unpack_response_values(values_T: np.ndarray, batch: MicroBatch, sequences: Seq[Sequence]) -> list[np.ndarray]:
    """Per sequence of the micro-batch, in its order, the values of its response tokens."""
    pieces = []
    for i, start in zip(batch.sequence_ids, batch.cu_seqlens, strict=False):
        sequence = sequences[i]
        pieces.append(values_T[start + sequence.num_prompt_tokens - 1 : start + len(sequence.tokens) - 1])
    return pieces
