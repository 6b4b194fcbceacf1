"""Training sequences -> packed micro-batches, the same number on every data-parallel rank (pure).

Invariants: every sequence is in exactly one micro-batch; none is cut; no micro-batch exceeds the token budget;
every rank has the same number of micro-batches (some may be empty); the plan depends on nothing but its arguments.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from or1_megatron.errors import UserError
from or1_megatron.types import MicroBatch, Sequence


@dataclass(frozen=True)
class Plan:
    """`micro_batches[rank][i]` are indices of sequences.

    `imbalance` is the largest rank's work over the mean, `micro_batch_imbalance` the largest micro-batch's over the
    mean of all: ranks wait for the former at every step, pipeline stages for the latter. One sequence that is longer
    than all others together bounds both from below.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    imbalance: float
    micro_batch_imbalance: float


def aligned(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment


def plan(lengths: Seq[int], *, num_ranks: int, token_budget: int, alignment: int = 1, linear_work: float) -> Plan:
    """Balances the work linear_work * L + L^2 of ranks, then of each rank's micro-batches of <= token_budget tokens.

    Both greedily: the longest sequence left goes where there is least work. Of the counts of micro-batches that
    budget allows the smallest is taken with which this succeeds on every rank: with B tokens on the fullest rank it
    is below 2 B / token_budget + 1. Raises UserError when one sequence alone exceeds the budget.
    """
    assert lengths, "nothing to pack"
    sizes = [aligned(length, alignment) for length in lengths]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if sizes[longest] > token_budget:
        raise UserError(
            f"sequence {longest} has {lengths[longest]} tokens, {sizes[longest]} when padded to a multiple of "
            f"{alignment}, above parallel.token_budget={token_budget}; use at least {sizes[longest]}"
        )
    work = [linear_work * length + length * length for length in lengths]
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    ranks = _spread(longest_first, work, sizes, num_ranks, capacity=sum(sizes))
    assert ranks is not None
    count = max(1, *(-(-sum(sizes[i] for i in mine) // token_budget) for mine in ranks))
    while True:
        spread = [_spread(mine, work, sizes, count, capacity=token_budget) for mine in ranks]
        filled = [batches for batches in spread if batches is not None]
        if len(filled) == num_ranks:
            break
        count += 1
    mean = sum(work) / num_ranks
    loads = [[sum(work[i] for i in batch) for batch in batches] for batches in filled]
    return Plan(
        micro_batches=tuple(tuple(map(tuple, batches)) for batches in filled),
        imbalance=max(map(sum, loads)) / mean,
        micro_batch_imbalance=max(map(max, loads)) / (mean / count),
    )


def _spread(
    longest_first: Seq[int], work: Seq[float], sizes: Seq[int], num_bins: int, *, capacity: int
) -> list[list[int]] | None:
    """Each sequence to the bin with the least work among those with room; None when one finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    free = [capacity] * num_bins
    loads = [(0.0, k) for k in range(num_bins)]  # a heap
    for i in longest_first:
        full = []
        while loads and free[loads[0][1]] < sizes[i]:
            full.append(heapq.heappop(loads))
        if not loads:
            return None
        load, k = loads[0]
        heapq.heapreplace(loads, (load + work[i], k))
        for entry in full:
            heapq.heappush(loads, entry)
        bins[k].append(i)
        free[k] -= sizes[i]
    return bins


def pack(sequences: Seq[Sequence], ids: Seq[int], *, alignment: int) -> MicroBatch:
    """The sequences `ids`, end to end, each padded to a multiple of `alignment` with tokens of weight 0.

    What belongs to a response token stands at the position that predicts it. No ids: one aligned stretch of padding,
    which still has to run through the model where other ranks have work. Every prompt has at least one token. Raises
    UserError for a sequence without a response token: engines return at least the token that ends the response, so
    it is a sample that was lost or cut, and it would count in the advantages of its group while training nothing.
    """
    chosen = [sequences[i] for i in ids]
    stretches = [aligned(len(sequence.tokens), alignment) for sequence in chosen] or [max(alignment, 2)]
    offsets = [0, *np.cumsum(stretches).tolist()]
    total = offsets[-1]
    tokens, labels = np.zeros(total, np.int64), np.zeros(total, np.int64)
    weights, advantages = np.zeros(total, np.float32), np.zeros(total, np.float32)
    positions = np.concatenate([np.arange(length) for length in stretches])
    given = {name: np.zeros(total, np.float32) for name in _given(sequences)}
    for i, sequence, start in zip(ids, chosen, offsets, strict=False):
        length = len(sequence.tokens)
        assert 1 <= sequence.num_prompt_tokens <= length, sequence
        if sequence.num_prompt_tokens == length:
            raise UserError(f"sequence {i} has {length} prompt tokens and no response token; drop its sample")
        assert _given([sequence]) == list(given), "log-probs of one kind for all sequences or for none"
        predicts = slice(start + sequence.num_prompt_tokens - 1, start + length - 1)
        tokens[start : start + length] = sequence.tokens
        labels[start : start + length - 1] = sequence.tokens[1:]
        weights[predicts] = sequence.weight
        advantages[predicts] = sequence.advantage
        for name, values in given.items():
            assert len(getattr(sequence, name)) == length - sequence.num_prompt_tokens, sequence
            values[predicts] = getattr(sequence, name)
    batch = MicroBatch(
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(positions),
        labels_T=torch.from_numpy(labels),
        weights_T=torch.from_numpy(weights),
        advantages_T=torch.from_numpy(advantages),
        old_log_probs_T=None,
        cu_seqlens=tuple(offsets),
        sequence_ids=tuple(ids),
    )
    return dataclasses.replace(batch, **{f"{name}_T": torch.from_numpy(values) for name, values in given.items()})


def _given(sequences: Seq[Sequence]) -> list[str]:
    """Which log-probs the sequences come with: all the same, so that a pack of nothing has them too."""
    kinds = ("old_log_probs", "engine_log_probs", "reference_log_probs")
    return [name for name in kinds if sequences and getattr(sequences[0], name) is not None]


def unpack_response_values(values_T: np.ndarray, batch: MicroBatch, sequences: Seq[Sequence]) -> list[np.ndarray]:
    """Per sequence of the micro-batch, in its order, the values of its response tokens."""
    pieces = []
    for i, start in zip(batch.sequence_ids, batch.cu_seqlens, strict=False):
        sequence = sequences[i]
        pieces.append(values_T[start + sequence.num_prompt_tokens - 1 : start + len(sequence.tokens) - 1])
    return pieces
