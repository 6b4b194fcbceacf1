"""What a run's spans say about its machine, so that the planner predicts that machine instead of a data sheet's.

Decoding: between two changes of an engine's counter b responses ran for n rounds. Where b is at most half of what the
rollout began with, all of them have been started, and by least squares with no cost below zero

    seconds = n * fixed + n * b * per_response

What a rollout takes beyond its rounds and tokens at these costs is put down to the starts of its responses.
Update: seconds of a step = FLOPs / rate + optimizer steps * constant. Weight push and the rest: means.
"""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from or1_megatron.architecture import Architecture
from or1_megatron.errors import UserError
from or1_megatron.profiling.decoding import DecodeModel
from or1_megatron.profiling.flops import forward_flops, training_flops
from or1_megatron.profiling.planner import Costs


@dataclass(frozen=True)
class Interval:
    """`running` responses went through `rounds` decoding rounds of a rollout that began with `at_first` of them."""

    rounds: int
    running: int
    at_first: int
    seconds: float


def intervals(trace: dict[str, Any]) -> list[Interval]:
    """Of all engines, from the counters of a trace file."""
    by_engine: dict[int, list[tuple[float, int, int]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "C" and event["name"] == "responses":
            place = event["ts"], event["args"]["responses"], event["args"]["rounds"]
            by_engine.setdefault(event["pid"], []).append(place)
    found = []
    for counts in by_engine.values():
        at_first = 0
        for (at, running, rounds), (later, _, then) in itertools.pairwise(counts):
            at_first = running if rounds == 0 else at_first
            if running and then > rounds:
                found.append(Interval(then - rounds, running, at_first, (later - at) * 1e-6))
    return found


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

    def costs(self, architecture: Architecture, num_ranks: int, num_engines: int) -> Costs:
        """With more or fewer ranks and engines of the same kind."""
        rate = self.flops_rate * num_ranks / self.num_ranks
        return Costs(
            decode=DecodeModel(self.fixed, self.per_response, 0.0, 0.0, 0.0, 0.0, start=self.start),
            num_engines=num_engines,
            update=lambda lengths, steps: training_flops(architecture, lengths) / rate + steps * self.optimizer_step_s,
            old_log_probs=lambda lengths: forward_flops(architecture, lengths) / rate,
            sync=self.sync_s,
            step_s=self.rest_s,
            scoring_s=0.0,
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
    group_size: int,
    num_ranks: int,
    num_engines: int,
    num_reuse: int = 1,
) -> Calibration:
    """From a run's trace and its steps' metrics. Raises UserError when they say too little."""
    measured = [part for part in intervals(trace) if part.running <= part.at_first / 2]
    steps = [row for row in metrics if "seconds/step" in row][1:]  # the first one warms up
    updates = [row for row in steps if row.get("training_flops")]
    if len(measured) < 3 or len(updates) < 2:
        raise UserError(
            f"the run has {len(measured)} decoding intervals and {len(updates)} updates recorded, too few to calibrate "
            "on; let it run for more steps with profiling.trace_steps above 0"
        )
    rows = np.array([[i.rounds, i.rounds * i.running] for i in measured])
    fixed, per_response = relative(rows, np.array([i.seconds for i in measured]))
    starts = []
    for row in steps:
        responses = row["groups/generated"] * group_size
        decoding = row["length/max"] * fixed + responses * row["length/mean"] / num_engines * per_response
        starts.append((row["seconds/rollout"] - decoding) / (responses / num_engines))
    rows = np.array([[row["training_flops"], row["sgd_steps"]] for row in updates])
    per_flop, per_step = relative(rows, np.array([row["seconds/update"] for row in updates]))
    prompts = [row["tokens"] / (row["groups/kept"] * group_size * num_reuse) - row["length/mean"] for row in updates]
    counted = ("sync", "old_log_probs", "save")
    rest = [row["seconds/others"] - sum(row.get(f"seconds/{name}", 0.0) for name in counted) for row in steps]
    return Calibration(
        num_ranks=num_ranks,
        num_engines=num_engines,
        fixed=float(fixed),
        per_response=float(per_response),
        start=max(0.0, float(statistics.fmean(starts))),
        flops_rate=float(1 / per_flop) if per_flop > 0 else float("inf"),
        optimizer_step_s=float(per_step),
        sync_s=statistics.median(row["seconds/sync"] for row in steps),
        rest_s=statistics.median(rest),
        prompt_tokens=max(1, round(statistics.median(prompts))),
        num_steps=len(steps),
    )


def read_trace(text: str, origin: str) -> dict[str, Any]:
    """Raises UserError when it is not a trace that a run wrote."""
    try:
        trace = json.loads(text)
        trace["traceEvents"][0]["ph"]
    except (ValueError, TypeError, KeyError, IndexError):
        raise UserError(f"{origin} is not a trace that a run has written; is the run still starting?") from None
    return trace
