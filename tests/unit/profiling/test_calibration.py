"""Least squares that no coefficient leaves below zero, intervals of counters, other numbers of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from or1_megatron.architecture import read_architecture
from or1_megatron.profiling.calibration import Calibration, intervals, non_negative, relative
from or1_megatron.profiling.flops import Tokens
from tests.tiny_models import write_tiny_model

SHOWN = Calibration(2, 1, 0.02, 0.004, 0.1, 5e9, 1.5, 0.5, 0.4, 10, 3, False)


def test_a_coefficient_that_would_fall_below_zero_is_left_out():
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert non_negative(rows, np.array([3.0, 2.0, 1.0])).tolist() == pytest.approx([2.0, 0.0])


def test_what_is_measured_is_in_the_mean_what_is_expected():
    """Errors that grow with the value: plain least squares would be led by the largest."""
    draw = np.random.default_rng(0)
    rounds, running = draw.integers(1, 400, 60), draw.integers(1, 200, 60)
    rows = np.stack([rounds, rounds * running], axis=1).astype(float)
    values = rows @ [0.02, 0.004] * np.exp(draw.normal(0, 0.5, 60))
    assert (values / (rows @ relative(rows, values))).mean() == pytest.approx(1, abs=1e-3)


def test_an_interval_has_rounds():
    counts = [{"responses": n, "rounds": rounds} for n, rounds in ((8, 0), (7, 0), (7, 3), (0, 5))]
    events = [{"ph": "C", "name": "responses", "pid": 1, "ts": 1e6 * n, "args": args} for n, args in enumerate(counts)]
    assert [(part.running, part.rounds) for part in intervals(events)] == [(7, 3), (7, 2)]


def test_twice_the_ranks_are_twice_as_fast(tmp_path: Path):
    a = read_architecture(write_tiny_model(tmp_path, "llama", tied=True))
    shown, wider = (SHOWN.costs(a, ranks, 1, replicas=ranks) for ranks in (2, 4))
    tokens = Tokens([100])
    assert wider.old_log_probs(tokens) == pytest.approx(shown.old_log_probs(tokens) / 2)
    step = dataclasses.replace(SHOWN, optimizer_step_s=0.0).costs(a, 4, 1, replicas=4)
    assert step.update(tokens, 3) == pytest.approx(wider.update(tokens, 3) - 3 * 1.5)
