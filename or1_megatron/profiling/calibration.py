"""What a run's spans say about its machine, so that the planner predicts that machine instead of a data sheet's.

Decoding: between two changes of an engine's counter b responses ran for n rounds. Once all responses of the rollout
have been started, by least squares with no cost below zero

    seconds = n * fixed + n * b * per_response

What a rollout takes beyond its rounds and tokens at these costs is put down to the starts of its responses.
Update: seconds = FLOPs / rate + optimizer steps * constant. Both are read off the ranks' spans: the constant is all but
forward and backward of the rank that computes longest, so the reduction of the gradients, the optimizer and the way
there and back; nothing is fitted. Weight push and the rest: medians.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from or1_megatron.architecture import Architecture
from or1_megatron.errors import UserError
from or1_megatron.profiling.decoding import DecodeModel
from or1_megatron.profiling.flops import forward_flops, training_flops
from or1_megatron.profiling.planner import Costs

Event = dict[str, Any]
_PLACES = 256  # responses that an engine decodes at once by vLLM's own choice, at least


@dataclass(frozen=True)
class Interval:
    """`running` responses went through `rounds` decoding rounds, after the first `begun` rounds of a rollout that began
    with `at_first` of them."""

    rounds: int
    running: int
    at_first: int
    begun: int
    seconds: float

    def all_started(self, prompt_tokens: int, max_batched_tokens: int) -> bool:
        """Whether no prompt was prefilled any more: half of the responses have ended, or there were rounds enough for
        all prompts beside a token of each response, and places for all of them."""
        free = max_batched_tokens - self.at_first
        started = (
            free > 0 and self.at_first <= _PLACES and self.begun >= math.ceil(self.at_first * prompt_tokens / free)
        )
        return started or self.running <= self.at_first / 2


def intervals(events: list[Event]) -> list[Interval]:
    """Of all engines, from the counters among the events."""
    by_engine: dict[int, list[tuple[float, int, int]]] = {}
    for event in events:
        if event["ph"] == "C" and event["name"] == "responses":
            place = event["ts"], event["args"]["responses"], event["args"]["rounds"]
            by_engine.setdefault(event["pid"], []).append(place)
    found = []
    for counts in by_engine.values():
        at_first: int | None = None  # of a rollout that began before these events, unknown
        for (at, running, rounds), (later, _, then) in itertools.pairwise(counts):
            at_first = running if rounds == 0 else at_first
            if at_first is not None and running and then > rounds:
                found.append(Interval(then - rounds, running, at_first, rounds, (later - at) * 1e-6))
    return found


def events_by_step(trace: dict[str, Any]) -> dict[int, list[Event]]:
    """Spans and counters that begin in the driver's span of each step."""
    driver = {event["pid"] for event in trace["traceEvents"] if _names(event, "driver")}
    placed = [event for event in trace["traceEvents"] if event["ph"] in "XC"]
    steps = [event for event in placed if event["pid"] in driver and event["name"] == "step"]
    first = trace["metadata"]["last_step"] - len(steps) + 1
    return {
        first + i: [event for event in placed if step["ts"] <= event["ts"] < step["ts"] + step["dur"]]
        for i, step in enumerate(sorted(steps, key=lambda step: step["ts"]))
    }


def _names(event: Event, process: str) -> bool:
    return event["ph"] == "M" and event["name"] == "process_name" and event["args"]["name"] == process


def computing_seconds(events: list[Event]) -> float:
    """Forward and backward of one step's updates on the rank that computes longest: the others wait for it where the
    gradients are reduced. 0 without such spans."""
    seconds: dict[int, float] = {}
    for event in events:
        sign = {"forward_backward": 1, "reduce_gradients": -1}.get(event["name"], 0) if event["ph"] == "X" else 0
        if sign:
            seconds[event["pid"]] = seconds.get(event["pid"], 0.0) + sign * event["dur"] * 1e-6
    return max(seconds.values(), default=0.0)


