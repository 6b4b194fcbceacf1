"""Rollout without waiting, switch by switch: how prompts are dealt to engines, when responses are checked, when they
are packed.

    python benchmarks/rollout.py [--quick] [--json FILE]

Measured: the quickstart's model on two engines counts up to a number, so that lengths differ and depend on the prompt;
every prompt has been seen once before. All cases of a round get the same prompts and draw with the same seeds.
Simulated: the paper's models and stages on its GPUs, all groups kept, with the constants of `or1 plan --paper`. The
driver's work is timed on a quarter of the paper's step: advantages, packs for 32 replicas, and those put where the
ranks take them from, with what is per token made into arrays by the engines as groups finish, or by the driver at last.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's own programs: launch/ is not installed

from benchmarks.harness import Benchmark, main, model_dtype  # noqa: E402
from launch.fetch_model import fetch_smollm2  # noqa: E402
from or1_megatron.architecture import read_architecture  # noqa: E402
from or1_megatron.cluster import Cluster  # noqa: E402
from or1_megatron.collect import Rollout, sampled_entropy, score_groups, training_sampling  # noqa: E402
from or1_megatron.config import Config  # noqa: E402
from or1_megatron.data.prompts import load_prompts, load_tokenizer  # noqa: E402
from or1_megatron.profiling.hardware import H800  # noqa: E402
from or1_megatron.profiling.paper import LENGTHS, MODELS  # noqa: E402
from or1_megatron.profiling.planner import Layout, StepTime, Work, costs_of, predict  # noqa: E402
from or1_megatron.profiling.spans import Spans  # noqa: E402
from or1_megatron.recipe import load  # noqa: E402
from or1_megatron.reward.service import RewardService  # noqa: E402
from or1_megatron.rollout.schedule import LengthHistory  # noqa: E402
from or1_megatron.types import Group, Prompt, Sample  # noqa: E402
from or1_megatron.update import Updater  # noqa: E402

ROOT = Path(__file__).parents[1]
ENGINES, GROUP, LONGEST, REPLICAS = 2, 4, 40, 32
SCHEDULES = ("round_robin", "pending_tokens", "longest_first")
STAGES = (  # model, engine_tp, D_R, gs, T
    ("7B", 1, 256, 16, 16384),
    ("7B", 1, 160, 32, 32768),
    ("32B", 4, 256, 16, 16384),
    ("32B", 4, 160, 32, 24576),
)


def write_counting_problems(file: Path) -> None:
    """Counting up to each number from 2 to LONGEST, one problem a line."""
    rows = []
    for last in range(2, LONGEST + 1):
        shown = "".join(f"Count to {n}: {' '.join(map(str, range(1, n + 1)))}\n" for n in (3, 12))
        truth = {"ground_truth": str(last)}
        row = {"data_source": "counting", "prompt": f"{shown}Count to {last}:", "reward_model": truth}
        rows.append(json.dumps(row | {"extra_info": {"index": last}}))
    file.write_text("\n".join(rows) + "\n")


def config_of(model: Path, problems: Path, batch: int) -> Config:
    words = [
        f"model.path={model}", f"data.train=[{problems}]", f"rollout.rollout_batch_size={batch}",
        f"rollout.group_size={GROUP}", f"rollout.num_engines={ENGINES}", "rollout.context_length=224",
        "rollout.max_response_length=0", "rollout.cpu_threads_per_engine=1", "parallel.token_budget=224",
        f"model.dtype={model_dtype()}",
    ]  # fmt: skip
    return load(ROOT / "launch" / "recipes" / "quickstart.yaml", words)


@dataclass
class Switched:
    """One setting of the switches, and what its rollouts took."""

    schedule: str
    during: bool = True  # checks
    packed: bool = True  # while decoding
    rounds: int = 0
    told: list[dict[str, float]] = field(default_factory=list)


class Rollouts:
    """Engines, verifiers and the prompts' history."""

    def __init__(self, bench: Benchmark, batch: int):
        scratch = Path(bench.stack.enter_context(tempfile.TemporaryDirectory(prefix="or1-bench-")))
        model = fetch_smollm2(ROOT / ".cache" / "models").absolute()
        write_counting_problems(scratch / "train.jsonl")
        self.config = config_of(model, scratch / "train.jsonl", batch)
        tokenizer = load_tokenizer(str(model), read_architecture(model))
        files, context = self.config.data.train, self.config.rollout.context_length
        self.prompts = load_prompts(files, tokenizer, context_length=context)
        self.rewards = bench.stack.enter_context(RewardService(self.config.reward, scratch))
        self.cluster = bench.stack.enter_context(Cluster(self.config, scratch, with_actor=False))
        self.history = LengthHistory()
        groups, _ = self.roll_out(Switched("round_robin"), self.prompts, seed=1_000_000)
        self.history.record(groups)

    def roll_out(self, switched: Switched, prompts: list[Prompt], seed: int) -> tuple[list[Group], dict[str, float]]:
        """Scored groups, seconds by span, and tokens of the fuller engine over the mean."""
        reward = dataclasses.replace(self.config.reward, during_rollout=switched.during)
        self.cluster.config = dataclasses.replace(self.config, reward=reward)
        dealt = self.history.deal(prompts, GROUP, ENGINES, switched.schedule)
        sampling, spans = training_sampling(self.config), Spans()
        sampling = dataclasses.replace(sampling, seed=seed, pack=switched.packed)
        self.rewards.spans.clear()
        with spans.span("all"):
            groups = score_groups(self.cluster, self.rewards, prompts, GROUP, sampling, spans, dealt)
        seconds = {name.removeprefix("seconds/"): value for name, value in spans.take().items()}
        seconds.setdefault("pack", 0.0)
        seconds["checks"] = sum(span.end_ns - span.start_ns for span in self.rewards.spans) * 1e-9
        tokens = {group.prompt.uid: sum(len(sample.tokens) for sample in group.samples) for group in groups}
        loads = [sum(tokens[prompt.uid] for prompt in share) * dealt[1] / GROUP for share in dealt[0]]
        return groups, seconds | {"imbalance": max(loads) / statistics.fmean(loads), "tokens": sum(loads)}

    def round(self, switched: Switched) -> float:
        """Seconds from the first prompt to the last verdict; round r has the same prompts and seeds in every case."""
        drawn = random.Random(switched.rounds).sample(self.prompts, self.config.rollout.rollout_batch_size)
        _, told = self.roll_out(switched, drawn, seed=switched.rounds)
        switched.rounds += 1
        switched.told.append(told)
        return told["all"]


