"""Who holds which token, and what it sees: exact cover of tokens and of query-key pairs, equal work."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from or1_megatron.parallel.context import Part, part_of

RANKS = st.integers(1, 5)
CHUNKS = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def parts(chunks: list[int], num_ranks: int) -> tuple[list[int], list[Part]]:
    """Sequences of 2 * num_ranks chunks of the given sizes."""
    offsets = [0, *itertools.accumulate(2 * num_ranks * size for size in chunks)]
    host = torch.device("cpu")
    return offsets, [part_of(offsets, rank=r, num_ranks=num_ranks, device=host) for r in range(num_ranks)]


@given(CHUNKS, RANKS)
def test_each_token_is_held_once_and_can_be_put_back(chunks: list[int], num_ranks: int):
    offsets, ranks = parts(chunks, num_ranks)
    pack_T = torch.arange(offsets[-1]) * 7
    together = torch.cat([part.take(pack_T) for part in ranks])
    for rank, part in enumerate(ranks):
        assert torch.equal(part.held_t, part.held_T.chunk(num_ranks)[rank])
        assert len(part.take(pack_T)) == offsets[-1] // num_ranks
        assert torch.equal(together.index_select(0, part.place_T), pack_T)


@given(CHUNKS, RANKS)
def test_each_query_sees_its_sequence_up_to_itself(chunks: list[int], num_ranks: int):
    offsets, ranks = parts(chunks, num_ranks)
    expected = {
        (query, key)
        for start, end in itertools.pairwise(offsets)
        for query in range(start, end)
        for key in range(start, query + 1)
    }
    pairs = [_pairs(part) for part in ranks]
    assert sum(map(len, pairs)) == len(expected)
    assert set().union(*pairs) == expected
    assert len({len(seen) for seen in pairs}) == 1, "every rank has the same work"


def _pairs(part: Part) -> set[tuple[int, int]]:
    held, found = part.held_t.tolist(), set()
    for s in part.stretches:
        for i in range(s.num_queries):
            visible = s.num_keys - (s.num_queries - 1 - i)
            found |= {(held[s.query + i], s.key + j) for j in range(visible)}
    return found


def test_zigzag():
    """Two ranks, a sequence of four chunks of two tokens, then one of four chunks of one."""
    _, (first, second) = parts([2, 1], 2)
    assert first.held_t.tolist() == [0, 1, 6, 7, 8, 11]
    assert second.held_t.tolist() == [2, 3, 4, 5, 9, 10]


def test_a_sequence_that_cannot_be_cut_is_our_mistake():
    with pytest.raises(AssertionError, match="6 tokens is not cut into 4 chunks"):
        part_of((0, 4, 10), rank=0, num_ranks=2, device=torch.device("cpu"))


def test_neighbours_of_one_length_are_one_run_on_one_rank_only():
    one = part_of((0, 4, 8, 16, 20), rank=0, num_ranks=1, device=torch.device("cpu"))
    assert one.runs == [(2, 4, None), (1, 8, None), (1, 4, None)]
    two = part_of((0, 4, 8), rank=0, num_ranks=2, device=torch.device("cpu"))
    assert two.runs == [(1, 1, None)] * 4


def test_stretches_that_continue_one_prompt_are_one_run_and_the_prompt_is_its_own():
    """A sequence of 4, a prompt of 4 with branches of 3, 3 and 5, another prompt of 4 with branches of 3."""
    offsets = [0, *itertools.accumulate((4, 4, 3, 3, 5, 4, 3, 3))]
    continues = (None, None, 1, 1, 1, None, 5, 5)
    part = part_of(offsets, rank=0, num_ranks=1, device=torch.device("cpu"), continues=continues)
    assert part.runs == [(1, 4, None), (1, 4, None), (2, 3, 1), (1, 5, 1), (1, 4, None), (2, 3, 4)]
    with pytest.raises(AssertionError, match="whole sequences"):
        part_of((0, 4, 8, 12), rank=0, num_ranks=2, device=torch.device("cpu"), continues=(None, 0, 0))
