"""Evaluation in training: the held-out problems at every temperature, every k steps (8.1)."""

from __future__ import annotations

from pathlib import Path

from or1_megatron.accuracy import Accuracy, Outcome, accuracy
from or1_megatron.cluster import Cluster
from or1_megatron.collect import score_groups
from or1_megatron.config import Config
from or1_megatron.display import Display
from or1_megatron.errors import RunFailure
from or1_megatron.profiling.spans import Spans
from or1_megatron.reward.service import RewardService
from or1_megatron.rollout.engine import SamplingSpec
from or1_megatron.runfolder import RunFolder
from or1_megatron.types import Group, Prompt


def answers(
    config: Config, cluster: Cluster, rewards: RewardService, prompts: list[Prompt], temperature: float
) -> list[Group]:
    """evaluation.num_samples scored responses to each prompt; without those whose check failed for no fault of it.
    Raises RunFailure when that leaves none."""
    evaluation = config.evaluation
    sampling = SamplingSpec(
        temperature=temperature,
        top_p=evaluation.top_p,
        max_response_length=config.rollout.max_response_length,
        stop=tuple(config.rollout.stop),
    )
    groups = score_groups(cluster, rewards, prompts, evaluation.num_samples, sampling, Spans())
    if not groups:
        raise RunFailure(f"none of the {len(prompts)} groups could be checked; the run's logs/reward.log says why")
    return groups


class Evaluator:
    """Runs the held-out problems through the engines and remembers the first and the last accuracy."""

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        rewards: RewardService,
        prompts: list[Prompt],
        spans: Spans,
        folder: RunFolder,
    ):
        self._config, self._cluster, self._rewards, self._spans = config, cluster, rewards, spans
        self._prompts, self._folder = prompts, folder
        self.history: list[tuple[int, float]] = []  # step, avg@n at the first temperature

    def run_if_due(self, step: int, display: Display, *, last: bool = False) -> None:
        """Of the policy after `step` steps, when it is due: before the first step, every interval, last. Its line of
        metrics is that of `step`; the one of a run that is resumed there is not written again."""
        interval = self._config.evaluation.interval
        due = step == 0 or last or (interval and step % interval == 0)
        if not self._prompts or not due:
            return
        with self._spans.span("evaluation"):
            display.phase("evaluating")
            found: dict[float, Accuracy] = {}
            for temperature in self._config.evaluation.temperatures:
                groups = answers(self._config, self._cluster, self._rewards, self._prompts, temperature)
                self._folder.save_evaluation(step, temperature, groups)
                found[temperature] = accuracy([Outcome.of(group) for group in groups])
            first = next(iter(found.values()))
            if step not in dict(self.history):
                self.history.append((step, first.average.value))
                self._folder.metrics.log(step, evaluation_metrics(found))
            shares = ", ".join(f"{100 * one.average.value:.1f}%{_at(t, found)}" for t, one in found.items())
            display.message(f"held-out after step {step}: avg@{first.num_samples} {shares}")


def _at(temperature: float, found: dict[float, Accuracy]) -> str:
    return f" at T={temperature:g}" if len(found) > 1 else ""


def evaluation_metrics(found: dict[float, Accuracy]) -> dict[str, float]:
    """eval/avg@n ... of each temperature; with several of them eval/T0.6/avg@n ..."""
    metrics: dict[str, float] = {}
    for temperature, one in found.items():
        place = "eval/" if len(found) == 1 else f"eval/T{temperature:g}/"
        metrics[f"{place}avg@{one.num_samples}"] = one.average.value
        metrics |= {f"{place}pass@{k}": passing.value for k, passing in one.passing.items()}
        metrics |= {f"{place}length": one.length, f"{place}truncated": one.truncated}
    return metrics


def evaluation_line(name: str, evaluator: Evaluator, steps: int, minutes: float, folder: Path) -> str:
    """The run's last line."""
    if not evaluator.history:
        return f"{name}: {steps} steps, {minutes:.1f} min; run folder {folder}"
    (_, before), (_, after) = evaluator.history[0], evaluator.history[-1]
    return (
        f"{name}: held-out accuracy {100 * before:.1f}% -> {100 * after:.1f}% in {steps} steps, "
        f"{minutes:.1f} min; run folder {folder}"
    )
