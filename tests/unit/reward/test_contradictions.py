"""What the rules call a contradiction, and that they keep silent about what they do not know."""

from __future__ import annotations

import time

import pytest

from or1_megatron.reward.contradictions import contradicts, decimals


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12 \\text{ cm}", "12 \\text{ m}"),
        ("12\\mathrm{~cm}", "12\\mathrm{~cm}^{2}"),
        ("12 cm^2", "12\\text{ cubic cm}"),
        ("\\$12", "12\\text{ cents}"),
        ("12^{\\circ}", "12\\text{ radians}"),
        ("A", "a"),
        ("5", "5..."),
        ("5", "\\geq 5"),
        ("x=1, y=2", "2, 1"),
        ("\\{1,2\\}", "\\left( 1, 2 \\right)"),
        ("1, 2", "[1, 2]"),
    ],
)
def test_contradicts(gold: str, answer: str) -> None:
    assert contradicts(gold, answer)
    assert not contradicts(answer, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12 \\text{ cm}", "12"),
        ("12", "12 \\text{ cm}"),
        ("12 \\text{ cm}", "12\\text{ centimetres}"),
        ("12 \\text{ cm}^2", "12\\text{ square cm}"),
        ("12 \\text{ apples}", "12 \\text{ fruits}"),
        ("2 m + 3 h", "3 h + 2 m"),
        ("5\\text{ million}", "\\$5\\text{ million}"),
        ("$12$", "12\\text{ cm}"),
        ("12\\text{ cm}^2", "12\\text{ cm}²"),
        ("x \\le 5", "\\le 5"),
        ("330\\text{ min}", "5\\text{ h } 30\\text{ min}"),
        ("\\text{Yes}", "\\text{yes}"),
        ("0.333\\ldots", "0.333"),
        ("0.333", "0.333\\ldots"),
        ("\\ge 5", "\\geq 5"),
        ("x=1, x=2", "2, 1"),
        ("(1,2)", "1,2"),
        ("\\{1,2\\}", "1,2"),
        ("(1,2),(3,4)", "\\{(1,2),(3,4)\\}"),
        ("1,000", "[1,000]"),
        ("", ""),
    ],
)
def test_keeps_silent(gold: str, answer: str) -> None:
    assert not contradicts(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("\\frac{1}{7}", "0.142857", 12),
        ("10000\\sqrt{2}", "14142.135623730951", 7),
        ("3", "3.0000001", 11),
        ("10^9", "1000000000.5", 6),
        ("0.142857", "\\frac{1}{7}", 6),
        ("0.00000012", "1.2 \\cdot 10^{-7}", 8),
    ],
)
def test_decimals_that_have_to_agree(gold: str, answer: str, expected: int) -> None:
    assert decimals(gold, answer) == expected


@pytest.mark.parametrize(
    "text", ["\\" + "a" * 5000 + "!", "1 " * 2500, "(" * 5000, "\\text{" * 700, "1,x" * 1600, "\0^2"]
)
def test_odd_text_is_read_quickly(text: str) -> None:
    started = time.process_time()
    contradicts(text, "5\\text{ cm}")
    contradicts("5\\text{ cm}", text)
    assert time.process_time() - started < 0.5
