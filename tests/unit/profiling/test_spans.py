"""Spans measure wall time; sleeps give lower bounds, which hold on a busy machine too."""

from __future__ import annotations

import time
import timeit

import pytest

from or1_megatron.profiling.spans import (
    IDLE,
    Span,
    Spans,
    busy_seconds,
    clock,
    clock_offset,
    covered_seconds,
    within,
)


def test_nested_spans_count_in_both_and_add_up():
    spans = Spans()
    started = time.perf_counter()
    with spans.span("step"):
        for _ in range(2):
            with spans.span("rollout"):
                time.sleep(0.02)
        time.sleep(0.02)
    elapsed = time.perf_counter() - started
    taken = spans.take()
    assert list(taken) == ["seconds/rollout", "seconds/step"]
    assert 0.04 <= taken["seconds/rollout"] <= taken["seconds/step"] - 0.02
    assert 0.06 <= taken["seconds/step"] <= elapsed


def test_take_clears():
    spans = Spans()
    for _ in range(2):
        with spans.span("sync"):
            time.sleep(0.01)
    assert 0.02 <= spans.take()["seconds/sync"] < 0.2
    assert spans.take() == {}


def test_a_span_that_raises_still_counts():
    spans = Spans()
    with pytest.raises(KeyError), spans.span("update"):
        raise KeyError
    assert "seconds/update" in spans.take()
    assert [span.level for span in spans.drain().spans] == [0]


def test_level_0_with_idle_time_covers_the_wall_time():
    spans = Spans(idle=True)
    spans.drain()
    started = time.monotonic_ns()
    for _ in range(3):
        time.sleep(0.01)
        with spans.span("update"), spans.span("optimizer"):
            time.sleep(0.01)
    record = spans.drain()
    wall = (time.monotonic_ns() - started) * 1e-9
    assert covered_seconds(record.spans) == pytest.approx(wall, rel=0.01)
    assert 0.03 <= busy_seconds(record.spans) <= wall - 0.03
    assert [span.name for span in record.spans] == [IDLE, "optimizer", "update"] * 3 + [IDLE]


def test_off_records_nothing_and_both_cost_little():
    on, off = Spans(), Spans(enabled=False)

    def use(spans: Spans) -> float:
        def one() -> None:
            with spans.span("update"):
                pass

        return min(timeit.repeat(one, number=20_000, repeat=7)) / 20_000

    assert use(off) < 1e-6 and use(on) < 1e-5
    off.count("responses", 3)
    assert off.drain().spans == off.drain().counts == [] and off.take() == {}


def test_the_newest_records_stay_and_the_lost_are_counted():
    spans = Spans(capacity=4)
    for number in range(6):
        with spans.span(str(number)):
            pass
    record = spans.drain()
    assert [span.name for span in record.spans] == ["2", "3", "4", "5"] and record.lost == 2
    assert spans.drain().lost == 0


def test_marks_are_pushed_and_popped():
    seen: list[str] = []
    spans = Spans()
    spans.marks = (seen.append, lambda: seen.append("pop"))
    with spans.span("update"), spans.span("optimizer"):
        pass
    assert seen == ["update", "optimizer", "pop", "pop"]


def test_clock_offset_is_within_its_error():
    behind, asked = 5_000_000, []
    for out, back in ((900, 100), (40, 60), (300, 2000)):  # nanoseconds on the way; ours minus theirs is `behind`
        sent = 10_000_000_000 + len(asked)
        asked.append((sent, sent + out - behind, sent + out + back))
    offset, error = clock_offset(asked)
    assert error == 50 and abs(offset - behind) <= error
    assert clock()[0] == clock()[0] and clock()[1] <= time.monotonic_ns()


def test_within_cuts_to_the_window():
    spans = [Span("a", 0, 10, 0), Span("b", 10, 30, 0), Span("c", 30, 31, 0)]
    assert within(spans, 5, 30) == [Span("a", 5, 10, 0), Span("b", 10, 30, 0)]


def test_what_is_drained_inside_a_span_is_not_idle():
    spans = Spans(idle=True)
    with spans.span("update"):
        assert [span.name for span in spans.drain().spans] == [IDLE]  # up to the span
        assert spans.drain().spans == []


def test_counts_are_told_once_and_the_newest_stay():
    spans = Spans(capacity=2)
    for value in range(5):
        spans.count("responses", value)
    record = spans.drain()
    assert [count.value for count in record.counts] == [3, 4] and record.lost == 3
    assert spans.drain().counts == []


def test_an_odd_round_trip_is_rounded_up():
    """Taken at the beginning or at the end of five nanoseconds: 0 or 5 ahead."""
    offset, error = clock_offset([(0, 0, 5)])
    assert offset - error <= 0 and offset + error >= 5
