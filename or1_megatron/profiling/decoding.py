"""Discrete-event simulation of continuous batching: how long engines decode a batch whose lengths are known.

A decoding round gives every running response one token. With b running responses that hold S tokens of keys and
values it takes

    round(b, S) = fixed + b * per_response + S * per_cached_token + max(weights, b * products)

Between two events (a response ends, the cache is full) b is constant and S grows by b a round, so n rounds add up in
closed form and a batch costs a few microseconds per response. As in vLLM, waiting responses start whenever there is
room, and when the cache is full the last started one gives its place up and is prefilled again later.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from or1_megatron.architecture import Architecture
from or1_megatron.profiling.hardware import Hardware

POLICIES = ("scattered", "round_robin", "pending_tokens", "longest_first")


@dataclass(frozen=True)
class DecodeModel:
    """Seconds of a round, and what fits."""

    fixed: float
    per_response: float
    per_cached_token: float
    weights: float  # reading them
    products: float  # matrix products of one response
    prefill: float  # of one prompt token
    start: float = 0.0  # of one response
    cache_tokens: float = math.inf
    most_running: float = math.inf

    def rounds(self, n: int, running: int, cached: int) -> float:
        """Seconds of n rounds that begin with `cached` tokens."""
        each = self.fixed + running * self.per_response + max(self.weights, running * self.products)
        return n * each + self.per_cached_token * (n * cached + running * n * (n - 1) / 2)


def decode_model(architecture: Architecture, hardware: Hardware, tp: int, memory_share: float) -> DecodeModel:
    """An engine of `tp` devices in bf16 that may use `memory_share` of their memory."""
    a, h = architecture, hardware
    read = 2 * (a.num_parameters - (0 if a.tied else a.vocab_size * a.hidden_size))  # an embedding row is all it needs
    cached = 2 * 2 * a.num_layers * a.num_kv_heads * a.head_dim
    flops = 2 * (a.num_layers * a.matrix_parameters_per_layer + a.vocab_size * a.hidden_size)
    free = tp * h.memory * memory_share - 2 * a.num_parameters
    compute = tp * h.peak_flops * h.decode_efficiency
    return DecodeModel(
        fixed=h.round_s + a.num_layers * (h.layer_s + (2 * h.allreduce_s if tp > 1 else 0)),
        per_response=h.response_s,
        per_cached_token=cached / (tp * h.bandwidth * h.cache_efficiency),
        weights=read / (tp * h.bandwidth * h.weight_efficiency),
        products=flops / compute,
        prefill=flops / compute,
        cache_tokens=max(0.0, free / cached),
    )


@dataclass(frozen=True)
class EngineRun:
    """One engine's decoding of its share."""

    seconds: float
    preempted: int
    curve: tuple[tuple[float, int], ...]  # (seconds, responses unfinished from then on), the last one 0


def simulate_engine(groups: list[list[int]], prompt_tokens: int, model: DecodeModel) -> EngineRun:
    """Groups in the order in which they are handed over; a group's prompt is prefilled and held once.

    model.cache_tokens must hold at least the longest of them.
    """
    waiting = deque((length, 0, prompt_tokens if i == 0 else 0) for group in groups for i, length in enumerate(group))
    running: list[tuple[int, int, int]] = []  # heap of (round of its end, order of its start, prompt tokens held)
    gone: set[int] = set()  # starts that were preempted
    ends: dict[int, tuple[int, int, int]] = {}  # start -> (round of its end, length, prompt tokens held)
    now, at, cached, started, preempted, left = 0.0, 0, 0, 0, 0, len(waiting)
    curve: list[tuple[float, int]] = [(0.0, left)]
    while waiting or ends:
        while waiting and len(ends) < model.most_running:
            length, done, prompt = waiting[0]
            if ends and cached + prompt + done + len(ends) + 1 > model.cache_tokens:
                break
            waiting.popleft()
            now += model.start + model.prefill * (prompt + done)
            cached += prompt + done
            heapq.heappush(running, (at + length - done, started, prompt))
            ends[started] = (at + length - done, length, prompt)
            started += 1
        while running[0][1] in gone:
            gone.discard(heapq.heappop(running)[1])
        count, rounds = len(ends), running[0][0] - at
        room = int((model.cache_tokens - cached) / count) if model.cache_tokens < math.inf else rounds
        full = room < rounds and count > 1
        rounds = max(1, min(rounds, room)) if full else rounds
        now, at, cached = now + model.rounds(rounds, count, cached), at + rounds, cached + rounds * count
        while running and (running[0][1] in gone or running[0][0] <= at):
            _, start, _ = heapq.heappop(running)
            if start in gone:
                gone.discard(start)
                continue
            _, length, prompt = ends.pop(start)
            cached -= length + prompt
            left -= 1
        curve.append((now, left))
        if full and len(ends) > 1 and model.cache_tokens - cached < len(ends):
            start = max(ends)
            end, length, prompt = ends.pop(start)
            done = length - (end - at)
            gone.add(start)
            cached -= done + prompt
            waiting.appendleft((length, done, prompt))
            preempted += 1
    return EngineRun(now, preempted, tuple(curve))


