"""What tracing every process costs: one run whose steps have their spans recorded or not, in turns.

    python benchmarks/tracing.py [--quick] [--json FILE]

The quickstart with responses of full length, so that steps do the same work; no learning (lr 1e-9), no rejection. A
step `on` is one with profiling.trace_steps=20, a step `off` one with 0: ranks and engine record nothing, nothing is
collected or written. A step lasts until the next one begins. Few steps have the quickstart's size: they say how long
such a step takes and how many spans and counters it has. Many short ones follow, of one problem and four responses,
because the machine's noise grows with a step's length and tracing does not: pairs of neighbours are compared, each
order as often, and what a traced one takes more is put in relation to the quickstart's step, by the number of its spans
and counters. Beside it stands what a traced step does more, timed alone: its spans, and the span `trace`.
"""

# pyright: reportIncompatibleMethodOverride=true

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's own programs: launch/ is not installed

from benchmarks.harness import Benchmark, main, model_dtype  # noqa: E402
from launch.fetch_model import fetch_smollm2  # noqa: E402
from or1_megatron.cluster import Cluster  # noqa: E402
from or1_megatron.data.tasks import write_addition_problems  # noqa: E402
from or1_megatron.display import Display  # noqa: E402
from or1_megatron.inputs import check_inputs  # noqa: E402
from or1_megatron.profiling.spans import Record, Spans  # noqa: E402
from or1_megatron.recipe import load  # noqa: E402
from or1_megatron.reward.service import RewardService  # noqa: E402
from or1_megatron.run import Run, Stop  # noqa: E402
from or1_megatron.runfolder import RunFolder  # noqa: E402
from or1_megatron.timeline import Timeline  # noqa: E402
from or1_megatron.train import magic  # noqa: E402

ROOT = Path(__file__).parents[1]
WARM_UP, WHOLE = 2, 6  # steps that do not count, steps of the quickstart's size
SHORT = {"rollout_batch_size": 1, "group_size": 4}
LIMIT = 0.01


def traced(step: int) -> bool:
    """After the warm-up: on, off, off, on, and again."""
    return (step - WARM_UP) % 4 in (0, 3)


class InTurns(Timeline):
    """The run's timeline in the steps that are traced, none in the others."""

    def attach(self, cluster: Cluster) -> None:
        self._all = [*cluster._ranks, *cluster._engines]
        self._processes = [psutil.Process(pid) for pid in [os.getpid(), *cluster.ask("ping").values()]]
        self.begun: dict[int, tuple[float, float]] = {}  # step -> seconds on the clock, CPU seconds of all processes
        self.records: dict[int, int] = {}  # traced step -> its spans and counters

    def begin(self, step: int) -> None:
        cpu = sum(sum(process.cpu_times()[:2]) for process in self._processes)
        self.begun[step] = time.perf_counter(), cpu
        on = traced(step)
        self._cluster._workers.wait([worker.__ray_call__.remote(_set_recording, on) for worker in self._all])
        super().begin(step)

    def end(self, step: int, *, engines: bool = True) -> dict[str, Any]:
        if traced(step):
            found = super().end(step, engines=engines)
            self.records[step] = sum(_size(record) for record in self._steps[-1].values())
            return found
        self._driver.drain()
        self._rewards.spans.clear()
        return {}


def _set_recording(process: Any, on: bool) -> None:
    process.spans.enabled = on


def _size(record: Record) -> int:
    return len(record.spans) + len(record.counts)


def span_seconds(count: int = 20_000) -> float:
    """Of a recorded span beyond one that is not; the fastest of seven, so that other programs do not count."""
    took = {True: [], False: []}
    for _ in range(7):
        for on, seconds in took.items():
            spans = Spans(enabled=on, idle=True, capacity=1000)
            started = time.perf_counter()
            for _ in range(count):
                with spans.span("x"):
                    pass
            seconds.append(time.perf_counter() - started)
    return (min(took[True]) - min(took[False])) / count


