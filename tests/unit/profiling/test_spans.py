"""Spans measure wall time; sleeps give lower bounds, which hold on a busy machine too."""

from __future__ import annotations

import time

import pytest

from or1_megatron.profiling.spans import Spans


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
    spans.add("sync", 1.5)
    spans.add("sync", 0.25)
    assert spans.take() == {"seconds/sync": 1.75}
    assert spans.take() == {}


def test_a_span_that_raises_still_counts():
    spans = Spans()
    with pytest.raises(KeyError), spans.span("update"):
        raise KeyError
    assert "seconds/update" in spans.take()
