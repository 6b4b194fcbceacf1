"""Responses as rows: all that is needed to score them again."""

from __future__ import annotations

import numpy as np

from or1_megatron.responses import response_table
from or1_megatron.types import Group, Prompt, Sample


def test_a_row_holds_every_right_answer_and_what_was_said_of_the_response():
    prompt = Prompt("a", "1 + 1 =", (1,), ("2", "two"), "sums")
    sample = Sample(prompt, 3, np.full(4, 7), np.zeros(4), "it is 2", "length", 5, "wrong", 0.5)
    (row,) = response_table([Group(prompt, [sample])], benchmark="b").to_pylist()
    assert row == {
        "benchmark": "b", "uid": "a", "data_source": "sums", "index": 3, "prompt": "1 + 1 =",
        "ground_truth": ["2", "two"], "response": "it is 2", "reward": 0.5, "verdict": "wrong",
        "finish_reason": "length", "truncated": True, "length": 4, "weight_version": 5,
    }  # fmt: skip
