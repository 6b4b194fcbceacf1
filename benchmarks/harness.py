"""The convention of every benchmark: ours, the peers and the floor measured in one run, round by round.

    python benchmarks/NAME.py [--quick] [--json FILE]

The cases take turns, so that a machine that slows down slows them all; the minimum is what the code can do, the
median what this machine gave. The last lines are the marks, one each: `mark NAME VALUE TARGET holds|falls short`.
A mark that falls short is a result, not an error: the exit code is 0. `--quick` ends within a minute. What round it is
goes to the standard error, and so do the rows of each part of a program in parts.

A benchmark is a function that registers cases and marks:

    def build(bench: Benchmark, quick: bool) -> None:
        ours = bench.case("service", score_all, amount=100, unit="checks")
        pool = bench.case("plain pool", pool_all, kind="peer", amount=100, unit="checks")
        bench.mark("service_over_pool", lambda: ours.rate / pool.rate, target=1.0)

    main("reward", "Math checks", build)
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from or1_megatron.parallel import device
from or1_megatron.runfolder import package_versions

Kind = Literal["ours", "peer", "floor"]
QUICK_BUDGET_S = 45.0


@dataclass
class Case:
    """One thing measured. `run` does the work once; it may return the seconds itself where it times a part only."""

    label: str
    kind: Kind
    run: Callable[[], float | None]
    amount: float  # work in one run, in `unit`
    unit: str
    remark: str | Callable[[], str] = ""  # at the end of its row
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Seconds of the fastest run."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Seconds of the median run."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Units per second of the fastest run."""
        return self.amount / self.best

    @property
    def median_rate(self) -> float:
        return self.amount / self.median

    def told(self) -> str:
        """The remark, once the runs are done."""
        return self.remark if isinstance(self.remark, str) else self.remark()


@dataclass
class Mark:
    """A target. `value` is computed when all cases have run."""

    name: str
    value: Callable[[], float]
    target: float
    better: Literal["higher", "lower"]

    def holds(self, value: float) -> bool:
        return value >= self.target if self.better == "higher" else value <= self.target


