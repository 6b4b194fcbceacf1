"""The planner against the paper's time tables: one set of constants, one length distribution, no row by itself."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from or1_megatron.profiling.paper import LENGTHS, MODELS, comparison_lines, table_7, table_9


def test_table_9_within_5_percent():
    rows = table_9()
    assert [row.paper for row in rows] == [375, 270, 225, 205]
    assert max(abs(row.error) for row in rows) < 0.05, rows


def test_the_split_of_table_7_within_15_percent():
    rows = table_7()
    assert [round(row.paper) for row in rows] == [803, 97, 212]
    assert max(abs(row.error) for row in rows) < 0.15, rows


def test_what_was_assumed_is_said_and_the_models_are_the_ones():
    text = "\n".join(comparison_lines())
    assert "256 GPUs" in text and "65% of the groups" in text and LENGTHS.describe() in text
    assert [round(model.num_parameters / 1e9, 1) for model in MODELS.values()] == [7.6, 32.8]
    above = 1 - NormalDist(math.log(LENGTHS.median), LENGTHS.sigma).cdf(math.log(8192))
    assert above == pytest.approx(0.40, abs=0.005)
