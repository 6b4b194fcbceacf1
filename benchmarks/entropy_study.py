"""The paper's entropy claims, asked of a small taught model: real training runs, each question with a verdict.

    python benchmarks/entropy_study.py [--quick] [--out DIR] [--json FILE] [--jobs N] [--before "nice -n 19"]

The model is benchmarks/models/reasoner.py's, taught once per DIR. Every variant is entropy_study.yaml with the keys of
entropy_claims.py changed, trained by `or1 train`, once per seed. A run that is complete is not done again, so that a
study goes on where it was stopped; one that is not is removed and begins anew. Checkpoints are removed when a run is
complete. DIR then holds the run folders, one log per run, table.md, study.json and a picture per question. --quick: two
variants, one seed, three steps; shows that the program works and decides nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository's own programs: launch/ is not installed

from benchmarks.entropy_claims import (  # noqa: E402
    FOUR,
    ONE,
    QUESTIONS,
    VARIANTS,
    Question,
    Results,
    Variant,
    judge,
    judge_target,
    measures,
)
from benchmarks.models import reasoner  # noqa: E402
from or1_megatron.config import Config  # noqa: E402
from or1_megatron.errors import RunFailure, UserError  # noqa: E402
from or1_megatron.recipe import load  # noqa: E402
from or1_megatron.report.picture import picture  # noqa: E402
from or1_megatron.report.plots import Line, line_plot  # noqa: E402
from or1_megatron.runfolder import RunFolder  # noqa: E402

RECIPE = ROOT / "benchmarks" / "entropy_study.yaml"
SEEDS = (0, 1, 2, 3)
LESSONS, QUICK_LESSONS = 500, 150
QUICK = "steps=3", "evaluation.num_samples=1"


def table(results: Results) -> str:
    """Markdown, a line per variant: means over the seeds, and their standard deviations where there are several."""
    columns = {
        "entropy at start": "entropy_start",
        "mean": "entropy_mean",
        "late": "entropy_late",
        "reward late": "reward_late",
        "held out before": "held_out_before",
        "after": "held_out",
        "alpha late": "alpha_late",
        "truncated late": "truncated_late",
        "length late": "length_late",
        "minutes": "minutes",
    }
    lines = ["| variant | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, runs in results.items():
        cells = []
        for measure in columns.values():
            values = [float(getattr(run, measure)) for run in runs.values()]
            spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Study:
    """The runs of one folder."""

    def __init__(self, out: Path, before: Sequence[str], jobs: int, *, quick: bool):
        self.out, self._before, self._jobs, self.quick = out, before, jobs, quick
        self.variants = (ONE, FOUR) if quick else VARIANTS
        self.seeds = SEEDS[:1] if quick else SEEDS
        self._ended = threading.Event()
        files = out / "train.jsonl", out / "held_out.jsonl"
        inputs = f"model.path={out / 'model'}", f"data.train=[{files[0]}]", f"evaluation.files=[{files[1]}]"
        self._shared = (*inputs, *(QUICK if quick else ()))
        out.mkdir(parents=True, exist_ok=True)
        reasoner.write_problems(*files, seed=0)

    def teach(self) -> None:
        """The first model of all runs, unless it is there."""
        if not (self.out / "model").is_dir():
            begun = reasoner.teach(self.out / "model.part", steps=QUICK_LESSONS if self.quick else LESSONS)
            begun.rename(self.out / "model")

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.out / f"{variant.name.replace(',', '').replace(' ', '-')}-seed{seed}"

    def words(self, variant: Variant, seed: int) -> list[str]:
        own = (f"name={variant.name}", f"run_dir={self.folder(variant, seed)}", f"seed={seed}", f"data.seed={seed}")
        return [*self._shared, *own, *variant.overrides]

    def run(self) -> None:
        """Every seed of every variant, the first seed of all first. Raises RunFailure, UserError."""
        plan = [(variant, seed) for seed in self.seeds for variant in self.variants]
        with ThreadPoolExecutor(self._jobs) as pool:
            tasks = [pool.submit(self._once, f"[{n}/{len(plan)}]", *one) for n, one in enumerate(plan, 1)]
            try:
                for task in tasks:
                    task.result()
            finally:
                self._ended.set()  # after a failure: the runs that have begun come to their end, no other begins

    def _once(self, number: str, variant: Variant, seed: int) -> None:
        if self._ended.is_set():
            return
        path, words = self.folder(variant, seed), self.words(variant, seed)
        label = f"{number} {variant.name}, seed {seed}"
        if complete(path, load(RECIPE, words)):
            print(f"{label}: done before", flush=True)
            return
        shutil.rmtree(path, ignore_errors=True)
        try:
            self._train(label, path, words)
        except BaseException:
            self._ended.set()
            raise
        shutil.rmtree(path / "checkpoints")

    def _train(self, label: str, path: Path, words: list[str]) -> None:
        command = [*self._before, sys.executable, "-m", "or1_megatron", "train", str(RECIPE), *words]
        started, said = time.monotonic(), [""]
        with (
            path.with_suffix(".log").open("w") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                said = [*said[-4:], line.rstrip()]
                if line.startswith(("step ", "held-out ")):
                    print(f"{label}: {line.rstrip()}", flush=True)
        if process.returncode:
            raise RunFailure(f"{label} ended with exit code {process.returncode}: {' / '.join(said)}")
        print(f"{label}: {time.monotonic() - started:.0f} s in all", flush=True)

    def rows(self, variant: Variant, seed: int) -> list[dict[str, Any]]:
        return RunFolder.open(self.folder(variant, seed)).metrics.read()

    def results(self) -> Results:
        return {one.name: {seed: measures(self.rows(one, seed)) for seed in self.seeds} for one in self.variants}

    def draw(self, question: Question) -> None:
        """The question's metric over the steps into its file, a line per variant: the mean over its seeds."""
        lines = []
        for colour, variant in enumerate(question.variants):
            runs = [[row for row in self.rows(variant, seed) if question.metric in row] for seed in self.seeds]
            steps = zip(*runs, strict=True)
            points = [(rows[0]["step"], statistics.fmean(row[question.metric] for row in rows)) for rows in steps]
            lines.append(Line(variant.name, points, colour))
        plot = line_plot(question.title, lines, percent=question.percent, zero=True, level=question.level)
        assert plot is not None
        entries = [(line.label, line.colour, line.dash) for line in lines]
        (self.out / question.file).write_text(picture(question.title, plot, entries))


