"""Seconds of a step with and without `rollout.overlap`, in whole runs of SmolLM2-135M-Instruct by `or1 train`.

    python benchmarks/overlap.py [--quick] [--json FILE] [--before "nice -n 19"]

8 prompts x 8 responses of at most 32 tokens, all groups trained on, engine and actor separate, pi_old as sampled. Three
cases take turns, run by run: in turn (engine and actor have all cores, one after the other); overlap with the same
threads; overlap with half of the cores each. Steps 3 to the last but one are counted: the first two warm up, and in the
last no rollout is begun. A step's seconds are all of it: rollout, or waiting for it, update and weight push.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository's own programs: launch/ is not installed

from benchmarks.harness import machine, model_dtype  # noqa: E402
from launch.fetch_model import fetch_smollm2  # noqa: E402
from or1_megatron.data.tasks import write_addition_problems  # noqa: E402
from or1_megatron.runfolder import RunFolder  # noqa: E402

CORES = os.cpu_count() or 2
SHARED = (
    *("optimizer.lr=1e-6", "loss.rejection=false", "loss.old_log_probs=engine", "entropy.rule=off"),
    *("rollout.rollout_batch_size=8", "rollout.max_response_length=32", "rollout.context_length=128"),
    *("rollout.stop=[]", "rollout.placement=separate", "evaluation.files=[]", "parallel.num_ranks=1"),
)


def threads(count: int) -> tuple[str, ...]:
    return (f"parallel.cpu_threads_per_rank={count}", f"rollout.cpu_threads_per_engine={count}")


CASES = {
    "in turn": threads(CORES),
    "overlap, the same threads": ("rollout.overlap=true", *threads(CORES)),
    "overlap, half of the cores each": ("rollout.overlap=true", *threads(max(1, CORES // 2))),
}


def run(folder: Path, words: list[str], before: list[str]) -> list[dict[str, float]]:
    """The counted steps of one run."""
    recipe = ROOT / "launch" / "recipes" / "quickstart.yaml"
    words = [f"run_dir={folder}", f"model.dtype={model_dtype()}", *words]
    command = [*before, sys.executable, "-m", "or1_megatron", "train", str(recipe), *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in RunFolder.open(folder).metrics.read() if "seconds/update" in row]
    return rows[2:-1]


def told(name: str, steps: list[dict[str, float]]) -> str:
    def median(metric: str) -> float:
        return statistics.median(step.get(metric, 0.0) for step in steps)

    parts = [f"{part} {median(f'seconds/{part}'):5.2f}" for part in ("rollout", "update", "sync")]
    best = min(step["seconds/step"] for step in steps)
    return f"{name:33} {best:7.2f} {median('seconds/step'):9.2f} {len(steps):6}  {', '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a step with and without rollout.overlap.")
    parser.add_argument("--quick", action="store_true", help="one short run of each case")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every counted step here")
    parser.add_argument("--before", metavar="WORDS", default="", help="put before each run's command: nice -n 19")
    options = parser.parse_args()
    rounds, steps = (1, 4) if options.quick else (2, 9)
    model = fetch_smollm2(ROOT / ".cache" / "models")
    counted: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory(prefix="or1-bench-", dir=os.environ.get("TMPDIR")) as scratch:
        train = Path(scratch) / "train.jsonl"
        write_addition_problems(train, Path(scratch) / "held_out.jsonl", seed=0)
        shared = [f"model.path={model}", f"data.train=[{train}]", f"steps={steps}", *SHARED]
        for turn in range(rounds):
            for number, (name, words) in enumerate(CASES.items()):
                print(f"round {turn + 1} of {rounds}: {name}", flush=True)
                folder = Path(scratch) / f"run-{turn}-{number}"
                counted[name] += run(folder, [*shared, *words], shlex.split(options.before))
                shutil.rmtree(folder)  # a checkpoint is 2 GB
    print(f"overlap: one step of SmolLM2-135M, {CORES} cores\n")
    print(f"{'':33} {'min s':>7} {'median s':>9} {'steps':>6}  medians of its parts, s (update and rollout overlap)")
    print("\n".join(told(name, steps) for name, steps in counted.items()))
    medians = [statistics.median(step["seconds/step"] for step in steps) for steps in counted.values()]
    gain = medians[0] / min(medians[1:])
    if options.json:
        options.json.write_text(json.dumps({"steps": counted, "machine": machine()}) + "\n")
    print(f"mark overlap_gain {gain:.4g} 1 {'holds' if gain >= 1 else 'falls short'}")


if __name__ == "__main__":
    main()