class Benchmark:
    """Cases, marks and notes of one table. Resources the cases share go on `stack`, which closes after the runs."""

    def __init__(self, name: str, description: str):
        self.name = name
        self.description = description
        self.stack = ExitStack()
        self.cases: list[Case] = []
        self.marks: list[Mark] = []
        self.notes: list[str | Callable[[], str]] = []
        self._parts: list[tuple[Callable[[], None], int]] = []
        self._started = time.perf_counter()

    def part(self, build: Callable[[], None], rounds: int = 7) -> None:
        """The cases that `build` registers take turns among themselves, at most `rounds` times, and what it puts on
        `stack` closes after them: for cases that do not fit into memory all at once."""
        self._parts.append((build, rounds))

    def case(
        self, label: str, run: Callable[[], float | None], kind: Kind = "ours", amount: float = 1.0, unit: str = "runs"
    ) -> Case:
        case = Case(label, kind, run, amount, unit)
        self.cases.append(case)
        return case

    def recorded(self, label: str, seconds: list[float], amount: float = 1.0, unit: str = "runs") -> Case:
        """A case that a run of the whole program has timed already; it takes no turns."""
        case = Case(label, "ours", lambda: None, amount, unit, seconds=list(seconds))
        self.cases.append(case)
        return case

    def mark(
        self, name: str, value: Callable[[], float], target: float, better: Literal["higher", "lower"] = "higher"
    ) -> None:
        assert " " not in name, "a mark's line is split at spaces"
        self.marks.append(Mark(name, value, target, better))

    def note(self, text: str | Callable[[], str]) -> None:
        """A line under the table, e.g. why a peer is missing."""
        self.notes.append(text)

    def measure(self, rounds: int, budget_s: float) -> None:
        """All cases, part after part, with an equal share of the budget for each."""
        with self.stack:
            if self.cases:
                self._take_turns(self.cases, rounds, budget_s / (1 + len(self._parts)))
        for number, (build, most) in enumerate(self._parts, 1):
            first = len(self.cases)
            with ExitStack() as self.stack:
                build()
                part = f"part {number} of {len(self._parts)}, " if len(self._parts) > 1 else ""
                self._take_turns(self.cases[first:], min(rounds, most), budget_s / len(self._parts), part)
            if len(self._parts) > 1 and len(self.cases) > first:  # a program that is stopped has said what it knew
                print("\n".join(self._rows(self.cases[first:])), file=sys.stderr, flush=True)
            for case in self.cases[first:]:
                case.run = _over  # what it held is freed with it
        assert self.cases, "a benchmark needs a case"

    def _take_turns(self, cases: list[Case], rounds: int, budget_s: float, part: str = "") -> None:
        """One warm-up round, then up to `rounds`; none is begun that would not end within the budget."""
        cases = [case for case in cases if not case.seconds]
        if not cases:
            return
        started = time.perf_counter()
        for case in cases:
            case.run()
        longest = time.perf_counter() - started
        for index in range(rounds):
            begun = time.perf_counter()
            if index and begun - started + longest > budget_s:
                break
            said = f"{self.name}: {part}round {index + 1} of {rounds}, {begun - self._started:.0f} s"
            print(said, file=sys.stderr, flush=True)
            first = index % len(cases)
            for case in cases[first:] + cases[:first]:
                case.seconds.append(_timed(case.run))
            longest = max(longest, time.perf_counter() - begun)

    def table(self) -> str:
        """What was measured: seconds of one run, and the rates of the fastest and the median run."""
        notes = (note if isinstance(note, str) else note() for note in self.notes)
        return "\n".join([f"{self.name}: {self.description}", "", *self._rows(self.cases), *notes])

    def _rows(self, cases: list[Case]) -> list[str]:
        width = max(len(case.label) for case in cases)
        lines = [f"{'':{width}}  kind   {'min s':>10} {'median s':>10} {'best rate':>12} {'median rate':>12}  runs"]
        for case in cases:
            row = (
                f"{case.label:{width}}  {case.kind:5}  {case.best:10.4g} {case.median:10.4g} "
                f"{case.rate:12,.1f} {case.median_rate:12,.1f}  {len(case.seconds):4}  {case.unit}/s  {case.told()}"
            )
            lines.append(row.rstrip())
        return lines

    def mark_lines(self) -> list[str]:
        values = [(mark, mark.value()) for mark in self.marks]
        return [
            f"mark {mark.name} {value:.4g} {mark.target:.4g} {'holds' if mark.holds(value) else 'falls short'}"
            for mark, value in values
        ]

    def record(self) -> dict[str, Any]:
        """What --json writes: rows, marks, machine, versions."""
        rows = [
            {
                "label": case.label,
                "kind": case.kind,
                "unit": case.unit,
                "amount": case.amount,
                "seconds": case.seconds,
                "min": case.best,
                "median": case.median,
                "remark": case.told(),
            }
            for case in self.cases
        ]
        marks = []
        for mark in self.marks:
            value = mark.value()
            marks.append({"name": mark.name, "value": value, "target": mark.target, "holds": mark.holds(value)})
        versions = {"python": platform.python_version(), **package_versions()}
        return {"name": self.name, "rows": rows, "marks": marks, "machine": machine(), "versions": versions}


def machine() -> dict[str, Any]:
    """The hardware that the numbers were measured on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": f"{device.num_devices()} x {device.device_name()}" if device.has_cuda() else "none",
    }


def model_dtype() -> str:
    """model.dtype of a benchmark in bf16 on the machine at hand: fp32 where bf16 products are emulated."""
    return "fp32" if device.slow_in_bf16() else "bf16"


def main(
    name: str, description: str, build: Callable[[Benchmark, bool], None], arguments: list[str] | None = None
) -> None:
    """Parses the command line, runs what `build` registers, prints table and marks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer runs; ends within a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write rows, marks, machine and versions here")
    options = parser.parse_args(arguments)
    bench = Benchmark(name, description)
    build(bench, options.quick)
    bench.measure(rounds=3 if options.quick else 7, budget_s=QUICK_BUDGET_S if options.quick else float("inf"))
    print(bench.table())
    if options.json:
        options.json.write_text(json.dumps(bench.record(), indent=2) + "\n")
    for line in bench.mark_lines():
        print(line)


def _over() -> None:
    raise AssertionError("a case runs only in its part")


def _timed(run: Callable[[], float | None]) -> float:
    started = time.perf_counter()
    own = run()
    return time.perf_counter() - started if own is None else own
