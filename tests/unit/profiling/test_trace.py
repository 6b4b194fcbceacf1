"""The trace file's lanes, times and metadata."""

from __future__ import annotations

import json

from or1_megatron.profiling.spans import Count, Record, Span
from or1_megatron.profiling.trace import lanes, merged, trace_events, trace_text


def test_overlapping_checks_get_lanes_of_their_own():
    a, b, c, d = (Span("check", start, end, 0) for start, end in ((0, 10), (5, 7), (7, 20), (10, 12)))
    assert lanes([d, b, a, c]) == [[a, d], [b, c]]


def test_times_start_at_the_first_record_in_microseconds():
    first = Record([Span("step", 5_000, 9_000, 0)], [], 0)
    second = Record([Span("generate", 4_000, 8_500, 0)], [Count("responses", 6_000, 3, 7)], 2)
    trace = json.loads(trace_text({"driver": first, "engine0": second}, {"run": "r"}))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(s["name"], s["pid"], s["ts"], s["dur"]) for s in spans] == [("step", 0, 1, 4), ("generate", 1, 0, 4.5)]
    (count,) = [event for event in trace["traceEvents"] if event["ph"] == "C"]
    assert (count["ts"], count["args"]) == (2, {"responses": 3, "rounds": 7})
    assert trace["metadata"] == {"run": "r", "lost_records": {"engine0": 2}}
    names = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert names == {0: "driver", 1: "engine0"}


def test_merged_keeps_order_and_the_highest_mark():
    both = merged([Record([Span("a", 0, 1, 0)], [], 1, 7), Record([Span("b", 1, 2, 0)], [], 0, 5)])
    assert [span.name for span in both.spans] == ["a", "b"] and (both.lost, both.peak_bytes) == (1, 7)


def test_a_count_may_be_the_first_record():
    records = {"engine0": Record([Span("generate", 5_000, 9_000, 0)], [Count("responses", 3_000, 3, 0)], 0)}
    found = {event["ph"]: event["ts"] for event in trace_events(records) if event["ph"] in "XC"}
    assert found == {"C": 0, "X": 2}
