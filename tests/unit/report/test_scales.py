"""Ticks are round, cover the values and are few; labels are short."""

from __future__ import annotations

import pytest

from or1_megatron.report.scales import Scale, short, thinned, ticks, whole_ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7.2), (1e-6, 4e-6), (995, 1005), (0, 123456), (5, 5), (0, 0)])
def test_ticks_cover_and_are_few(low: float, high: float):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8, found
    steps = {round(b - a, 9) for a, b in zip(found, found[1:], strict=False)}
    assert len(steps) == 1 and found[0] < found[-1]


def test_whole_ticks_are_steps_of_the_run():
    assert whole_ticks(1, 24) == [5, 10, 15, 20]
    assert whole_ticks(1, 3) == [1, 2, 3] and whole_ticks(7, 7) == [7]


def test_positions_labels_and_thinning():
    assert Scale(0, 10, 100, 200)(2.5) == 125
    numbers = (0, 0.25, 12, 999.6, 3400, 9999.4, 34_000, 999_999, 2e6, 2e-6, -0.5)
    assert [short(v) for v in numbers] == [
        "0", "0.25", "12", "1000", "3400", "9999", "34k", "1M", "2M", "2e-6", "-0.5",
    ]  # fmt: skip
    points = [(float(i), float(i % 2)) for i in range(1000)]
    few = thinned(points, 300)
    assert thinned(points, 300, largest=True)[0] == (1.5, 1.0)
    assert len(few) == 250 and few[0] == (1.5, 0.5) and thinned(points[:300], 300) == points[:300]


def test_a_sum_that_is_not_quite_round_gets_no_tick_more():
    assert ticks(0, 0.1 + 0.2) == [0, 0.1, 0.2, 0.3]
