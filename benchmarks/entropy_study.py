"""MAGIC's choices at the quickstart's size: real training runs of SmolLM2-135M-Instruct, each question with a verdict.

    python benchmarks/entropy_study.py [--quick] [--out DIR] [--json FILE] [--before "nice -n 19"]

Every variant is the quickstart recipe with a few keys changed, trained by `or1 train`, once per seed, one run after
another. A run that is complete is not done again, so that a study goes on where it was stopped; one that is not is
removed and begins anew. Checkpoints are removed when a run is complete. DIR then holds the run folders, one log per
run, table.md, study.json and a picture per question.

The rule of the verdicts: per seed, the difference of a measure between two variants is taken. A claim is `confirmed`
when the difference has the claimed sign for every seed and its mean is larger than the spread, `refuted` when that is
so for the other sign, and `undecided` otherwise. The spread is the largest difference between two seeds of one variant,
over all variants. `late` is the mean over the last third of the steps. --quick: two variants, one seed, three steps;
shows that the program works and decides nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository's own programs: launch/ is not installed

from benchmarks.harness import model_dtype  # noqa: E402
from launch.fetch_model import fetch_smollm2  # noqa: E402
from or1_megatron.config import Config  # noqa: E402
from or1_megatron.data.tasks import write_addition_problems  # noqa: E402
from or1_megatron.errors import RunFailure, UserError  # noqa: E402
from or1_megatron.recipe import load  # noqa: E402
from or1_megatron.report.picture import picture  # noqa: E402
from or1_megatron.report.plots import Line, line_plot  # noqa: E402
from or1_megatron.runfolder import RunFolder  # noqa: E402

RECIPE = ROOT / "launch" / "recipes" / "quickstart.yaml"
TARGET = 0.1  # nats per token: between a policy that has learned the sums (0.05) and one that has begun to (0.2)
EQUAL_ENTROPY = 0.15  # at which rewards are compared
NEAR = 0.25  # "holds the target": within this share of it
SEEDS = (0, 1)
SHARED = ("steps=14", "rollout.rollout_batch_size=8", "optimizer.lr=5e-5", "evaluation.num_samples=8")
QUICK = ("steps=3", "rollout.rollout_batch_size=8", "rollout.group_size=2", "evaluation.num_samples=1")
CONTROL = ("entropy.rule=paper", f"entropy.target={TARGET}", "entropy.delta=0.01")


@dataclass(frozen=True)
class Variant:
    """Keys of the recipe that differ from the other variants'."""

    name: str
    overrides: tuple[str, ...]


ONE = Variant("1 SGD step", ("entropy.rule=off",))
FOUR = Variant("4 SGD steps", ("entropy.rule=off", "loss.mini_batch_size=2", "loss.old_log_probs=recompute"))
ADAPTIVE = Variant("adaptive control", CONTROL)
ALL_GROUPS = Variant("adaptive control, no rejection", (*CONTROL, "loss.rejection=false"))
MASKED = Variant("mask before", ("entropy.rule=off", "loss.advantage_mask=before"))
VARIANTS = (ONE, FOUR, ADAPTIVE, ALL_GROUPS, MASKED)


@dataclass(frozen=True)
class Measures:
    """Of one run. Entropies (e_k) in nats per token, the rest shares; late: mean over the last third of the steps."""

    entropy_start: float
    entropy_min: float
    entropy_mean: float
    entropy_late: float
    entropy_unrest: float  # standard deviation of the late ones
    reward_late: float
    reward_at_equal_entropy: float  # at the first step with an entropy below EQUAL_ENTROPY; NaN: there was none
    truncated_late: float
    held_out_before: float
    held_out: float
    alpha_late: float
    alpha_max: float
    idle_steps: int  # steps without an update: no group was informative
    minutes: float


@dataclass(frozen=True)
class Claim:
    """That a measure of variant `of` is below or above that of variant `than`; the paper's section in `text`."""

    name: str
    text: str
    measure: str
    of: Variant
    relation: Literal["below", "above"]
    than: Variant


@dataclass(frozen=True)
class Question:
    title: str
    metric: str  # drawn over the steps
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...]
    file: str
    level: float | None = None
    percent: bool = False


