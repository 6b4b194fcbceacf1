"""Spans of many processes as one trace in Chrome's format, which Perfetto (ui.perfetto.dev) opens too.

Times are microseconds since the first record. A process is a `pid` with its name; checks of the reward service overlap
and are dealt to as few lanes as hold them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from or1_megatron.profiling.spans import Record, Span


def lanes(spans: list[Span]) -> list[list[Span]]:
    """Spans dealt to lanes in which none overlaps another; the first lane that is free takes the next span."""
    found: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.start_ns):
        for lane in found:
            if lane[-1].end_ns <= span.start_ns:
                lane.append(span)
                break
        else:
            found.append([span])
    return found


def trace_events(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """The records of each process, by its name, as events."""
    starts = [span.start_ns for record in records.values() for span in record.spans]
    starts += [count.at_ns for record in records.values() for count in record.counts]
    zero = min(starts, default=0)
    events: list[dict[str, Any]] = []
    for pid, (name, record) in enumerate(records.items()):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
        for span in record.spans:
            place = {"ts": (span.start_ns - zero) / 1e3, "dur": (span.end_ns - span.start_ns) / 1e3}
            events.append({"ph": "X", "name": span.name, "pid": pid, "tid": 0, **place, "args": {"level": span.level}})
        for count in record.counts:
            values = {count.name: count.value, "rounds": count.rounds}
            events.append({"ph": "C", "name": count.name, "pid": pid, "ts": (count.at_ns - zero) / 1e3, "args": values})
    return events


def trace_text(records: Mapping[str, Record], facts: Mapping[str, Any]) -> str:
    """The trace file; `facts` stand in it as its metadata."""
    lost = {name: record.lost for name, record in records.items() if record.lost}
    trace = {
        "traceEvents": trace_events(records),
        "displayTimeUnit": "ms",
        "metadata": {**facts, "lost_records": lost},
    }
    return json.dumps(trace, separators=(",", ":"))


def merged(records: list[Record]) -> Record:
    """Of one process, of several steps in order."""
    return Record(
        [span for record in records for span in record.spans],
        [count for record in records for count in record.counts],
        sum(record.lost for record in records),
        max((record.peak_bytes for record in records), default=0),
    )
