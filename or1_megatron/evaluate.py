"""Evaluation on held-out problems: avg@n and the unbiased pass@k (8.1)."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from or1_megatron.architecture import read_architecture
from or1_megatron.cluster import Cluster
from or1_megatron.collect import score_groups
from or1_megatron.config import Config
from or1_megatron.data.prompts import load_prompts, load_tokenizer
from or1_megatron.display import Display
from or1_megatron.errors import UserError
from or1_megatron.profiling.spans import Spans
from or1_megatron.reward.preflight import check_rewards
from or1_megatron.reward.service import RewardService
from or1_megatron.rollout.engine import SamplingSpec
from or1_megatron.types import Group, Prompt


def average_at_n(groups: list[Group]) -> float:
    """Mean over problems of the mean correctness of their n responses."""
    return sum(sum(g.rewards) / len(g.rewards) for g in groups) / len(groups)


def pass_at_k(groups: list[Group], k: int) -> float:
    """Mean over problems of 1 - C(n-c, k) / C(n, k): the chance that one of k responses is right."""
    total = 0.0
    for group in groups:
        n, correct = len(group.rewards), int(sum(group.rewards))
        assert k <= n, (k, n)
        total += 1.0 - math.comb(n - correct, k) / math.comb(n, k)
    return total / len(groups)


class Evaluator:
    """Runs the held-out problems through the engines and remembers the first and the last accuracy."""

    def __init__(self, config: Config, cluster: Cluster, rewards: RewardService, prompts: list[Prompt], spans: Spans):
        self._config, self._cluster, self._rewards, self._spans = config, cluster, rewards, spans
        self._prompts = prompts
        self.history: list[tuple[int, dict[str, float]]] = []

    def run_if_due(self, step: int, display: Display, *, last: bool = False) -> dict[str, float]:
        """Metrics of the policy after `step` steps, when it is due: before the first step, every interval, last."""
        interval = self._config.evaluation.interval
        due = step == 0 or last or (interval and step % interval == 0)
        if not self._prompts or not due:
            return {}
        display.phase("evaluating")
        with self._spans.span("evaluation"):
            result = self.run()
        self.history.append((step, result))
        n = self._config.evaluation.num_samples
        display.message(f"held-out after step {step}: avg@{n} {100 * result[f'eval/avg@{n}']:.1f}%")
        return result

    def run(self) -> dict[str, float]:
        evaluation = self._config.evaluation
        sampling = SamplingSpec(
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            max_response_length=self._config.rollout.max_response_length,
            stop=tuple(self._config.rollout.stop),
        )
        n = evaluation.num_samples
        groups = score_groups(self._cluster, self._rewards, self._prompts, n, sampling, Spans())
        samples = [sample for group in groups for sample in group.samples]
        return {
            f"eval/avg@{n}": average_at_n(groups),
            f"eval/pass@{n}": pass_at_k(groups, n),
            "eval/length": sum(len(s.tokens) for s in samples) / len(samples),
            "eval/truncated": sum(s.truncated for s in samples) / len(samples),
        }

    def summary(self) -> dict[str, float]:
        return self.history[-1][1] if self.history else {}


def evaluation_line(name: str, evaluator: Evaluator, steps: int, minutes: float, folder: Path) -> str:
    """The run's last line."""
    if not evaluator.history:
        return f"{name}: {steps} steps, {minutes:.1f} min; run folder {folder}"
    accuracy = [100 * result[next(iter(result))] for _, result in (evaluator.history[0], evaluator.history[-1])]
    return (
        f"{name}: held-out accuracy {accuracy[0]:.1f}% -> {accuracy[1]:.1f}% in {steps} steps, "
        f"{minutes:.1f} min; run folder {folder}"
    )


def evaluate(config: Config) -> int:
    """`or1 eval`: the model at model.path on evaluation.files; prints one line per metric."""
    config = config.widest()
    if not config.evaluation.files:
        raise UserError("evaluation.files is empty; name the problem files to evaluate on")
    architecture = read_architecture(config.model.path)
    prompts = load_prompts(
        config.evaluation.files,
        load_tokenizer(config.model.path, architecture),
        context_length=config.rollout.context_length,
        instruction_suffix=config.data.instruction_suffix,
    )
    isolation = check_rewards(config.reward, prompts)
    with (
        tempfile.TemporaryDirectory(prefix="or1-eval-") as scratch,
        Display(1, config.name) as display,
        RewardService(config.reward, Path(scratch)) as rewards,
    ):
        if isolation:
            display.message(isolation)
        display.phase("starting engines")
        with Cluster(config, Path(scratch), with_actor=False) as cluster:
            display.phase(f"evaluating {len(prompts)} problems x {config.evaluation.num_samples}")
            result = Evaluator(config, cluster, rewards, prompts, Spans()).run()
        for name, value in result.items():
            display.message(f"{name.removeprefix('eval/')}: {value:.4f}")
    return 0
