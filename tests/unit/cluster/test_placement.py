"""Which GPU every rank and engine gets: each slot used as meant, neighbours together, too few GPUs refused."""

from __future__ import annotations

from collections import Counter

import pytest

from or1_megatron.cluster.placement import place
from or1_megatron.errors import UserError


def test_separate_engines_follow_the_ranks() -> None:
    found = place([8, 8], ranks=8, engines=8, wanted="auto")
    assert not found.colocated and (found.rank_share, found.engine_share) == (1, 1)
    assert found.ranks == (0,) * 8 and found.engines == (1,) * 8


@pytest.mark.parametrize(("ranks", "engines"), [(16, 16), (16, 4), (4, 16), (16, 6), (5, 16)])
def test_colocated_processes_fit_on_every_node(ranks: int, engines: int) -> None:
    """Per node: one process of the larger share a GPU, and no more of the others than there are GPUs taken."""
    found = place([8, 8], ranks=ranks, engines=engines, wanted="auto")
    assert found.colocated and (len(found.ranks), len(found.engines)) == (ranks, engines)
    more, fewer = (found.ranks, found.engines) if ranks >= engines else (found.engines, found.ranks)
    assert max(found.rank_share, found.engine_share) * 2 > 1 >= found.rank_share + found.engine_share
    for node in (0, 1):
        assert Counter(fewer)[node] <= Counter(more)[node] <= 8
    assert abs(Counter(fewer)[0] - Counter(fewer)[1]) <= 1, "the less numerous kind is spread evenly"


def test_uneven_nodes_and_ranks_in_order() -> None:
    found = place([1, 3, 2], ranks=4, engines=2, wanted="separate")
    assert found.ranks == (0, 1, 1, 1) and found.engines == (2, 2)


def test_without_a_gpu_the_nodes_take_turns() -> None:
    found = place([0, 0], ranks=2, engines=1, wanted="auto")
    assert found.ranks == (0, 1) and found.engines == (0,) and found.rank_share == 0 and not found.colocated


@pytest.mark.parametrize(
    ("wanted", "ranks", "words"), [("separate", 8, "needs 12 GPUs, there are 8"), ("auto", 9, "the 8 GPUs there are")]
)
def test_too_few(wanted: str, ranks: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        place([8], ranks=ranks, engines=4, wanted=wanted)