def non_negative(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares with no coefficient below zero: of all subsets of the columns the one that fits best."""
    best, best_error = np.zeros(rows.shape[1]), float(values @ values)
    for size in range(1, rows.shape[1] + 1):
        for columns in itertools.combinations(range(rows.shape[1]), size):
            chosen = list(columns)
            found, *_ = np.linalg.lstsq(rows[:, chosen], values, rcond=None)
            error = float(((rows[:, chosen] @ found - values) ** 2).sum())
            if (found >= 0).all() and error < best_error:
                best = np.zeros(rows.shape[1])
                best[chosen] = found
                best_error = error
    return best


def relative(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`non_negative` for errors that grow with the value: each row is weighed by what is expected of it, so that the
    few rounds of a small batch tell the constant, and the mean of measured over expected is 1."""
    scale = rows.max(axis=0)
    found = non_negative(rows / scale, values)
    for _ in range(10):
        weights = 1 / np.maximum(rows / scale @ found, 1e-3 * values.mean())
        found = non_negative(rows / scale * weights[:, None], values * weights)
    return found / scale


@dataclass(frozen=True)
class Calibration:
    """A machine as one run of it shows it: its ranks and engines, and what they took."""

    num_ranks: int
    num_engines: int
    fixed: float
    per_response: float
    start: float  # per response
    flops_rate: float  # of all ranks
    optimizer_step_s: float
    sync_s: float
    rest_s: float
    prompt_tokens: int
    num_steps: int
    shares_prompts: bool  # in the actor

    def costs(self, architecture: Architecture, num_ranks: int, num_engines: int, *, replicas: int) -> Costs:
        """With more or fewer ranks and engines of the same kind."""
        rate = self.flops_rate * num_ranks / self.num_ranks
        return Costs(
            decode=DecodeModel(self.fixed, self.per_response, 0.0, 0.0, 0.0, 0.0, start=self.start),
            num_engines=num_engines,
            update=lambda tokens, steps: training_flops(architecture, tokens) / rate + steps * self.optimizer_step_s,
            old_log_probs=lambda tokens: forward_flops(architecture, tokens) / rate,
            sync=self.sync_s,
            step_s=0.0,
            scoring_s=0.0,
            packing_s=0.0,
            rest_s=self.rest_s,
            replicas=replicas,
        )

    def describe(self) -> str:
        machine = f"{self.num_steps} steps of {self.num_ranks} ranks and {self.num_engines} engines"
        milliseconds = [f"{1e3 * seconds:.3g} ms" for seconds in (self.fixed, self.per_response, self.start)]
        return (
            f"calibrated on {machine}: a round of decoding {milliseconds[0]} + {milliseconds[1]} per response, "
            f"its start {milliseconds[2]}; training {self.flops_rate / 1e9:.3g} GFLOP/s + "
            f"{self.optimizer_step_s:.3g} s per optimizer step; push {self.sync_s:.3g} s, the rest {self.rest_s:.3g} s"
        )


def calibrate(
    trace: dict[str, Any],
    metrics: list[dict[str, Any]],
    *,
    group_sizes: Sequence[int],
    num_ranks: int,
    num_engines: int,
    max_batched_tokens: int,
    num_reuse: int = 1,
    stages: Collection[int] | None = None,
) -> Calibration:
    """From a run's trace and its steps' metrics. Raises UserError when they say too little.

    group_sizes: of each stage; stages: those (from 1 on) whose steps count, None is all.
    """
    events = events_by_step(trace)
    steps = [row for row in metrics if "seconds/step" in row][1:]  # the first one warms up
    steps = [row for row in steps if row["step"] in events and (stages is None or row["stage"] in stages)]
    updates = [row for row in steps if row.get("training_flops") and computing_seconds(events[row["step"]]) > 0]
    sizes = {row["step"]: group_sizes[row["stage"] - 1] for row in steps}
    prompts = [
        row["tokens"] / (row["groups/kept"] * sizes[row["step"]] * num_reuse) - row["length/mean"] for row in updates
    ]
    prompt_tokens = max(1, round(statistics.median(prompts))) if prompts else 1
    decoded = [part for row in steps for part in intervals(events[row["step"]])]
    decoded = [part for part in decoded if part.all_started(prompt_tokens, max_batched_tokens)]
    if len(decoded) < 3 or len(updates) < 2:
        raise UserError(
            f"the run has {len(decoded)} decoding intervals and {len(updates)} updates recorded, too few to calibrate "
            "on; let it run for more steps with profiling.trace_steps above 0"
        )
    rows = np.array([[i.rounds, i.rounds * i.running] for i in decoded])
    fixed, per_response = relative(rows, np.array([i.seconds for i in decoded]))
    starts = []
    for row in steps:
        responses = row["groups/generated"] * sizes[row["step"]]
        decoding = row["length/max"] * fixed + responses * row["length/mean"] / num_engines * per_response
        starts.append((row["seconds/rollout"] - decoding) / (responses / num_engines))
    computing = [computing_seconds(events[row["step"]]) for row in updates]
    constants = [
        (row["seconds/update"] - seconds) / row["sgd_steps"] for row, seconds in zip(updates, computing, strict=True)
    ]
    rates = [row["training_flops"] / seconds for row, seconds in zip(updates, computing, strict=True)]
    counted = ("sync", "old_log_probs", "save")
    rest = [row["seconds/others"] - sum(row.get(f"seconds/{name}", 0.0) for name in counted) for row in steps]
    return Calibration(
        num_ranks=num_ranks,
        num_engines=num_engines,
        fixed=float(fixed),
        per_response=float(per_response),
        start=max(0.0, statistics.median(starts)),
        flops_rate=statistics.median(rates),
        optimizer_step_s=max(0.0, statistics.median(constants)),
        sync_s=statistics.median(row["seconds/sync"] for row in steps),
        rest_s=statistics.median(rest),
        prompt_tokens=prompt_tokens,
        num_steps=len(steps),
        shares_prompts=any(row.get("packing/spared_tokens", 0) > 0 for row in updates),
    )
