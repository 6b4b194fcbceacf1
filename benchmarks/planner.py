"""`or1 plan --calibrate` against the machine: from ten steps of one size it foretells steps of other sizes.

    python benchmarks/planner.py [--quick] [--json FILE]

One run of the quickstart's model on its problems; its stages are the sizes, which take turns, so that a machine that
slows down slows all of them. The calibration sees the steps of its own size only, without the run's first. No learning
(lr 1e-9), so that nothing drifts, and no rejection, so that how many groups are informative is not what is measured. A
response ends with the first 9 that the model writes: lengths differ, and a longer context makes longer responses.
Measured seconds are the median of a size's steps. How far responses would have gone that the calibration's context has
cut no run can say: for the longer context the lengths are given, as `--lengths RUN` does.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's own programs: launch/ is not installed

from benchmarks.harness import Benchmark, main, model_dtype  # noqa: E402
from launch.fetch_model import fetch_smollm2  # noqa: E402
from or1_megatron import plan  # noqa: E402
from or1_megatron.data.tasks import write_addition_problems  # noqa: E402
from or1_megatron.profiling.planner import StepTime  # noqa: E402
from or1_megatron.runfolder import RunFolder  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WITHIN = 0.15
DRAWS = 64  # batches that a planned step is the mean of


@dataclass(frozen=True)
class Size:
    """D_R prompts x gs responses in a context of T tokens."""

    rollout_batch_size: int
    group_size: int
    context_length: int

    def __str__(self) -> str:
        return f"{self.rollout_batch_size} x {self.group_size} in {self.context_length}"


CALIBRATION = Size(6, 4, 96)
OTHERS = {
    "batch": Size(12, 4, 96),
    "group": Size(6, 8, 96),
    "shorter": Size(6, 4, 64),
    "longer": Size(6, 4, 128),
    "all, shorter": Size(12, 8, 64),
    "all, longer": Size(9, 6, 128),
}


def turns(rounds: int, calibrating: int) -> list[tuple[Size, int]]:
    """(size, steps) of each stage: so many rounds of as many steps to calibrate on and one of each other size, and a
    last round with a single step to calibrate on."""
    table: list[tuple[Size, int]] = []
    for index, steps in enumerate([*[calibrating] * rounds, 1]):
        table.append((CALIBRATION, steps + (index == 0)))  # the first step of a run warms up
        others = list(OTHERS.values())
        first = index % len(others)
        table += [(size, 1) for size in others[first:] + others[:first]]
    return table


def recipe(table: list[tuple[Size, int]], model: Path, problems: Path) -> dict[str, Any]:
    stages: list[dict[str, int]] = []
    for size, steps in table:
        until = steps + (stages[-1]["until"] if stages else 0)
        stages.append({"until": until, **dataclasses.asdict(size)})
    return {
        "inherits": str(ROOT / "launch" / "recipes" / "quickstart.yaml"),
        "name": "planner",
        "steps": stages[-1]["until"],
        "stages": stages,
        "model": {"path": str(model)},
        "data": {"train": [str(problems)]},
        "rollout": {"max_response_length": 0, "stop": ["9"]},
        "loss": {"rejection": False},
        "optimizer": {"lr": 1e-9},
        "evaluation": {"files": []},
        "profiling": {"trace_steps": stages[-1]["until"]},
    }


def run_of(tree: dict[str, Any], scratch: Path) -> RunFolder:
    """The run folder of `or1 train` with this recipe."""
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(tree))
    words = ["recipe.yaml", "run_dir=run", f"model.dtype={model_dtype()}"]
    command = [sys.executable, "-m", "or1_megatron", "train", *words]
    mine = {**os.environ, "PYTHONPATH": str(ROOT)}  # this checkout, wherever the installed package lies
    ended = subprocess.run(command, cwd=scratch, env=mine, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return RunFolder.open(scratch / "run")


def measured_steps(run: RunFolder, stages: set[int]) -> list[dict[str, float]]:
    """rollout, update, others and step seconds of every step of these stages but the run's first."""
    rows = [row for row in run.metrics.read() if "seconds/step" in row and row["step"] > 1 and row["stage"] in stages]
    return [{name: row[f"seconds/{name}"] for name in ("rollout", "update", "others", "step")} for row in rows]


def planned(run: RunFolder, stages: dict[Size, set[int]], size: Size) -> StepTime:
    """Of a size, from the steps of CALIBRATION alone but for the lengths in a longer context."""
    calibrated = stages[CALIBRATION]
    longer = size.context_length > CALIBRATION.context_length
    assumptions = plan.measured(run, stages[size] if longer else calibrated)
    config = run.config.in_stage(min(stages[size]) - 1)
    return plan.calibrated_steps(config, plan.calibration_of(run, calibrated), assumptions, DRAWS)[0][0]


def compare(bench: Benchmark, run: RunFolder, table: list[tuple[Size, int]]) -> None:
    """A case, a line and a mark for each size."""
    stages: dict[Size, set[int]] = {}
    for number, (size, _) in enumerate(table, 1):
        stages.setdefault(size, set()).add(number)
    bench.note(plan.calibration_of(run, stages[CALIBRATION]).describe())
    bench.note(f"{'':30} {'rollout':>22} {'update':>22} {'others':>22} {'step':>22}")
    parts: list[float] = []
    for name, size in {"calibration": CALIBRATION, **OTHERS}.items():
        if size not in stages:
            continue
        steps, time = measured_steps(run, stages[size]), planned(run, stages, size)
        foretold = {"rollout": time.rollout, "update": time.update, "others": time.others, "step": time.total}
        line, deviations = f"{name + ', ' + str(size):30}", {}
        for part, seconds in foretold.items():
            found = statistics.median(step[part] for step in steps)
            deviations[part] = float(seconds) / found - 1
            line += f" {f'{found:.2f} -> {seconds:.2f} {deviations[part]:+.1%}':>22}"
        bench.note(line)
        bench.recorded(f"{name}, {size}", [step["step"] for step in steps], unit="steps")
        if size != CALIBRATION:
            bench.mark(f"{name.replace(', ', '_')}_step_off", partial(float, abs(deviations["step"])), WITHIN, "lower")
            parts += [abs(deviations["rollout"]), abs(deviations["update"])]
    bench.mark("worst_rollout_or_update_off", lambda: max(parts), WITHIN, "lower")
    bench.note("measured -> planned seconds of a step, and the deviation")


def build(bench: Benchmark, quick: bool) -> None:
    model = fetch_smollm2(ROOT / ".cache" / "models").absolute()
    scratch = Path(bench.stack.enter_context(tempfile.TemporaryDirectory(prefix="or1-bench-")))
    write_addition_problems(scratch / "train.jsonl", scratch / "held_out.jsonl", seed=0)
    table = turns(rounds=3, calibrating=3)
    if quick:
        table = [(CALIBRATION, 3), *((size, 1) for size in list(OTHERS.values())[:2])]
    compare(bench, run_of(recipe(table, model, scratch / "train.jsonl"), scratch), table)


if __name__ == "__main__":
    main("planner", "steps foretold from ten steps of another size, on this machine", build)
