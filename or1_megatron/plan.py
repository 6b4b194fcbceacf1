"""`or1 plan`: seconds per step, hours and memory of a recipe on so many GPUs, before anything is started."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from or1_megatron.architecture import Architecture, read_architecture
from or1_megatron.config import Config
from or1_megatron.dryrun import memory_per_rank
from or1_megatron.errors import UserError
from or1_megatron.profiling import paper
from or1_megatron.profiling.calibration import Calibration, calibrate
from or1_megatron.profiling.hardware import KNOWN, Hardware
from or1_megatron.profiling.layouts import best, engine_degrees, helps
from or1_megatron.profiling.lengths import Lengths, LogNormal, Measured
from or1_megatron.profiling.planner import DRAWS, Layout, StepTime, Work, costs_of, predict
from or1_megatron.rl.filter import informative_share
from or1_megatron.runfiles import read_columns, read_trace
from or1_megatron.runfolder import RunFolder

_MOST_GPUS = 65_536
MOST_GROUPS = 4000  # of a run folder's, the newest: enough for a distribution


@dataclass(frozen=True)
class Assumptions:
    """What a recipe does not say. `outcomes`: (responses, correct ones) of the groups that kept_share was seen on."""

    lengths: Lengths
    kept_share: float
    memory_share: float = 0.8
    outcomes: tuple[tuple[int, int], ...] = ()

    def kept(self, group_size: int) -> float:
        """Share of the groups: that which was seen, and for another group size by `informative_share`."""
        if not self.outcomes:
            return self.kept_share
        sizes = collections.Counter(responses for responses, _ in self.outcomes)
        own = sum(groups * informative_share(self.outcomes, size) for size, groups in sizes.items()) / sizes.total()
        return (
            min(1.0, self.kept_share * informative_share(self.outcomes, group_size) / own) if own else self.kept_share
        )

    def lines(self) -> list[str]:
        of = f" of {'/'.join(map(str, sorted({size for size, _ in self.outcomes})))}" if self.outcomes else ""
        return [f"assumed: responses {self.lengths.describe()}; {self.kept_share:.0%} of the groups{of} kept"]


def plan_paper() -> list[str]:
    """`or1 plan --paper`: the paper's time tables against the planner."""
    return paper.comparison_lines()


def plan_gpus(config: Config, gpus: list[int], hardware_name: str, assumptions: Assumptions) -> list[str]:
    """Lines for each number of GPUs: seconds per step of every stage, hours, memory, layout; then what helps most.

    Raises UserError for an unknown GPU, a model that is not there, or when no layout fits.
    """
    hardware = _hardware(hardware_name)
    architecture, origin = _architecture(config)
    stages = _stages(config, assumptions)
    context = max(work.context_length for work, _ in stages)
    found: list[tuple[int, Layout, dict[str, float], list[StepTime]]] = []
    lines = [f"{config.name}: {sum(steps for _, steps in stages)} steps in {len(stages)} stages, {origin}", ""]
    head = ("GPUs", "stage", "steps", "rollout", "update", "sync", "rest", "s/step", "hours", "tail")
    lines.append(f"{head[0]:>5} {head[1]:>5} {head[2]:>6} " + " ".join(f"{name:>8}" for name in head[3:]))
    for number in gpus:
        layout, parts = best(config, architecture, context, number, hardware, memory_per_rank, assumptions.memory_share)
        times = [predict(work, costs_of(architecture, layout, hardware)) for work, _ in stages]
        found.append((number, layout, parts, times))
        for index, ((_, steps), time) in enumerate(zip(stages, times, strict=True), 1):
            lines.append(f"{number:>5} {index:>5} {steps:>6} {_cells(time, steps)}")
    lines += ["", *(_layout_line(*row, stages, hardware) for row in found)]
    _, layout, _, times = found[-1]
    longest = max(range(len(stages)), key=lambda i: times[i].total * stages[i][1])
    work = stages[longest][0]
    engines = engine_degrees(architecture, hardware, assumptions.memory_share, work.context_length)
    lines += ["", f"what would help most, each alone, stage {longest + 1} on {layout.num_devices} GPUs:"]
    changes = helps(architecture, work, layout, hardware, engines)[:5]
    for what, saved in changes:
        lines.append(f"  {saved:7.0f} s ({saved / times[longest].total:4.0%}) of a step: {what}")
    lines += ["  nothing of what was tried saves half a percent of a step"] * (not changes)
    achieved = f"achieved constants of {hardware.name} fitted to the paper's system (or1 plan --paper)"
    return [*lines, "", achieved, *assumptions.lines()]