def run_in_turns(scratch: Path, model: Path, steps: int) -> tuple[InTurns, list[dict[str, Any]]]:
    """A whole run; its timeline and its metrics."""
    write_addition_problems(scratch / "all.jsonl", scratch / "held_out.jsonl", seed=0)
    stages = [{"until": WARM_UP + WHOLE}, {"until": steps, **SHORT}]
    words = [
        f"model.path={model}", f"data.train=[{scratch}/all.jsonl]", f"stages={json.dumps(stages)}",
        "optimizer.lr=1e-9", "loss.rejection=false", "rollout.stop=[]", "evaluation.files=[]", f"steps={steps}",
        f"run_dir={scratch}/run", f"model.dtype={model_dtype()}",
    ]  # fmt: skip
    config = load(ROOT / "launch" / "recipes" / "quickstart.yaml", words)
    inputs, folder, stop = check_inputs(config), RunFolder.create(config), Stop()
    with (
        open(scratch / "log", "w") as log,
        contextlib.redirect_stdout(log),
        Display(config.steps, config.name) as display,
        RewardService(config.reward, folder.logs) as rewards,
        Cluster(config.widest(), folder.path) as cluster,
    ):
        run = Run(config, inputs, folder, cluster, rewards, display, stop)
        timeline = InTurns(config.profiling, folder, cluster, rewards, run.spans)
        timeline.attach(cluster)
        run.timeline = timeline
        magic(run)
        folder.metrics.close()
    return timeline, folder.metrics.read()


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of the medians of samples drawn again from these."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def report(bench: Benchmark, timeline: InTurns, metrics: list[dict[str, Any]], last: int) -> None:
    whole, short = range(WARM_UP, WARM_UP + WHOLE), range(WARM_UP + WHOLE + 2, last)
    records = [statistics.median(timeline.records[n] for n in steps if traced(n)) for steps in (whole, short)]
    for name, place in (("wall", 0), ("CPU", 1)):
        took = {n: timeline.begun[n + 1][place] - timeline.begun[n][place] for n in (*whole, *short)}
        for size, steps in (("whole", whole), ("short", short)):
            bench.recorded(f"{size}, {name}, on", [took[n] for n in steps if traced(n)], unit="steps")
            bench.recorded(f"{size}, {name}, off", [took[n] for n in steps if not traced(n)], unit="steps")
        pairs = [tuple(sorted((first, first + 1), key=traced)) for first in short[:-1:2]]
        more = [took[on] - took[off] for off, on in pairs]
        of_whole = records[0] / records[1] / statistics.median(took[n] for n in whole if not traced(n))
        middle, (low, high) = statistics.median(more), interval(more)
        bench.note(
            f"{name}: a short step takes {1000 * middle:+.1f} ms more when traced ({1000 * low:+.1f} to "
            f"{1000 * high:+.1f} are 95 % of the medians of {len(more)} pairs) for {records[1]:.0f} records; "
            f"the quickstart's has {records[0]:.0f}: {middle * of_whole:+.2%} of it ({low * of_whole:+.2%} to "
            f"{high * of_whole:+.2%})"
        )
        bench.mark(f"tracing_{name}_paired", lambda share=middle * of_whole: share, LIMIT, "lower")
        if name == "wall":
            report_alone(bench, records[0], metrics, statistics.median(took[n] for n in whole if not traced(n)))


def report_alone(bench: Benchmark, records: float, metrics: list[dict[str, Any]], step_seconds: float) -> None:
    tracing = [row["seconds/trace"] for row in metrics if "seconds/trace" in row]
    each = span_seconds()
    share = (records * each + statistics.median(tracing)) / step_seconds
    bench.note(
        f"alone: {records:.0f} records of {1e6 * each:.2f} us, and {statistics.median(tracing):.4f} s (at most "
        f"{max(tracing):.4f}) to collect and write them: {share:.2%} of a step of {step_seconds:.1f} s"
    )
    bench.mark("tracing_alone", lambda: share, LIMIT, "lower")


def build(bench: Benchmark, quick: bool) -> None:
    model = fetch_smollm2(ROOT / ".cache" / "models").absolute()
    scratch = Path(bench.stack.enter_context(tempfile.TemporaryDirectory(prefix="or1-bench-")))
    last = WARM_UP + WHOLE + 2 + (4 if quick else 240)  # of whose end nothing is told: it saves a checkpoint
    timeline, metrics = run_in_turns(scratch, model, last)
    report(bench, timeline, metrics, last)


if __name__ == "__main__":
    main("tracing", "seconds of a step with and without spans of every process", build)
