"""What tracing every process costs: one run whose steps have their spans recorded or not, in turns.

    python benchmarks/tracing.py [--quick] [--json FILE]

The quickstart's model; every step has the same four problems and responses of full length, so that all do the same
work; no learning (lr 1e-9), no rejection. A step `on` is one with profiling.trace_steps=20, a step `off` one with 0:
ranks and engine record nothing, nothing is collected or written. A step lasts until the next one begins. Pairs of
neighbours are compared, each order as often; beside it stands what a traced step does more, timed alone: its spans and
counters, and the span `trace`.
"""

from __future__ import annotations

import contextlib
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

from benchmarks.harness import Benchmark, main  # noqa: E402
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
PROMPTS, WARM_UP = 4, 2
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
        self.records: list[int] = []  # spans and counters of each traced step

    def begin(self, step: int) -> None:
        cpu = sum(sum(process.cpu_times()[:2]) for process in self._processes)
        self.begun[step] = time.perf_counter(), cpu
        on = traced(step)
        self._cluster._workers.wait([worker.__ray_call__.remote(_set_recording, on) for worker in self._all])
        super().begin(step)

    def end(self, step: int) -> dict[str, Any]:
        if traced(step):
            found = super().end(step)
            self.records.append(sum(_size(record) for record in self._steps[-1].values()))
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
    lines = (scratch / "all.jsonl").read_text().splitlines()[:PROMPTS]
    (scratch / "train.jsonl").write_text("\n".join(lines) + "\n")
    words = [
        f"model.path={model}", f"data.train=[{scratch}/train.jsonl]", f"rollout.rollout_batch_size={PROMPTS}",
        "optimizer.lr=1e-9", "loss.rejection=false", "rollout.stop=[]", "evaluation.files=[]", f"steps={steps}",
        f"run_dir={scratch}/run",
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
        timeline = InTurns(folder, cluster, rewards, run.spans)
        timeline.attach(cluster)
        run.timeline = timeline
        magic(run)
        folder.close()
    return timeline, folder.read_metrics()


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of the medians of samples drawn again from these."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def report(bench: Benchmark, timeline: InTurns, metrics: list[dict[str, Any]], last: int) -> None:
    steps = range(WARM_UP, last)
    off = {}
    for name, place in (("wall", 0), ("CPU", 1)):
        took = {step: timeline.begun[step + 1][place] - timeline.begun[step][place] for step in steps}
        bench.recorded(f"{name}, on", [took[step] for step in steps if traced(step)], unit="steps")
        off[name] = bench.recorded(f"{name}, off", [took[step] for step in steps if not traced(step)], unit="steps")
        pairs = [tuple(sorted((first, first + 1), key=traced)) for first in steps[:-1:2]]
        more = [took[on] - took[without] for without, on in pairs]
        low, high = interval(more)
        middle, whole = statistics.median(more), off[name].median
        bench.note(
            f"{name}: a traced step takes {middle:+.3f} s more, {middle / whole:+.2%}; 95 % of the medians of "
            f"{len(more)} pairs are between {low / whole:+.2%} and {high / whole:+.2%}"
        )
        bench.mark(f"tracing_{name}_paired", lambda share=middle / whole: share, LIMIT, "lower")
    tracing = [row["seconds/trace"] for row in metrics if "seconds/trace" in row]
    records, each = statistics.median(timeline.records), span_seconds()
    seconds = records * each + statistics.median(tracing)
    bench.note(
        f"alone: {records:.0f} spans and counters a step of {1e6 * each:.2f} us, and "
        f"{statistics.median(tracing):.4f} s (at most {max(tracing):.4f}) to collect and write them: "
        f"{seconds / off['wall'].median:.2%}"
    )
    bench.mark("tracing_alone", lambda: seconds / off["wall"].median, LIMIT, "lower")


def build(bench: Benchmark, quick: bool) -> None:
    model = fetch_smollm2(ROOT / ".cache" / "models").absolute()
    scratch = Path(bench.stack.enter_context(tempfile.TemporaryDirectory(prefix="or1-bench-")))
    last = WARM_UP + (4 if quick else 80)  # of whose end nothing is told: it saves a checkpoint
    timeline, metrics = run_in_turns(scratch, model, last)
    report(bench, timeline, metrics, last)


if __name__ == "__main__":
    main("tracing", "seconds of a step with and without spans of every process", build)