def plan_calibrated(config: Config, run: RunFolder, assumptions: Assumptions) -> list[str]:
    """Lines of the recipe on the machine, and with the ranks and engines, that the run shows."""
    calibration = calibration_of(run)
    head = ("rollout", "update", "sync", "rest", "s/step", "hours", "tail")
    lines = [calibration.describe(), *assumptions.lines(), ""]
    lines.append(f"{'stage':>5} {'steps':>6} " + " ".join(f"{name:>8}" for name in head))
    for index, (time, steps) in enumerate(calibrated_steps(config, calibration, assumptions), 1):
        lines.append(f"{index:>5} {steps:>6} {_cells(time, steps)}")
    return lines


def calibrated_steps(
    config: Config, calibration: Calibration, assumptions: Assumptions, draws: int = DRAWS
) -> list[tuple[StepTime, int]]:
    """(a step's time, steps) of each stage."""
    architecture = read_architecture(config.model.path)
    shares = config.can_share_prompts and calibration.shares_prompts
    shown = {"prompt_tokens": calibration.prompt_tokens, "shares_prompts": shares}
    costs = calibration.costs(architecture, config.parallel.num_ranks, config.rollout.num_engines, replicas=config.dp)
    return [
        (predict(dataclasses.replace(work, **shown), costs, draws), steps)
        for work, steps in _stages(config, assumptions)
    ]


def calibration_of(run: RunFolder, stages: Collection[int] | None = None) -> Calibration:
    """From the steps of these stages (from 1 on; None: all). Raises UserError when the run has recorded too little."""
    file = run.path / "trace.json"
    if not file.is_file():
        raise UserError(
            f"{run.path} holds no trace.json; it is written after a step with profiling.trace_steps above 0"
        )
    trace, config = read_trace(file), run.config
    if config.rollout.overlap:
        raise UserError(
            f"{run.path} has rollout.overlap=true, under which no rollout is timed by itself; calibrate on a run with "
            "rollout.overlap=false"
        )
    if "last_step" not in trace.get("metadata", {}):
        raise UserError(f"{file} is not a trace that a run of this version has written; calibrate on another run")
    return calibrate(
        trace,
        run.metrics.read(),
        group_sizes=[stage.rollout.group_size for stage in config.all_stages()],
        num_ranks=config.parallel.num_ranks,
        num_engines=config.rollout.num_engines,
        max_batched_tokens=config.rollout.max_batched_tokens,
        num_reuse=config.loss.num_reuse,
        stages=stages,
    )


def measured(run: RunFolder, stages: Collection[int] | None = None) -> Assumptions:
    """Lengths and the kept share of a run, in these stages. Raises UserError: no rollouts, or a damaged file."""
    steps = [row for row in run.metrics.read() if "groups/generated" in row]
    steps = [row for row in steps if stages is None or row["stage"] in stages]
    files = [run.rollouts / f"step-{row['step']:06d}.parquet" for row in steps]
    groups: list[tuple[int, ...]] = []
    for file in (file for file in reversed(files) if file.is_file()):
        rows: dict[str, list[int]] = {}
        columns = read_columns(file, ["uid", "length"])
        for uid, length in zip(columns["uid"], columns["length"], strict=True):
            rows.setdefault(uid, []).append(length)
        groups += [tuple(lengths) for lengths in rows.values()]
        if len(groups) >= MOST_GROUPS:
            break
    if not groups:
        raise UserError(f"{run.rollouts} holds no rollouts; lengths are measured from a run with at least one step")
    outcomes = _outcomes(run, [row["step"] for row in steps])
    if run.config.loss.rejection or not outcomes:
        kept = sum(row["groups/kept"] for row in steps) / sum(row["groups/generated"] for row in steps)
    else:
        kept = sum(0 < right < responses for responses, right in outcomes) / len(outcomes)
    return Assumptions(Measured(tuple(groups), run.path.name), kept, outcomes=outcomes)


def _outcomes(run: RunFolder, steps: list[int]) -> tuple[tuple[int, int], ...]:
    """(responses, correct ones) of the newest groups of these steps, as far as the history is there."""
    found: list[tuple[int, int]] = []
    for step in reversed(steps):
        if len(found) < MOST_GROUPS and (run.history / f"step-{step:06d}.parquet").is_file():
            found += [(responses, correct) for _, responses, correct in run.read_history(step, step)]
    return tuple(found)