QUESTIONS = (
    Question(
        "Entropy by SGD steps per rollout, nats per token", "entropy/signal", (ONE, FOUR),
        (
            Claim("collapse", "4 SGD steps lower the entropy sooner (4.4): mean over all steps",
                  "entropy_mean", FOUR, "below", ONE),
            Claim("collapse_reward", f"and buy less with it: reward when the entropy first is below {EQUAL_ENTROPY}",
                  "reward_at_equal_entropy", FOUR, "below", ONE),
            Claim("collapse_held_out", "and end with a lower held-out accuracy", "held_out", FOUR, "below", ONE),
        ), "sgd-steps.svg",
    ),
    Question(
        "Entropy under adaptive control; dotted: target", "entropy/signal", (ONE, ADAPTIVE),
        (
            Claim("control", "control keeps the entropy up (3.2.5): late", "entropy_late", ADAPTIVE, "above", ONE),
            Claim("control_held_out", "and the held-out accuracy ends higher", "held_out", ADAPTIVE, "above", ONE),
        ), "control.svg", level=TARGET,
    ),
    Question(
        "Entropy with and without rejection; dotted: target", "entropy/signal", (ADAPTIVE, ALL_GROUPS),
        (
            Claim("rejection", "without rejection the entropy loss weighs more (3.1): late entropy",
                  "entropy_late", ALL_GROUPS, "above", ADAPTIVE),
            Claim("rejection_unrest", "and training is less steady: deviation of the late entropies",
                  "entropy_unrest", ALL_GROUPS, "above", ADAPTIVE),
        ), "rejection.svg", level=TARGET,
    ),
    Question(
        "Share of truncated responses with and without mask", "truncated", (ONE, MASKED),
        (
            Claim("mask", "with the mask more responses are truncated (3.2.3): late share",
                  "truncated_late", MASKED, "above", ONE),
            Claim("mask_reward", "and the training reward is lower: late", "reward_late", MASKED, "below", ONE),
        ), "mask.svg", percent=True,
    ),
)  # fmt: skip

Results = dict[str, dict[int, Measures]]  # variant's name -> seed -> measures


@dataclass(frozen=True)
class Verdict:
    """value: mean difference over the spread, positive in the claimed direction; NaN: cannot be said."""

    name: str
    text: str
    outcome: Literal["confirmed", "refuted", "undecided"]
    value: float


