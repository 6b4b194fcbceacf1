"""The event-driven simulation against one that goes round by round, and how prompts are dealt."""

from __future__ import annotations

import math
import random
from collections import deque

import pytest

from or1_megatron.profiling.decoding import (
    DecodeModel,
    assign,
    piece_size,
    simulate_engine,
    simulate_rollout,
    tail_start,
)

MODEL = DecodeModel(0.01, 0.001, 1e-5, 0.002, 0.0001, prefill=1e-4)


def round_by_round(groups: list[list[int]], prompt: int, model: DecodeModel) -> float:
    waiting = deque([length, 0, prompt if i == 0 else 0] for group in groups for i, length in enumerate(group))
    running: list[list[int]] = []
    now = 0.0
    while waiting or running:
        while waiting and len(running) < model.most_running:
            held = sum(done + held for _, done, held in running)
            _, done, mine = waiting[0]
            if running and held + mine + done + len(running) + 1 > model.cache_tokens:
                break
            now += model.prefill * (mine + done)
            running.append(waiting.popleft())
        held = sum(done + held for _, done, held in running)
        now += model.fixed + len(running) * (model.per_response) + max(model.weights, len(running) * model.products)
        now += held * model.per_cached_token
        for item in running:
            item[1] += 1
        running = [item for item in running if item[1] < item[0]]
        held = sum(done + held for _, done, held in running)
        if len(running) > 1 and model.cache_tokens - held < len(running):
            waiting.appendleft(running.pop())
    return now


@pytest.mark.parametrize(("cache", "most"), [(math.inf, math.inf), (math.inf, 5), (420, math.inf), (300, 7)], ids=str)
def test_equals_a_simulation_round_by_round(cache: float, most: float):
    rng = random.Random(1)
    groups = [[rng.randint(1, 90) for _ in range(4)] for _ in range(6)]
    model = DecodeModel(0.01, 0.001, 1e-5, 0.002, 0.0001, prefill=1e-4, cache_tokens=cache, most_running=most)
    run = simulate_engine(groups, 10, model)
    assert run.seconds == pytest.approx(round_by_round(groups, 10, model), rel=1e-9)
    assert (run.preempted > 0) == (cache < math.inf)
    assert run.curve[0] == (0.0, 24) and run.curve[-1][1] == 0


@pytest.mark.parametrize("policy", ["round_robin", "pending_tokens", "longest_first"])
def test_every_group_is_dealt_once(policy: str):
    groups = [[number] * 2 for number in range(1, 12)]
    shares = assign(groups, 3, policy, [float(sum(group)) for group in groups])
    assert sorted(i for share in shares for i in share) == list(range(11))


def test_dealing_by_length_shortens_an_uneven_batch():
    groups = [[100] * 4 if i % 4 == 0 else [5] * 4 for i in range(16)]  # round robin gives one engine all long ones
    expected = [float(sum(group)) for group in groups]

    def seconds(policy: str) -> float:
        return simulate_rollout(groups, 4, MODEL, prompt_tokens=8, policy=policy, expected=expected).seconds

    assert seconds("longest_first") < 0.9 * seconds("round_robin")


def test_pieces_are_whole_groups_where_there_are_enough():
    assert piece_size(64, 16, 16) == 16 and piece_size(63, 16, 16) == 8
    assert piece_size(160, 32, 256) == 4 and piece_size(2, 4, 100) == 1
    groups = [[100] * 8 for _ in range(4)]  # of four engines eight can share the work only in pieces
    whole, pieces = (
        simulate_rollout(groups, 8, MODEL, prompt_tokens=8, policy=policy).mean_seconds
        for policy in ("round_robin", "longest_first")
    )
    assert pieces > whole  # all engines decode


def test_tail_begins_when_five_percent_are_left():
    curve = [(0.0, 20), (1.0, 3), (2.0, 1), (7.0, 0)]
    assert tail_start([curve]) == 2.0
    assert tail_start([curve, [(0.0, 20), (3.0, 0)]]) == 3.0
