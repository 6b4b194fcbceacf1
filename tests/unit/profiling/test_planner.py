"""Parts of a predicted step, refills, layouts and lengths."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from or1_megatron.profiling.flops import Tokens, training_flops
from or1_megatron.profiling.hardware import H800
from or1_megatron.profiling.lengths import LogNormal, Measured
from or1_megatron.profiling.paper import MODELS
from or1_megatron.profiling.planner import Layout, Work, costs_of, predict, rollout_rounds, update_seconds

MODEL = MODELS["DeepSeek-R1-Distill-Qwen-7B"]
WORK = Work(32, 8, 4096, 1, LogNormal(800, 0.5, 0.5), 1.0, True, False)
PLACE = Layout(32)


def test_refills_are_rollouts_of_their_own():
    assert rollout_rounds(WORK) == [32]
    half = replace(WORK, kept_share=0.5, max_generated_factor=2.0)
    assert rollout_rounds(half) == [32, 16, 8, 4, 2, 1, 1] and rollout_rounds(
        replace(half, max_generated_factor=1.25)
    ) == [32, 8]
    few = rollout_rounds(replace(WORK, kept_share=0.4, max_generated_factor=9.0))
    assert sum(few) == 32 / 0.4 and len(few) < 10, "a round of one prompt keeps a part of a group, not none"
    costs = costs_of(MODEL, PLACE, H800)
    assert predict(half, costs).rollout > 2 * predict(WORK, costs).rollout


def test_what_is_left_out_costs_nothing_and_overlap_hides_scoring():
    costs = costs_of(MODEL, PLACE, H800)
    full = predict(WORK, costs)
    assert predict(replace(WORK, recomputes_old_log_probs=False), costs).old_log_probs == 0 < full.old_log_probs
    hidden = predict(replace(WORK, overlaps_scoring=True), costs).scoring
    assert 0.05 * full.scoring <= hidden < full.scoring
    packed_after = predict(replace(WORK, overlaps_packing=False), costs)
    assert full.packing == 0 < packed_after.packing == pytest.approx(packed_after.others - full.others)
    assert full.total == pytest.approx(full.rollout + full.update + full.others)
    assert 0 < full.tail < full.rollout and full.mean_engine <= full.rollout


def test_update_is_flops_over_what_the_devices_achieve():
    tokens = Tokens([1000] * 64)
    ideal = H800.replaced(optimizer_step_s=0.0, link=1e30, network=1e30)
    seconds = update_seconds(MODEL, tokens, 1, replace(PLACE, recompute=False), ideal)
    assert seconds == pytest.approx(training_flops(MODEL, tokens) / (32 * 989e12 * 0.30), rel=1e-6)
    recomputed = update_seconds(MODEL, tokens, 1, PLACE, ideal)
    assert recomputed == pytest.approx(4 / 3 * seconds)
    piped = update_seconds(MODEL, tokens, 1, replace(PLACE, pp=4, token_budget=1000, recompute=False), ideal)
    assert piped == pytest.approx(seconds * (8 + 3) / 8)  # 64 sequences on 8 replicas: 8 micro-batches each


def test_each_reuse_is_a_pass_over_the_whole_rollout():
    costs = costs_of(MODEL, PLACE, H800)
    once, twice = (predict(replace(WORK, num_sgd_steps=2 * n, num_reuse=n), costs).update for n in (1, 2))
    assert twice == pytest.approx(2 * once)


def test_shared_prompts_are_computed_once_for_short_responses():
    """Groups of 8 responses of 20 tokens to 100: 99 + 8 x 21 = 267 tokens in the layers instead of 960."""
    short = replace(WORK, lengths=Measured(((20,) * 8,), "run"), prompt_tokens=100)
    ideal = H800.replaced(optimizer_step_s=0.0, link=1e30, network=1e30)
    costs = costs_of(MODEL, replace(PLACE, num_devices=1), ideal)
    apart, shared = (predict(replace(short, shares_prompts=shares), costs).update for shares in (False, True))
    layer = MODEL.num_layers * MODEL.matrix_parameters_per_layer
    head = 160 * MODEL.hidden_size * MODEL.vocab_size
    assert shared / apart == pytest.approx((267 * layer + head) / (960 * layer + head), rel=0.01)
    cut = predict(replace(short, shares_prompts=True), replace(costs, cuts_context=True)).update
    assert cut == apart
    long = replace(WORK, lengths=Measured(((900,) * 8,), "run"), prompt_tokens=100)
    apart, shared = (predict(replace(long, shares_prompts=shares), costs).update for shares in (False, True))
    assert shared == apart  # a quarter of the micro-batch of 4096 tokens holds one such sequence


def test_lengths_keep_limit_and_group():
    groups = LogNormal(1000, 0.7, 0.9).draw(50, 8, 2000, random.Random(0))
    flat = [length for group in groups for length in group]
    assert len(groups) == 50 and max(flat) == 2000 and min(flat) >= 1
    spread = [max(group) / min(group) for group in groups]
    mixed = [max(group) / min(group) for group in LogNormal(1000, 0.7, 0.0).draw(50, 8, 2000, random.Random(0))]
    assert sum(spread) < 0.5 * sum(mixed)  # most of the variance lies between prompts
    drawn = Measured(((5, 6), (90, 80)), "run").draw(20, 4, 85, random.Random(0))
    assert all(set(group) <= {5, 6} or set(group) <= {85, 80} for group in drawn)


def test_traffic_is_bytes_over_the_link():
    """What computes in no time and has no network to cross: 64,000 tokens, 28 layers."""
    slow = H800.replaced(peak_flops=1e40, optimizer_step_s=0.0, link=1e9, network=1e40)
    tokens = Tokens([1000] * 64)

    def seconds(layout: Layout, tokens: Tokens = tokens, steps: int = 0) -> float:
        return update_seconds(MODEL, tokens, steps, layout, slow)

    hidden = 64_000 / 8 * 28 * 2 * 4 * 3584 * 3 / 4 / 1e9  # of eight replicas; three of four parts are others'
    assert seconds(Layout(32, tp=4)) == pytest.approx(4 * hidden)
    assert seconds(Layout(32, tp=4, recompute=False)) == pytest.approx(3 * hidden)
    keys = 64_000 / 16 / 2 * 28 * 2 * 2 * 4 * 128 / 1e9  # of sixteen replicas of two ranks
    assert seconds(Layout(32, cp=2)) == pytest.approx(4 * keys)
    gradients = 6 * MODEL.num_parameters * 7 / 8 / 1e9
    assert seconds(Layout(8), Tokens([]), 2) == pytest.approx(2 * gradients)


def test_a_replica_has_at_least_one_micro_batch():
    tokens = Tokens([1000] * 64)
    ideal = H800.replaced(optimizer_step_s=0.0, link=1e30, network=1e30)
    whole = update_seconds(MODEL, tokens, 1, PLACE, ideal)
    assert update_seconds(MODEL, tokens, 1, replace(PLACE, pp=4, token_budget=10**6), ideal) == pytest.approx(4 * whole)


def test_what_an_overlap_cannot_hide_is_scored_afterwards():
    costs = replace(costs_of(MODEL, PLACE, H800), scoring_s=100.0)
    full, hidden = (predict(replace(WORK, overlaps_scoring=overlaps), costs) for overlaps in (False, True))
    assert hidden.scoring == pytest.approx(full.scoring - full.rollout)


def test_engines_share_a_push_and_responses_end_at_their_limit():
    one, two = (costs_of(MODEL, replace(PLACE, engine_tp=tp), H800) for tp in (1, 2))
    assert one.sync == pytest.approx(2 * two.sync)
    assert predict(replace(WORK, max_response_length=10), one).tokens == 32 * 8 * 10


def test_a_response_has_at_least_one_token():
    assert {min(group) for group in LogNormal(1, 3.0, 0.0).draw(20, 20, 99, random.Random(0))} == {1}
