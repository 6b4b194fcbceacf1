"""Which GPU every rank and engine gets: each slot used as meant, neighbours together, too few GPUs refused."""

from __future__ import annotations

from collections import Counter

import pytest

from or1_megatron.cluster.placement import place
from or1_megatron.errors import UserError
from or1_megatron.processes import visible


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


def test_separate_engines_of_several_gpus_stay_on_one_node() -> None:
    found = place([8, 8], ranks=6, engines=2, wanted="separate", engine_tp=4)
    assert found.engines == (1, 1), "the two GPUs left on the first node are no group of four"
    assert found.ranks == (0,) * 6 and found.engine_share == 4 and not found.engine_devices


def test_colocated_engines_of_several_gpus_are_told_their_devices() -> None:
    """Each GPU is an engine's once, and a rank's once; Ray counts the ranks alone."""
    found = place([8, 8], ranks=16, engines=4, wanted="auto", engine_tp=4)
    assert found.colocated and (found.rank_share, found.engine_share) == (1, 0)
    assert Counter(found.ranks) == {0: 8, 1: 8}
    held = [(node, gpu) for node, group in zip(found.engines, found.engine_devices, strict=True) for gpu in group]
    assert sorted(held) == [(node, gpu) for node in (0, 1) for gpu in range(8)]


def test_groups_that_no_node_can_hold_are_refused() -> None:
    with pytest.raises(UserError, match="2 engines of 3 GPUs need as many groups of GPUs on one node, there are 0"):
        place([2, 2, 2], ranks=6, engines=2, wanted="colocated", engine_tp=3)


def test_without_a_gpu_the_nodes_take_turns() -> None:
    found = place([0, 0], ranks=2, engines=1, wanted="auto")
    assert found.ranks == (0, 1) and found.engines == (0,) and found.rank_share == 0 and not found.colocated


@pytest.mark.parametrize(
    ("wanted", "ranks", "words"), [("separate", 8, "needs 12 GPUs, there are 8"), ("auto", 9, "the 8 GPUs there are")]
)
def test_too_few(wanted: str, ranks: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        place([8], ranks=ranks, engines=4, wanted=wanted)


def test_devices_of_an_engine_are_the_nodes():
    assert visible((2, 3), "") == "2,3" and visible((2, 3), "4,5,6,7") == "6,7"