def assign(
    groups: list[list[int]], num_engines: int, policy: str, expected: list[float] | None = None
) -> list[list[int]]:
    """Which groups (their numbers) each engine gets, and in which order.

    scattered: neighbours together. round_robin: group i to engine i mod n. pending_tokens: each group, in order, to
    the engine with the fewest expected tokens. longest_first: the same after sorting by `expected`, longest first.
    """
    assert policy in POLICIES, policy
    if policy == "scattered":
        bounds = [round(i * len(groups) / num_engines) for i in range(num_engines + 1)]
        return [list(range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
    if policy == "round_robin":
        return [list(range(i, len(groups), num_engines)) for i in range(num_engines)]
    weights = expected if expected is not None else [float(len(group)) for group in groups]
    order = list(range(len(groups)))
    if policy == "longest_first":
        order.sort(key=lambda i: -weights[i])
    shares: list[list[int]] = [[] for _ in range(num_engines)]
    pending = [(0.0, engine) for engine in range(num_engines)]
    for i in order:
        load, engine = heapq.heappop(pending)
        shares[engine].append(i)
        heapq.heappush(pending, (load + weights[i], engine))
    return shares


def piece_size(num_groups: int, group_size: int, num_engines: int) -> int:
    """Responses of one prompt that go to an engine together: the whole group where there are four groups for each
    engine, else a divisor of it that makes so many pieces. With fewer an engine cannot be given its fair share."""
    divisors = [size for size in range(1, group_size + 1) if group_size % size == 0]
    return max((size for size in divisors if num_groups * group_size // size >= 4 * num_engines), default=1)


@dataclass(frozen=True)
class RolloutTime:
    """Of a whole batch."""

    seconds: float  # of the slowest engine
    mean_seconds: float  # over engines: the difference is waiting for the slowest
    tail_seconds: float  # with at most 5 % of all responses unfinished
    preempted: int
    tokens: int


def simulate_rollout(
    groups: list[list[int]],
    num_engines: int,
    model: DecodeModel,
    *,
    prompt_tokens: int,
    policy: str = "round_robin",
    expected: list[float] | None = None,
) -> RolloutTime:
    """`groups`: response lengths per prompt, all of one size; `expected`: tokens of each.

    round_robin keeps groups whole; pending_tokens and longest_first cut them to `piece_size`; scattered deals single
    responses, first one of each prompt, then the next, so that an engine gets different prompts.
    """
    pieces = groups
    if policy == "scattered":
        pieces = [[group[i]] for i in range(max(map(len, groups))) for group in groups if i < len(group)]
    elif policy != "round_robin":
        size = piece_size(len(groups), len(groups[0]), num_engines)
        pieces = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
        if expected is not None:
            expected = [tokens for tokens in expected for _ in range(len(groups[0]) // size)]
    shares = assign(pieces, num_engines, policy, expected)
    runs = [simulate_engine([pieces[i] for i in share], prompt_tokens, model) for share in shares if share]
    slowest = max(runs, key=lambda run: run.seconds)
    return RolloutTime(
        seconds=slowest.seconds,
        mean_seconds=sum(run.seconds for run in runs) / num_engines,
        tail_seconds=slowest.seconds - tail_start([run.curve for run in runs]),
        preempted=sum(run.preempted for run in runs),
        tokens=sum(map(sum, groups)),
    )


def tail_start(curves: Sequence[Sequence[tuple[float, int]]], share: float = 0.05) -> float:
    """When at most `share` of the responses of all engines are left; a curve is (seconds, unfinished from then on)."""
    changes = sorted(
        (at, after - before)
        for curve in curves
        for (_, before), (at, after) in zip([(0.0, 0), *curve], curve, strict=False)
    )
    total = sum(curve[0][1] for curve in curves)
    left = 0
    for at, change in changes:
        left += change
        if change < 0 and left <= share * total:
            return at
    return 0.0