class Driver:
    """Between the last verdict and the update, with as many tokens as in a part of the paper's step."""

    def __init__(self, rollouts: Rollouts, num_groups: int):
        _, _, _, group, context = STAGES[0]
        parallel = dataclasses.replace(rollouts.config.parallel, num_ranks=REPLICAS, token_budget=2 * context)
        config = dataclasses.replace(rollouts.config, parallel=parallel)
        architecture = read_architecture(Path(config.model.path))
        # What it asks of a cluster before anything is trained; there are no ranks here, and theirs share prompts.
        ranks: Any = SimpleNamespace(shares_prompts=lambda: True)
        self._updater = Updater(config, architecture, ranks, Spans(enabled=False))
        draw = random.Random(0)
        self._prompts = [
            Prompt(f"p{i}", "", tuple(draw.randrange(architecture.vocab_size) for _ in range(300)), ("1",))
            for i in range(num_groups)
        ]
        lengths = LENGTHS.draw(num_groups, group, context - 300, draw)
        self._given = [  # as vLLM has them
            [([draw.randrange(1000, architecture.vocab_size) for _ in range(n)], [-draw.random()] * n) for n in row]
            for row in lengths
        ]
        self._groups = self._make()
        self.tokens = sum(map(sum, lengths))

    def _make(self) -> list[Group]:
        def sample(prompt: Prompt, i: int, tokens: Any, log_probs: Any) -> Sample:
            return Sample(prompt, i, tokens, log_probs, "", "stop", 0, "", float(i % 2)).pack()

        return [
            Group(prompt, [sample(prompt, i, *row) for i, row in enumerate(rows)])
            for prompt, rows in zip(self._prompts, self._given, strict=True)
        ]

    def during(self) -> None:
        """What is left when the engines have made arrays of each group that finished."""
        self._hand_over(self._groups)

    def after(self) -> None:
        self._hand_over(self._make())

    def _hand_over(self, groups: list[Group]) -> None:
        sampled_entropy(Rollout(groups))
        _, batches = self._updater.packed(self._updater.sequences(groups))
        for mine in batches:
            ray.put(mine)


