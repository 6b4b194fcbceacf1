"""Units as they are written, and letters that are none."""

from __future__ import annotations

import pytest

from or1_megatron.reward.units import units


@pytest.mark.parametrize(
    ("answer", "name", "power"),
    [
        ("12\\text{ cm}", "cm", 1),
        ("12 cm", "cm", 1),
        ("12\\,\\mathrm{cm}^{2}", "cm", 2),
        ("840 square inches", "in", 2),
        ("3.5\\text{ sq. ft}", "ft", 2),
        ("\\frac{1}{2}\\text{ cubic }\\text{yards}", "yd", 3),
        ("18\\text{ cm}$^2$", "cm", 2),
        ("18\\text{ cm}²", "cm", 2),
        ("\\$1,250", "dollar", 1),
        ("$5", "dollar", 1),
        ("30^{\\circ}", "degree", 1),
        ("30^\\circ\\text{ C}", "celsius", 1),
        ("10:30\\text{ a.m.}", "am", 1),
        ("500\\text{ mL}", "cm", 3),
        ("5\\text{ million}", "million", 1),
    ],
)
def test_unit(answer: str, name: str, power: int) -> None:
    assert units(answer) == [(frozenset({name}), power)]


def test_a_name_may_mean_two_things() -> None:
    assert units("5 m") == [(frozenset({"m", "min"}), 1)]


def test_a_list_has_one_each() -> None:
    assert units("3\\text{ m}, 5\\text{ cm} \\text{ and } 7\\text{ cm}^2") == [
        (frozenset({"cm"}), 1), (frozenset({"cm"}), 2), (frozenset({"m", "min"}), 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        *("5", "", "x", "2m-1", "m(2m-1)", "(2m)^3", "s", "\\frac{1}{4m}", "12\\text{ apples}", "3\\text{ cm}, 4"),
        *(
            "$5$",
            "\\text{cm}",
            "3 \\text{ in } 4",
            "5\\text{ h }30\\text{ min}",
            "\\$5\\text{ million}",
            "1" * 300 + " cm",
        ),
    ],
)
def test_none(answer: str) -> None:
    assert units(answer) == []