def complete(path: Path, config: Config) -> bool:
    """Whether the run in `path` has ended. Raises UserError when it was another one."""
    if not (path / "config.yaml").is_file():
        return False
    folder = RunFolder.open(path)
    if folder.config != config:
        raise UserError(f"{path} holds a run with other settings than this study's; give another --out, or remove it")
    rows = folder.metrics.read()
    return bool(rows) and rows[-1]["step"] == config.steps and "seconds/step" not in rows[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="The paper's entropy claims, asked of a small model, each with a verdict."
    )
    parser.add_argument("--quick", action="store_true", help="two variants, one seed, three steps: that it works")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default runs/entropy-study, with -quick appended")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write measures and verdicts here")
    parser.add_argument("--jobs", metavar="N", type=int, default=2, help="runs at a time; default %(default)s")
    parser.add_argument("--before", metavar="WORDS", default="", help="put before each run's command: nice -n 19")
    options = parser.parse_args(arguments)
    out = options.out or Path("runs") / ("entropy-study-quick" if options.quick else "entropy-study")
    try:
        study = Study(out.resolve(), shlex.split(options.before), options.jobs, quick=options.quick)
        study.teach()
        study.run()
    except (UserError, RunFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are left", file=sys.stderr)
        return 130
    results = study.results()
    for question in (questions := [q for q in QUESTIONS if {v.name for v in q.variants} <= results.keys()]):
        study.draw(question)
    verdicts = [judge(claim, results) for question in questions for claim in question.claims]
    verdicts += [] if options.quick else [judge_target(results)]
    text = table(results) + "\n\n" + "\n".join(f"- {v.outcome}: {v.text}" for v in verdicts)
    (study.out / "table.md").write_text(text + "\n")
    runs = {name: {seed: asdict(run) for seed, run in found.items()} for name, found in results.items()}
    record = json.dumps({"runs": runs, "verdicts": [asdict(v) for v in verdicts]}, indent=2) + "\n"
    for file in (study.out / "study.json", *([options.json] if options.json else [])):
        file.write_text(record.replace(": NaN", ": null"))
    print(text)
    for v in verdicts:
        print(f"mark {v.name} {v.value:.4g} 1 {'holds' if v.outcome == 'confirmed' else 'falls short'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