def told(switched: Switched) -> str:
    """Medians of all rounds but the one that warms up."""
    names = switched.told[0]
    middle = {name: statistics.median(row[name] for row in switched.told[1:]) for name in names}
    return (
        f"rollout {middle['rollout']:.2f} s, waiting for verdicts {1e3 * middle['reward_wait']:.1f} ms (checks "
        f"{1e3 * middle['checks']:.0f} ms), packing {1e3 * middle['pack']:.1f} ms, fuller engine "
        f"{middle['imbalance']:.2f} of the mean, {middle['tokens']:.0f} tokens"
    )


def measure(bench: Benchmark, quick: bool) -> None:
    rollouts = Rollouts(bench, batch=8 if quick else 12)
    switches = {
        **{schedule: Switched(schedule) for schedule in SCHEDULES},
        "longest_first, checked after": Switched("longest_first", during=False),
        "longest_first, packed after": Switched("longest_first", packed=False),
    }
    cases = []
    for label, switched in switches.items():
        cases.append(bench.case(label, lambda switched=switched: rollouts.round(switched)))
        cases[-1].remark = lambda switched=switched: told(switched)
    turn, pending, longest, checked_after, packed_after = cases
    driver = Driver(rollouts, num_groups=8 if quick else 64)
    packed = bench.case("driver, arrays made during", driver.during, amount=driver.tokens, unit="tokens")
    late = bench.case("driver, arrays made after", driver.after, amount=driver.tokens, unit="tokens")
    bench.mark("pending_tokens_over_round_robin", lambda: turn.median / pending.median, 1.0)
    bench.mark("longest_first_over_round_robin", lambda: turn.median / longest.median, 1.0)
    bench.mark("checks_during_over_after", lambda: checked_after.median / longest.median, 1.0)
    bench.mark("packed_during_over_after", lambda: packed_after.median / longest.median, 1.0)
    bench.mark("arrays_during_over_after", lambda: late.best / packed.best, 1.0)


def simulated(stage: tuple[str, int, int, int, int], gpus: int, schedule: str, *, overlaps: bool = True) -> StepTime:
    size, engine_tp, batch, group, context = stage
    work = Work(
        rollout_batch_size=batch, group_size=group, context_length=context, num_sgd_steps=1, lengths=LENGTHS,
        kept_share=1.0, recomputes_old_log_probs=False, overlaps_scoring=overlaps, overlaps_packing=overlaps,
        policy=schedule,
    )  # fmt: skip
    model = MODELS[f"DeepSeek-R1-Distill-Qwen-{size}"]
    return predict(work, costs_of(model, Layout(num_devices=gpus, engine_tp=engine_tp), H800))


def simulate(bench: Benchmark, quick: bool) -> None:
    bench.note("\nsimulated rollout at the paper's scale, s; verdicts and moving data, then packing, after / during, s")
    last = "".join(f" {name:>8}" for name in ("after", "during") * 2)
    bench.note(f"{'':34} {'GPUs':>5} " + " ".join(f"{name:>14}" for name in SCHEDULES) + last)
    gains = []
    for stage in STAGES[:1] if quick else STAGES:
        size, engine_tp, batch, group, context = stage
        label = f"{size}, engines of {engine_tp}, {batch} x {group} at {context // 1024}K"
        for gpus in (64, 128, 256):
            times = [simulated(stage, gpus, schedule) for schedule in SCHEDULES]
            after = simulated(stage, gpus, SCHEDULES[-1], overlaps=False)
            seconds = " ".join(f"{time.rollout:14.0f}" for time in times)
            rest = [after.scoring, times[-1].scoring, after.packing, times[-1].packing]
            bench.note(f"{label:34} {gpus:5} {seconds}" + "".join(f" {value:8.1f}" for value in rest))
            gains.append(times[0].rollout / times[-1].rollout)
    bench.mark("simulated_longest_first_over_round_robin", lambda: min(gains), 1.0)


def build(bench: Benchmark, quick: bool) -> None:
    measure(bench, quick)
    simulate(bench, quick)


if __name__ == "__main__":
    main("rollout", "a rollout of the quickstart's model on two engines, the switches one by one", build)