def assumptions(lengths: str | None, kept: float | None, run: RunFolder | None) -> Assumptions:
    """Those of --lengths and --kept; else a run's, else those of the comparison with the paper. Raises UserError."""
    found = measured(run) if run else Assumptions(paper.LENGTHS, paper.KEPT_SHARE)
    if lengths and Path(lengths).is_dir():
        found = dataclasses.replace(found, lengths=measured(RunFolder.open(lengths)).lengths)
    elif lengths:
        found = dataclasses.replace(found, lengths=log_normal(lengths))
    if kept is not None and not 0 < kept <= 1:
        raise UserError(f"--kept {kept} must be above 0 and at most 1")
    return found if kept is None else dataclasses.replace(found, kept_share=kept, outcomes=())


def log_normal(text: str) -> Lengths:
    """MEDIAN,SIGMA[,SHARE] of --lengths. Raises UserError."""
    try:
        median, sigma, *share = (float(word) for word in text.split(","))
        law = LogNormal(median, sigma, *(share or [0.5]))
    except (ValueError, TypeError):
        raise UserError(f"--lengths {text}: give a run folder, or MEDIAN,SIGMA[,SHARE] such as 6860,0.7,0.5") from None
    if not (law.median >= 1 and law.sigma >= 0 and 0 <= law.prompt_share <= 1):
        raise UserError(f"--lengths {text}: the median is at least 1, sigma 0 or more, the share between 0 and 1")
    return law


def _hardware(name: str) -> Hardware:
    if name not in KNOWN:
        raise UserError(f"--hardware {name} is not known; use one of {', '.join(KNOWN)}, or --calibrate RUN")
    return KNOWN[name]


def _architecture(config: Config) -> tuple[Architecture, str]:
    path = Path(config.model.path)
    if (path / "config.json").is_file():
        return read_architecture(path), str(path)
    if path.name in paper.MODELS:
        return paper.MODELS[path.name], f"{path.name}, whose sizes are known here"
    lack = "holds no config.json" if path.is_dir() else "is a file" if path.exists() else "is not here"
    raise UserError(f"model.path={path} {lack}, and {path.name} is none of {', '.join(paper.MODELS)}; fetch it")


def _stages(config: Config, assumptions: Assumptions) -> list[tuple[Work, int]]:
    """(work of a step, steps) of every stage that the recipe's steps reach."""
    ends = [min(stage.until, config.steps) for stage in config.stages] or [config.steps]
    found, first = [], 0
    for stage, end in zip(config.all_stages(), ends, strict=True):
        rollout = stage.rollout
        work = Work(
            rollout_batch_size=rollout.rollout_batch_size,
            group_size=rollout.group_size,
            context_length=rollout.context_length,
            num_sgd_steps=stage.num_sgd_steps,
            lengths=assumptions.lengths,
            kept_share=assumptions.kept(rollout.group_size) if stage.loss.rejection else 1.0,
            recomputes_old_log_probs=stage.loss.old_log_probs == "recompute",
            overlaps_scoring=stage.reward.during_rollout,
            overlaps_packing=rollout.pack_while_decoding,
            prompt_tokens=min(128, rollout.context_length // 2),
            max_response_length=rollout.max_response_length,
            policy=rollout.schedule,
            max_generated_factor=rollout.max_generated_factor,
            # With TransformerEngine, which auto takes on a GPU, they are not shared.
            shares_prompts=stage.parallel.share_prompts and stage.model.transformer_impl == "torch",
            num_reuse=stage.loss.num_reuse,
            token_budget=stage.token_budget,
        )
        if end > first:
            found.append((work, end - first))
        first = max(first, end)
    return found


def _cells(time: StepTime, steps: int) -> str:
    rest = time.others - time.sync
    seconds = (time.rollout, time.update, time.sync, rest, time.total, time.total * steps / 3600)
    return " ".join(f"{value:8.1f}" for value in seconds) + f" {time.tail / max(1e-9, time.rollout):8.0%}"


def _layout_line(
    number: int, layout: Layout, parts: dict[str, float], times: list[StepTime], stages: list[tuple[Work, int]],
    hardware: Hardware,
) -> str:  # fmt: skip
    hours = sum(time.total * steps for time, (_, steps) in zip(times, stages, strict=True)) / 3600
    listed = ", ".join(f"{name} {size / 2**30:.0f}" for name, size in parts.items())
    return (
        f"{number} GPUs: {hours:.0f} hours; actor tp {layout.tp} pp {layout.pp} cp {layout.cp} dp {layout.dp}, "
        f"{sum(parts.values()) / 2**30:.0f} of {hardware.memory / 2**30:.0f} GiB ({listed}); "
        f"rollout.num_engines={number // layout.engine_tp} of engine_tp={layout.engine_tp}"
    )


def parse_gpus(text: str) -> list[int]:
    """Raises UserError."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or max(found) > _MOST_GPUS:
        raise UserError(f"--gpus {text}: give numbers of GPUs up to {_MOST_GPUS}, such as 32,64,128")
    return found
