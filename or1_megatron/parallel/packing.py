"""Training sequences -> packed micro-batches, the same number on every data-parallel rank (pure).

Invariants: every sequence is in exactly one micro-batch; none is cut; no micro-batch exceeds the token budget;
every rank has the same number of micro-batches (some may be empty); the plan depends on nothing but its arguments.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from or1_megatron.errors import UserError
from or1_megatron.parallel.bundles import bundle_limit, bundles
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


def plan(
    lengths: Seq[int],
    *,
    num_ranks: int,
    token_budget: int,
    alignment: int = 1,
    linear_work: float,
    shared: Seq[int] = (),
) -> Plan:
    """Balances the work linear_work * L + L^2 of ranks, then of each rank's micro-batches of <= token_budget tokens.

    Both greedily: the longest bundle left goes where there is least work. Of the counts of micro-batches that
    budget allows the smallest is taken with which this succeeds on every rank: with B tokens on the fullest rank it
    is below 2 B / token_budget + 1. `shared`: see bundles(); none: every sequence is a bundle of its own. Raises
    UserError when one sequence alone exceeds the budget.
    """
    assert lengths, "nothing to pack"
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if aligned(lengths[longest], alignment) > token_budget:
        size = aligned(lengths[longest], alignment)
        raise UserError(
            f"sequence {longest} has {lengths[longest]} tokens, {size} when padded to a multiple of "
            f"{alignment}, above parallel.token_budget={token_budget}; use at least {size}"
        )
    whole = bundles(lengths, shared, most=bundle_limit(lengths, num_ranks, token_budget))
    tokens = [sum(lengths[i] for i in ids) - sum(shared[i] for i in ids[1:]) for ids in whole]
    work = [
        linear_work * size + sum(lengths[i] ** 2 for i in ids) - sum(shared[i] ** 2 for i in ids[1:])
        for size, ids in zip(tokens, whole, strict=True)
    ]
    sizes = [aligned(size, alignment) for size in tokens]
    assert max(sizes) <= token_budget, "a bundle is at most a quarter of the budget, or one sequence"
    longest_first = sorted(range(len(whole)), key=lambda k: (-tokens[k], k))
    ranks = _spread(longest_first, work, sizes, num_ranks, capacity=sum(sizes))
    assert ranks is not None
    count = max(1, *(-(-sum(sizes[k] for k in mine) // token_budget) for mine in ranks))
    while True:
        spread = [_spread(mine, work, sizes, count, capacity=token_budget) for mine in ranks]
        filled = [batches for batches in spread if batches is not None]
        if len(filled) == num_ranks:
            break
        count += 1
    mean = sum(work) / num_ranks
    loads = [[sum(work[k] for k in batch) for batch in batches] for batches in filled]
    # Longest first within a bundle too: attention takes neighbours of one length at once.
    ordered = [sorted(ids, key=lambda i: (-lengths[i], i)) for ids in whole]
    return Plan(
        micro_batches=tuple(
            tuple(tuple(i for k in batch for i in ordered[k]) for batch in batches) for batches in filled
        ),
        imbalance=max(map(sum, loads)) / mean,
        micro_batch_imbalance=max(map(max, loads)) / (mean / count),
    )


def shared_prompts(sequences: Seq[Sequence]) -> list[int]:
    """How many first tokens each sequence has in common with the one before it and need be computed only once: all of
    an equal prompt but the last token, which predicts another token in each. 0 for the first of every prompt."""
    pairs = itertools.pairwise(sequences)
    return [0, *(_common(before, after) for before, after in pairs)] if sequences else []


def _common(before: Sequence, after: Sequence) -> int:
    length = after.num_prompt_tokens
    equal = length == before.num_prompt_tokens and np.array_equal(before.tokens[:length], after.tokens[:length])
    return length - 1 if equal else 0


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


@dataclass(frozen=True)
class _Stretch:
    """Tokens [first, end) of sequence `id`, padded to `length`. `is_prompt`: shared by the stretches after it."""

    id: int
    first: int
    end: int
    length: int
    continues: int | None = None
    is_prompt: bool = False


def _stretches(sequences: Seq[Sequence], ids: Seq[int], alignment: int, *, share_prompts: bool) -> list[_Stretch]:
    chosen = [sequences[i] for i in ids]
    shared = [*(shared_prompts(chosen) if share_prompts else [0] * len(ids)), 0]
    found: list[_Stretch] = []
    prompt, size = None, 0  # the stretch with the prompt that is continued, tokens since its begin
    for k, (i, sequence) in enumerate(zip(ids, chosen, strict=True)):
        first, end = shared[k] or shared[k + 1], len(sequence.tokens)
        if not shared[k]:
            prompt, size = None, 0
            if first:
                prompt, size = len(found), first
                found.append(_Stretch(i, 0, first, first, is_prompt=True))
        size += end - first
        # Nobody may see padding of a shared prompt: its last sequence is padded for all.
        padding = 0 if shared[k + 1] else aligned(size, alignment) - size
        found.append(_Stretch(i, first, end, end - first + padding, continues=prompt))
    return found


def pack(sequences: Seq[Sequence], ids: Seq[int], *, alignment: int, share_prompts: bool = False) -> MicroBatch:
    """The sequences `ids`, end to end, each padded to a multiple of `alignment` with tokens of weight 0.

    share_prompts: neighbours with equal prompts share it, see MicroBatch, and are padded together. What belongs to a
    response token stands at the position that predicts it. No ids: one aligned stretch of padding, which still has to
    run through the model where other ranks have work. Every prompt has at least one token. Raises UserError for a
    sequence without a response token: engines return at least the token that ends the response, so it is a sample that
    was lost or cut, and it would count in the advantages of its group while training nothing.
    """
    stretches = _stretches(sequences, ids, alignment, share_prompts=share_prompts)
    lengths = [stretch.length for stretch in stretches] or [max(alignment, 2)]
    offsets = [0, *np.cumsum(lengths).tolist()]
    total = offsets[-1]
    tokens, labels = np.zeros(total, np.int64), np.zeros(total, np.int64)
    weights, advantages = np.zeros(total, np.float32), np.zeros(total, np.float32)
    firsts = [stretch.first for stretch in stretches] or [0]
    positions = np.concatenate([np.arange(a, a + n) for a, n in zip(firsts, lengths, strict=True)])
    given = {name: np.zeros(total, np.float32) for name in _given(sequences)}
    for stretch, start in zip(stretches, offsets, strict=False):
        sequence, first, end = sequences[stretch.id], stretch.first, stretch.end
        tokens[start : start + end - first] = sequence.tokens[first:end]
        labels[start : start + end - first - 1] = sequence.tokens[first + 1 : end]
        if stretch.is_prompt:
            continue
        _check(sequence, stretch.id, list(given))
        predicts = slice(start + sequence.num_prompt_tokens - 1 - first, start + end - 1 - first)
        weights[predicts] = sequence.weight
        advantages[predicts] = sequence.advantage
        for name, values in given.items():
            values[predicts] = getattr(sequence, name)
    shares = any(stretch.is_prompt for stretch in stretches)
    batch = MicroBatch(
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(positions),
        labels_T=torch.from_numpy(labels),
        weights_T=torch.from_numpy(weights),
        advantages_T=torch.from_numpy(advantages),
        old_log_probs_T=None,
        cu_seqlens=tuple(offsets),
        sequence_ids=tuple(ids),
        continues=tuple(stretch.continues for stretch in stretches) if shares else (),
    )
    return dataclasses.replace(batch, **{f"{name}_T": torch.from_numpy(values) for name, values in given.items()})


def _check(sequence: Sequence, i: int, given: list[str]) -> None:
    length = len(sequence.tokens)
    assert 1 <= sequence.num_prompt_tokens <= length, sequence
    if sequence.num_prompt_tokens == length:
        raise UserError(f"sequence {i} has {length} prompt tokens and no response token; drop its sample")
    assert _given([sequence]) == given, "log-probs of one kind for all sequences or for none"
    assert all(len(getattr(sequence, name)) == sequence.num_response_tokens for name in given), sequence


def _given(sequences: Seq[Sequence]) -> list[str]:
    """Which log-probs the sequences come with: all the same, so that a pack of nothing has them too."""
    kinds = ("old_log_probs", "engine_log_probs", "reference_log_probs")
    return [name for name in kinds if sequences and getattr(sequences[0], name) is not None]


def unpack_response_values(values_T: np.ndarray, batch: MicroBatch, sequences: Seq[Sequence]) -> list[np.ndarray]:
    """Per sequence of the micro-batch, in its order, the values of its response tokens."""
    predicted = values_T[batch.weights_T.numpy() > 0]
    ends = np.cumsum([sequences[i].num_response_tokens for i in batch.sequence_ids])
    return np.split(predicted, ends[:-1]) if batch.sequence_ids else []
