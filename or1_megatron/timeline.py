"""The spans of all processes of a run, step by step: idle time and memory per process, and trace.json.

A step's window is the driver's span `step`. The newest profiling.trace_steps steps are kept and written as trace.json
after each step, so that the file of a run that dies ends with its last complete step.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from or1_megatron.cluster import Cluster
from or1_megatron.parallel.device import take_peak_memory
from or1_megatron.profiling.spans import Record, Span, Spans, busy_seconds, clock, clock_offset, within
from or1_megatron.profiling.trace import lanes, merged, trace_text
from or1_megatron.reward.service import RewardService
from or1_megatron.runfolder import RunFolder
from or1_megatron.sections import ProfilingConfig

_QUESTIONS = 8  # about another host's clock


class Timeline:
    """The run's spans. `driver` is the driver's recorder."""

    def __init__(
        self, config: ProfilingConfig, folder: RunFolder, cluster: Cluster, rewards: RewardService, driver: Spans
    ):
        self._config, self._folder, self._cluster = config, folder, cluster
        self._rewards, self._driver = rewards, driver
        self._steps: deque[dict[str, Record]] = deque(maxlen=self._config.trace_steps)
        self._last_step = 0
        self._offsets: dict[str, tuple[int, int]] = {}
        if self._config.trace_steps:
            self._offsets = self._clock_offsets()

    def begin(self, step: int) -> None:
        """Starts the profiler where `step` is one to be recorded."""
        if self._profiles(step):
            for rank in self._config.ranks:
                file = self._folder.path / "profile" / f"rank{rank}-step-{step:06d}.json"
                self._cluster.ask("start_profiler", self._config.tool, file, ranks=[rank], engines=False)

    def end(self, step: int, *, engines: bool = True) -> dict[str, Any]:
        """Metrics of a step: {"idle": seconds by process, "memory": peak bytes by process}. Rewrites trace.json.

        engines: False where they are decoding ahead, since they would answer only after that: see add_engines().
        """
        if self._profiles(step):
            self._cluster.ask("stop_profiler", ranks=self._config.ranks, engines=False)
        if not self._config.trace_steps:
            return {}
        with self._driver.span("trace"):
            records = self._drain(engines=engines)
            self._steps.append(records)
            self._last_step = step
            self._write()
        steps = [span for span in records["driver"].spans if span.name == "step"]
        start_ns, end_ns = steps[-1].start_ns, steps[-1].end_ns
        idle = {
            name: (end_ns - start_ns) * 1e-9 - busy_seconds(within(record.spans, start_ns, end_ns))
            for name, record in records.items()
            if name != "driver"
        }
        return {
            "idle": idle,
            "memory": {name: record.peak_bytes for name, record in records.items() if record.peak_bytes},
        }

    def add_engines(self) -> None:
        """Adds what the engines have done since their last answer to the newest step, whose end found them decoding."""
        if self._steps:
            with self._driver.span("trace"):
                self._add(self._answers(ranks=[]))

    def close(self) -> None:
        """Adds what came after the last step."""
        if self._config.trace_steps and self._steps:
            self._add(self._drain())
            self._write()

    def _add(self, records: dict[str, Record]) -> None:
        newest = self._steps[-1]
        newest |= {name: merged([newest[name], more]) if name in newest else more for name, more in records.items()}

    def _profiles(self, step: int) -> bool:
        return self._config.tool != "none" and step in self._config.steps

    def _drain(self, *, engines: bool = True) -> dict[str, Record]:
        driver = self._driver.drain()
        driver.peak_bytes = take_peak_memory()
        records = {"driver": driver, **self._answers(engines=engines)}
        checks = [self._rewards.spans.popleft() for _ in range(len(self._rewards.spans))]
        return records | {"verifiers": Record(checks, [], 0)}

    def _answers(self, **whom: Any) -> dict[str, Record]:
        found = self._cluster.ask("drain", **whom)
        names = sorted(found, key=lambda name: (name.rstrip("0123456789"), len(name), name))  # rank10 after rank9
        return {name: _shifted(found[name], self._offsets[name][0]) for name in names}

    def _write(self) -> None:
        names = dict.fromkeys(name for step in self._steps for name in step)
        whole = {name: merged([step[name] for step in self._steps if name in step]) for name in names}
        checks = whole.pop("verifiers").spans
        whole |= {f"verifier{number}": Record(lane, [], 0) for number, lane in enumerate(lanes(checks))}
        errors = {name: error / 1e3 for name, (_, error) in self._offsets.items() if error}
        facts = {"run": self._folder.path.name, "last_step": self._last_step, "clock_error_us": errors}
        facts["clock"] = "CLOCK_MONOTONIC of the driver"
        self._folder.write("trace.json", trace_text(whole, facts))

    def _clock_offsets(self) -> dict[str, tuple[int, int]]:
        """Nanoseconds to add to each process's clock, and their possible error; 0 and 0 on the driver's host."""
        here = clock()[0]
        asked: dict[str, list[tuple[int, int, int]]] = {}
        kernels: dict[str, str] = {}
        for _ in range(_QUESTIONS):
            sent = clock()[1]
            answers = self._cluster.ask("clock")
            received = clock()[1]
            for name, (kernel, theirs) in answers.items():
                kernels[name] = kernel
                asked.setdefault(name, []).append((sent, theirs, received))
            if set(kernels.values()) == {here}:
                break
        return {name: (0, 0) if kernels[name] == here else clock_offset(asked[name]) for name in asked}


def _shifted(record: Record, nanoseconds: int) -> Record:
    if not nanoseconds:
        return record
    spans = [
        Span(span.name, span.start_ns + nanoseconds, span.end_ns + nanoseconds, span.level) for span in record.spans
    ]
    counts = [count._replace(at_ns=count.at_ns + nanoseconds) for count in record.counts]
    return Record(spans, counts, record.lost, record.peak_bytes)
