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
        ("DCAB", "ABCD"),
        ("23", "17 \\vee 23"),
        ("23", "17 \\\\[2pt] 23"),
        ("23", "\\begin{aligned} x &= 17 \\\\ x &= 23 \\end{aligned}"),
        ("x \\le 1 \\text{ and } x \\ge 0", "x \\le 1 \\text{ or } x \\ge 0"),
        ("23", "23\\text{ billion}"),
        ("23\\text{ million dollars}", "23\\text{ billion dollars}"),
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
        ("ACB", "BCA"),
        ("abcd", "dcba"),
        ("1/2", "\\\\frac{1}{2}"),
        ("23", "20+3 \\\\ &= 23"),
        ("(1,2)", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("x=1 \\text{ or } x=2", "x=1 \\text{ and } x=2"),
        ("5\\text{ millions}", "5 million euros"),
        ("2,000,000", "2,000,000\\text{ (two million)}"),
        ("2,000,000", "\\$2{,}000{,}000 \\text{ (2 million)}"),
        ("2", "2 \\text{ (in millions)}"),
        ("3", "\\begin{aligned} x &= 1+2 \\\\ &= 3 \\\\ \\end{aligned}"),
        ("3", "x &= 1+2 \\\\[4pt] &= 3"),
        ("3", "\\begin{aligned} 2x &= 6 \\\\ x &= 3 \\end{aligned}"),
        ("3", "\\text{x is}\\\\ 3"),
        ("3", "x=3 \\\\ \\checkmark"),
        ("ABCD", "CBAD"),
        ("ABCD", "CDAB"),
        ("x \\ne 1 \\text{ and } x \\ne 2", "x \\neq 1 \\text{ or } x\\neq 2"),
        ("\\frac{1}{1000}", "1\\text{ thousandth}"),
        ("", ""),
    ],
)
def test_keeps_silent(gold: str, answer: str) -> None:
    assert not contradicts(gold, answer)


@pytest.mark.parametrize(
    ("gold", "value", "answer", "expected"),
    [
        ("\\frac{1}{7}", 1 / 7, "0.142857", 12),
        ("10000\\sqrt{2}", 14142.135623730951, "14142.135623730951", 7),
        ("3", 3.0, "3.0000001", 11),
        ("10^9", 1e9, "1000000000.5", 6),
        ("2^{-45}", 2.0**-45, "0.0", 25),
        ("-\\frac{1}{7000}", -1 / 7000, "0.000142857", 15),
        ("0", 0.0, "0.0", 12),
        ("(1,\\sqrt{2})", None, "(1,1.41421356237)", 11),
        ("0.142857", 0.142857, "\\frac{1}{7}", 6),
        ("0.00000012", 1.2e-7, "1.2 \\cdot 10^{-7}", 8),
        ("1.25 \\times 10^{-7}", 1.25e-7, "0.000000", 9),
    ],
)
def test_decimals_that_have_to_agree(gold: str, value: float | None, answer: str, expected: int) -> None:
    assert decimals(gold, answer, value) == expected


@pytest.mark.parametrize(
    "text", ["\\" + "a" * 5000 + "!", "1 " * 2500, "(" * 5000, "\\text{" * 700, "1,x" * 1600, "\0^2"]
)
def test_odd_text_is_read_quickly(text: str) -> None:
    started = time.process_time()
    contradicts(text, "5\\text{ cm}")
    contradicts("5\\text{ cm}", text)
    assert time.process_time() - started < 0.5
