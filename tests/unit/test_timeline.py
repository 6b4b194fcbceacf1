"""The spans of all processes, step by step, on the driver's clock; which steps and ranks are profiled."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from or1_megatron.profiling.spans import Record, Span, Spans, clock
from or1_megatron.sections import ProfilingConfig
from or1_megatron.timeline import Timeline

SECOND = 1_000_000_000
BEHIND = 50 * SECOND  # the other host's clock; whatever a busy machine delays is far less


class Processes:
    """Stands in for the cluster: rank0 on this host, engine0 on another."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.done: dict[str, Record] = {}

    def ask(self, method: str, *args: Any, ranks: list[int] | None = None, engines: bool = True) -> dict[str, Any]:
        self.asked.append((method, *args, ranks, engines))
        kernel, now = clock()
        if method == "clock":
            return {"rank0": (kernel, now), "engine0": ("another kernel", now - BEHIND)}
        names = [*(["rank0"] if ranks is None else []), *(["engine0"] if engines else [])]
        return {name: self.done.pop(name, Record([], [], 0)) for name in names}


class Steps(Spans):
    """The driver's recorder, with one step of ten seconds after another."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    def drain(self) -> Record:
        start = 10 * SECOND * self._steps
        self._steps += 1
        return Record([Span("step", start, start + 10 * SECOND, 0)], [], 0)


def make(root: Path, **settings: Any) -> tuple[Timeline, Processes]:
    there, rewards = Processes(), SimpleNamespace(spans=deque([Span("check", SECOND, 2 * SECOND, 0)]))
    folder = SimpleNamespace(path=root, write=lambda name, text: (root / name).write_text(text))
    given: tuple[Any, ...] = (folder, there, rewards, Steps())
    return Timeline(ProfilingConfig(**settings), *given), there


def spans_of(root: Path, process: str) -> list[tuple[str, float, float]]:
    """(name, start, seconds) of its spans in the trace, seconds."""
    events = json.loads((root / "trace.json").read_text())["traceEvents"]
    (pid,) = [e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"] == process]
    return [(e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events if e["ph"] == "X" and e["pid"] == pid]


def test_idle_is_what_is_left_of_the_step_and_other_clocks_are_shifted(tmp_path: Path):
    timeline, there = make(tmp_path)
    there.done["rank0"] = Record([Span("update", -5 * SECOND, 4 * SECOND, 0)], [], 0, peak_bytes=7)
    there.done["engine0"] = Record([Span("generate", SECOND - BEHIND, 3 * SECOND - BEHIND, 0)], [], 0)
    metrics = timeline.end(1)
    assert metrics["idle"] == pytest.approx({"engine0": 8, "rank0": 6, "verifiers": 9}, abs=1)
    assert metrics["idle"]["rank0"] == pytest.approx(6) and metrics["memory"]["rank0"] == 7
    assert spans_of(tmp_path, "rank0") == [("update", 0, 9)]  # times are from the first record on
    assert spans_of(tmp_path, "driver") == [("step", 5, 10)]
    assert spans_of(tmp_path, "verifier0") == [("check", 6, 1)]
    ((name, start, seconds),) = spans_of(tmp_path, "engine0")
    assert name == "generate" and start == pytest.approx(6, abs=1) and seconds == pytest.approx(2)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert list(trace["metadata"]["clock_error_us"]) == ["engine0"] and trace["metadata"]["last_step"] == 1
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == ["driver", "engine0", "rank0", "verifier0"]


def test_the_newest_steps_are_kept_and_what_comes_late_is_added_to_the_last(tmp_path: Path):
    timeline, there = make(tmp_path, trace_steps=2)
    timeline.end(1)
    timeline.end(2)
    there.done["engine0"] = Record([Span("generate", -BEHIND, SECOND - BEHIND, 0)], [], 0)
    timeline.end(3, engines=False)
    timeline.add_engines()
    there.done["engine0"] = Record([Span("idle", SECOND - BEHIND, 2 * SECOND - BEHIND, 0)], [], 0)
    timeline.add_engines()
    timeline.close()
    assert len([name for name, *_ in spans_of(tmp_path, "driver") if name == "step"]) == 3, "and that of the end"
    assert [name for name, *_ in spans_of(tmp_path, "engine0")] == ["generate", "idle"]
    assert make(tmp_path, trace_steps=0)[0].end(1) == {}


def test_the_chosen_steps_of_the_chosen_ranks_are_profiled(tmp_path: Path):
    timeline, there = make(tmp_path, trace_steps=0, tool="torch", steps=[2], ranks=[0, 3])
    for step in (1, 2, 3):
        timeline.begin(step)
        timeline.end(step)
    files = [tmp_path / "profile" / f"rank{rank}-step-000002.json" for rank in (0, 3)]
    started = [("start_profiler", "torch", file, [rank], False) for file, rank in zip(files, (0, 3), strict=True)]
    assert there.asked == [*started, ("stop_profiler", [0, 3], False)]


def test_processes_stand_in_the_order_of_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = ["rank10", "rank9", "engine10", "engine2"]
    kernel, now = clock()
    answers = {"clock": (kernel, now), "drain": Record([], [], 0)}
    monkeypatch.setattr(Processes, "ask", lambda _, method, **whom: dict.fromkeys(given, answers[method]))
    make(tmp_path)[0].end(1)
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert names == ["driver", "engine2", "engine10", "rank9", "rank10", "verifier0"]
