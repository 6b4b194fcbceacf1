"""Responses that a person has judged, as `or1 verify` takes them."""

from __future__ import annotations

import json
from pathlib import Path

ROWS = [
    {"response": "<think>9</think>\\boxed{8}", "ground_truth": "8", "correct": True, "difficulty": 0},
    {"response": "\\boxed{7}", "ground_truth": ["8", "9"], "correct": False, "difficulty": 3},
    {"response": "\\boxed{\\frac{2}{4}}", "reward_model": {"ground_truth": "0.5"}, "correct": True, "difficulty": 3},
    {"response": "none", "ground_truth": 8, "correct": False, "difficulty": 3},
    {"response": "\\boxed{1\\text{ m}}", "ground_truth": "1\\text{ km}", "correct": False, "difficulty": 8},
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)
