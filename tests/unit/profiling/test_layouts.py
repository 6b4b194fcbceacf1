"""Which layout is taken among legal ones, which engines hold model and context, what is said to help."""

from __future__ import annotations

from dataclasses import replace

import pytest

from or1_megatron.errors import UserError
from or1_megatron.profiling.hardware import H800
from or1_megatron.profiling.layouts import ACTOR_SHARE, best, engine_degrees, helps, legal
from or1_megatron.profiling.lengths import LogNormal
from or1_megatron.profiling.paper import MODELS
from or1_megatron.profiling.planner import Layout, Work, costs_of
from or1_megatron.recipe import from_tree

MODEL = MODELS["DeepSeek-R1-Distill-Qwen-7B"]
CONFIG = from_tree([("t", {"model": {"path": "/m"}})])


def test_of_equally_fast_layouts_the_one_with_most_replicas_and_the_smallest_engines():
    ideal = H800.replaced(link=1e30, network=1e30)
    layout, parts = best(CONFIG, MODEL, 8192, 32, ideal, lambda *_: {"all": 1.0}, 0.7)
    assert (layout.tp, layout.pp, layout.cp, layout.engine_tp) == (1, 1, 1, 1)
    assert parts == {"all": 1.0} and layout.memory_share == 0.7


@pytest.mark.parametrize(("share", "fits"), [(ACTOR_SHARE, True), (ACTOR_SHARE + 0.01, False)])
def test_a_rank_has_a_share_of_the_memory(share: float, fits: bool):
    found = list(legal(CONFIG, MODEL, 8, H800, lambda *_: {"all": share * H800.memory}))
    assert bool(found) == fits
    if not fits:
        with pytest.raises(UserError, match="no legal layout of the actor on 8"):
            best(CONFIG, MODEL, 8192, 8, H800, lambda *_: {"all": share * H800.memory}, 0.8)


def test_an_engine_holds_the_longest_sequence():
    cache = costs_of(MODEL, Layout(1), H800).decode.cache_tokens
    assert engine_degrees(MODEL, H800, 0.8, int(cache) - 1) == [1, 2, 4]  # of 28 heads
    assert engine_degrees(MODEL, H800, 0.8, int(cache) + 1) == [2, 4]


def test_what_helps_is_told_by_its_size_and_only_where_it_can_be_done():
    work = Work(32, 8, 4096, 1, LogNormal(800, 0.5, 0.5), 1.0, True, False)
    slow = H800.replaced(train_efficiency=0.003)  # a pass is more than the half per cent that is told
    found = helps(MODEL, work, Layout(32), slow, [1])
    assert [saved for _, saved in found] == sorted((saved for _, saved in found), reverse=True)
    several = helps(MODEL, replace(work, num_sgd_steps=2), Layout(32), slow, [1])
    told = [any(what.startswith("loss.old_log_probs=current") for what, _ in each) for each in (found, several)]
    assert told == [True, False], "pi_old is the present policy only for one step"