def measures(rows: Sequence[dict[str, Any]]) -> Measures:
    """From the lines of a complete run's metrics.jsonl."""
    steps = [row for row in rows if "entropy/signal" in row]
    late = steps[-max(1, len(steps) // 3) :]
    entropies, late_entropies = ([row["entropy/signal"] for row in part] for part in (steps, late))
    below = [row["reward/mean"] for row in steps if row["entropy/signal"] < EQUAL_ENTROPY]
    held_out = [row[name] for row in rows for name in row if name.startswith("eval/avg@")]
    return Measures(
        entropy_start=entropies[0],
        entropy_min=min(entropies),
        entropy_mean=statistics.fmean(entropies),
        entropy_late=statistics.fmean(late_entropies),
        entropy_unrest=statistics.pstdev(late_entropies),
        reward_late=statistics.fmean(row["reward/mean"] for row in late),
        reward_at_equal_entropy=below[0] if below else math.nan,
        truncated_late=statistics.fmean(row["truncated"] for row in late),
        held_out_before=held_out[0],
        held_out=held_out[-1],
        alpha_late=statistics.fmean(row["entropy/alpha"] for row in late),
        alpha_max=max(row["entropy/alpha"] for row in steps),
        idle_steps=sum(not row["sgd_steps"] for row in steps),
        minutes=sum(row.get("seconds/step", 0.0) for row in steps) / 60,
    )


def judge(claim: Claim, results: Results) -> Verdict:
    """By the rule at the top of this file."""
    of, than = results.get(claim.of.name, {}), results.get(claim.than.name, {})
    sign = -1 if claim.relation == "below" else 1
    gains = [
        sign * (getattr(of[seed], claim.measure) - getattr(than[seed], claim.measure)) for seed in of.keys() & than
    ]
    if len(gains) < 2 or any(math.isnan(gain) for gain in gains):
        return Verdict(claim.name, f"{claim.text}: takes two seeds that both show it", "undecided", math.nan)
    values = [[getattr(run, claim.measure) for run in runs.values()] for runs in results.values()]
    spread = max(max(v) - min(v) for v in values if not any(map(math.isnan, v)))
    mean = statistics.fmean(gains)
    outcome = "undecided"
    if abs(mean) > spread and (min(gains) > 0 or max(gains) < 0):
        outcome = "confirmed" if mean > 0 else "refuted"
    sides = [statistics.fmean(getattr(run, claim.measure) for run in runs.values()) for runs in (of, than)]
    told = f"{claim.of.name} {sides[0]:.3f}, {claim.than.name} {sides[1]:.3f}; spread {spread:.3f}"
    return Verdict(claim.name, f"{claim.text}: {told}", outcome, mean / spread if spread else math.copysign(9, mean))


def judge_target(results: Results) -> Verdict:
    """Whether the late entropy of every seed is near the target."""
    found = [run.entropy_late for run in results[ADAPTIVE.name].values()]
    far = max(abs(value - TARGET) for value in found) / TARGET
    told = ", ".join(f"{value:.3f}" for value in found)
    text = f"control holds the target {TARGET} within {NEAR:.0%}: late entropies {told}"
    return Verdict("target", text, "confirmed" if far <= NEAR else "refuted", NEAR / max(far, 1e-9))


def table(results: Results) -> str:
    """Markdown, a line per run."""
    heads = "variant, seed, entropy at start, lowest, late, reward late, held out before, after, alpha late, largest, "
    heads += "truncated late, steps without update, min"
    lines = ["| " + heads.replace(", ", " | ") + " |", "|---" * 13 + "|"]
    for name, runs in results.items():
        for seed, run in runs.items():
            cells = [f"{v:.3f}" for v in (run.entropy_start, run.entropy_min, run.entropy_late, run.reward_late)]
            cells += [f"{v:.1%}" for v in (run.held_out_before, run.held_out)]
            cells += [f"{run.alpha_late:.3f}", f"{run.alpha_max:.3f}", f"{run.truncated_late:.1%}"]
            lines.append(" | ".join([f"| {name} | {seed}", *cells, str(run.idle_steps), f"{run.minutes:.1f} |"]))
    return "\n".join(lines)


class Study:
    """The runs of one folder."""

    def __init__(self, out: Path, model: Path, before: Sequence[str], *, quick: bool):
        self.out, self._before, self.quick = out, before, quick
        self.variants = (ONE, FOUR) if quick else VARIANTS
        self.seeds = SEEDS[:1] if quick else SEEDS
        out.mkdir(parents=True, exist_ok=True)
        files = out / "train.jsonl", out / "held_out.jsonl"
        write_addition_problems(*files, seed=0)
        inputs = (f"model.path={model}", f"data.train=[{files[0]}]", f"evaluation.files=[{files[1]}]")
        self._shared = (*inputs, f"model.dtype={model_dtype()}", *(QUICK if quick else SHARED))

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.out / f"{variant.name.replace(',', '').replace(' ', '-')}-seed{seed}"

    def words(self, variant: Variant, seed: int) -> list[str]:
        own = (f"name={variant.name}", f"run_dir={self.folder(variant, seed)}", f"seed={seed}", f"data.seed={seed}")
        return [*self._shared, *own, *variant.overrides]

    def run(self) -> None:
        """Every seed of every variant, the first seed of all first. Raises RunFailure, UserError."""
        plan = [(variant, seed) for seed in self.seeds for variant in self.variants]
        for number, (variant, seed) in enumerate(plan, 1):
            path, words = self.folder(variant, seed), self.words(variant, seed)
            label = f"[{number}/{len(plan)}] {variant.name}, seed {seed}"
            if complete(path, load(RECIPE, words)):
                print(f"{label}: done before", flush=True)
                continue
            shutil.rmtree(path, ignore_errors=True)
            self._train(label, path, words)
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
        """The question's metric over the steps, a colour per variant and a dash per seed, into its file."""
        lines = []
        for colour, variant in enumerate(question.variants):
            for dash, seed in enumerate(self.seeds):
                rows = [row for row in self.rows(variant, seed) if question.metric in row]
                points = [(row["step"], row[question.metric]) for row in rows]
                lines.append(Line(f"{variant.name}, seed {seed}", points, colour, dash))
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
    parser = argparse.ArgumentParser(description="MAGIC's choices at the quickstart's size, each with a verdict.")
    parser.add_argument("--quick", action="store_true", help="two variants, one seed, three steps: that it works")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default runs/entropy-study, with -quick appended")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write measures and verdicts here")
    parser.add_argument("--before", metavar="WORDS", default="", help="put before each run's command: nice -n 19")
    options = parser.parse_args(arguments)
    out = options.out or Path("runs") / ("entropy-study-quick" if options.quick else "entropy-study")
    try:
        model = fetch_smollm2(ROOT / ".cache" / "models")
        study = Study(out.resolve(), model, shlex.split(options.before), quick=options.quick)
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
