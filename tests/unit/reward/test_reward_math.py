"""Verdicts on math answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from or1_megatron.reward.math import extract_answer, score

DATA = Path(__file__).parents[4] / "shared" / "data" / "math" / "math500.json"

VERDICTS = [
    ("\\boxed{9}", "9", "correct"),
    ("\\boxed{ 9 }", "9", "correct"),
    ("\\boxed{8}", "9", "wrong"),
    ("the answer is 9", "9", "unparsable"),
    ("\\boxed{}", "9", "unparsable"),
    ("\\boxed{9", "9", "unparsable"),
    ("\\boxed{025}", "25", "correct"),
    ("\\boxed{25}", "025", "correct"),
    ("\\boxed{\\frac{1}{2}}", "0.5", "correct"),
    ("\\boxed{\\dfrac12}", "\\frac{1}{2}", "correct"),
    ("\\boxed{0.333}", "\\frac{1}{3}", "wrong"),
    ("\\boxed{\\sqrt{\\frac{4}{9}}}", "\\frac{2}{3}", "correct"),
    ("\\boxed{1} and then \\boxed{2}", "2", "correct"),
    ("\\boxed{1} and then \\boxed{2}", "1", "wrong"),
    ("\\boxed{50\\%}", "50", "correct"),
]


@pytest.mark.parametrize(("response", "gold", "verdict"), VERDICTS)
def test_verdict(response: str, gold: str, verdict: str) -> None:
    assert score(response, (gold,)) == verdict


def test_any_gold_answer_counts() -> None:
    assert score("\\boxed{x=3}", ("5", "3")) == "correct"
    assert score("\\boxed{4}", ("5", "3")) == "wrong"


def test_last_balanced_box_is_taken() -> None:
    assert extract_answer("\\boxed{a{b}c} \\boxed{open") == "a{b}c"
    assert extract_answer("\\boxed{\\text{(}1, 2)}") == "\\text{(}1, 2)"
    assert extract_answer("none") is None


@pytest.mark.skipif(not DATA.is_file(), reason="real problems are not on this machine")
def test_real_gold_answers_match_themselves() -> None:
    golds = [row["answer"] for row in json.loads(DATA.read_text())[:300]]
    assert [gold for gold in golds if score(f"so \\boxed{{ {gold} }}", (gold,)) != "correct"] == []
    assert [gold for gold in golds if score("\\boxed{-987654321}", (gold,)) == "correct"] == []
