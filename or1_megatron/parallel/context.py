"""Context parallel: which tokens of a pack each rank holds, and the gather of keys and values for its queries.

A sequence of L tokens, a multiple of 2R for R ranks, is cut into 2R chunks of c = L / 2R; rank r holds chunk r and
chunk 2R-1-r (TransformerEngine's layout, which Megatron's RoPE expects too):

    R = 2:   | 0 | 1 | 2 | 3 |   rank 0: 0, 3   rank 1: 1, 2

A query of chunk k sees (k + 1/2) c keys on average, so each rank has (r + 1/2 + 2R-1-r + 1/2) c^2 = 2R c^2 pairs.

Shape letters: T tokens of the pack, t = T / R those of one rank. A rank's tokens lie sequence by sequence, the lower
chunk first. Labels and weights are made for the whole pack and sliced afterwards: the last token of a chunk predicts
a token that another rank holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Stretch:
    """Queries [query, query + num_queries) of this rank see keys from `key` of the pack on; the last query sees
    `num_keys` of them, the one before it one fewer. All see the keys of stretch `continues` too, a shared prompt."""

    query: int
    num_queries: int
    key: int
    num_keys: int
    continues: int | None = None


class Run(NamedTuple):
    """Neighbouring stretches that are attended to at once. `continues`: the run of their shared prompt."""

    count: int
    num_queries: int  # of each
    continues: int | None = None


@dataclass(frozen=True)
class Part:
    """One rank's part of a pack."""

    rank: int
    num_ranks: int
    held_T: torch.Tensor  # int64: positions of the pack held by rank 0, then by rank 1, ...
    place_T: torch.Tensor  # int64, its inverse: where in held_T each position of the pack is
    stretches: tuple[Stretch, ...]

    @property
    def held_t(self) -> torch.Tensor:
        """Positions of the pack that this rank holds, in the order it holds them."""
        return self.held_T.chunk(self.num_ranks)[self.rank]

    @cached_property
    def runs(self) -> list[Run]:
        """On one rank of stretches of equal length that continue the same, with context parallel of one stretch each,
        since the numbers of their keys differ."""
        prompts = {s.continues for s in self.stretches}
        found: list[Run] = []
        run_of: list[int] = []  # per stretch
        for i, s in enumerate(self.stretches):
            one = Run(1, s.num_queries, None if s.continues is None else run_of[s.continues])
            like_before = found and found[-1]._replace(count=1) == one and i not in prompts
            if like_before and self.num_ranks == 1:
                found[-1] = one._replace(count=found[-1].count + 1)
            else:
                found.append(one)
            run_of.append(len(found) - 1)
        return found

    def take(self, values_T: torch.Tensor) -> torch.Tensor:
        """This rank's share of what is known for the whole pack."""
        return values_T if self.num_ranks == 1 else values_T.index_select(0, self.held_t)


def part_of(
    cu_seqlens: Seq[int], *, rank: int, num_ranks: int, device: torch.device, continues: Seq[int | None] = ()
) -> Part:
    """cu_seqlens, continues: those of a MicroBatch. The length of each sequence is a multiple of 2 * num_ranks (any for
    one rank); prompts are shared on one rank only."""
    assert num_ranks == 1 or not continues, "context parallel cuts whole sequences"
    held: list[torch.Tensor] = []
    stretches: list[Stretch] = []
    sequences = list(itertools.zip_longest(itertools.pairwise(cu_seqlens), continues))
    for holder in range(num_ranks):
        queries = 0
        for (start, end), prompt in sequences:
            for first, last in _chunks(start, end, holder, num_ranks):
                held.append(torch.arange(first, last))
                if holder == rank:
                    stretches.append(Stretch(queries, last - first, start, last - start, prompt))
                queries += last - first
    held_T = torch.cat(held)
    return Part(rank, num_ranks, held_T.to(device), held_T.argsort().to(device), tuple(stretches))


def _chunks(start: int, end: int, rank: int, num_ranks: int) -> list[tuple[int, int]]:
    if num_ranks == 1:
        return [(start, end)]
    size, rest = divmod(end - start, 2 * num_ranks)
    assert rest == 0, f"a sequence of {end - start} tokens is not cut into {2 * num_ranks} chunks; pack() aligns them"
    return [(start + k * size, start + (k + 1) * size) for k in (rank, 2 * num_ranks - 1 - rank)]


def gather(values_t: torch.Tensor, part: Part, group: dist.ProcessGroup) -> torch.Tensor:
    """[t, ...] of each rank -> [T, ...] in the order of the pack, on every rank of `group`.

    Differentiable: each rank gets the sum over the ranks of the gradients to its tokens (reduce-scatter). All ranks
    of the group call this, and its backward.
    """
    assert group.size() == part.num_ranks, (group.size(), part.num_ranks)
    if part.num_ranks == 1:
        return values_t
    return _Gather.apply(values_t, part, group)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_t: torch.Tensor, part: Part, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.part, ctx.group = part, group
        gathered = values_t.new_empty(len(part.held_T), *values_t.shape[1:])
        dist.all_gather_into_tensor(gathered, values_t.contiguous(), group=group)
        return gathered.index_select(0, part.place_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_T = grads[0].index_select(0, ctx.part.held_T)
        grad_t = grad_T.new_empty(len(grad_T) // ctx.part.num_ranks, *grad_T.shape[1:])
        dist.reduce_scatter_tensor(grad_t, grad_T, group=ctx.group)
        return grad_t, None, None
