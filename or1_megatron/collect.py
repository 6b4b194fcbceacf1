"""Rollout of one training step: generate, score while others still decode, reject, refill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from or1_megatron.cluster import Cluster
from or1_megatron.config import Config
from or1_megatron.data.mixture import PromptMixture
from or1_megatron.profiling.spans import Spans
from or1_megatron.reward.service import RewardService, task_of
from or1_megatron.rl.filter import is_informative, refill_size
from or1_megatron.rollout.engine import SamplingSpec
from or1_megatron.types import Group, Prompt, Sample, Verdict


@dataclass
class Rollout:
    """What one step sampled. `generated` holds every group, scored; `kept` those that carry a gradient."""

    generated: list[Group] = field(default_factory=list)
    kept: list[Group] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.generated for sample in group.samples]


def training_sampling(config: Config) -> SamplingSpec:
    rollout = config.rollout
    return SamplingSpec(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_response_length=rollout.max_response_length,
        stop=tuple(rollout.stop),
        context_length=rollout.context_length,
    )


def collect(config: Config, cluster: Cluster, rewards: RewardService, stream: PromptMixture, spans: Spans) -> Rollout:
    """Rolls out rollout_batch_size prompts, and as many again as were rejected, up to the refill bound."""
    wanted = config.rollout.rollout_batch_size
    limit = int(wanted * config.rollout.max_generated_factor)
    rollout = Rollout()
    missing = wanted
    while missing > 0:
        groups = score_groups(
            cluster, rewards, stream.take(missing), config.rollout.group_size, training_sampling(config), spans
        )
        rollout.generated += groups
        mask = config.loss.advantage_mask
        rollout.kept += [group for group in groups if is_informative(group, mask) or not config.loss.rejection]
        missing = refill_size(kept=len(rollout.kept), wanted=wanted, generated=len(rollout.generated), limit=limit)
    return rollout


def shortfall(config: Config, rollout: Rollout) -> str:
    """What to tell the user when the refill bound was reached; empty when it was not, or nothing was to be refilled."""
    wanted, factor = config.rollout.rollout_batch_size, config.rollout.max_generated_factor
    if len(rollout.kept) >= wanted or factor == 1:
        return ""
    return (
        f"{len(rollout.kept)} of {wanted} groups are informative after {len(rollout.generated)} were rolled out, the "
        f"bound by rollout.max_generated_factor={factor}; the step goes on with those"
    )


def score_groups(
    cluster: Cluster,
    rewards: RewardService,
    prompts: list[Prompt],
    group_size: int,
    sampling: SamplingSpec,
    spans: Spans,
) -> list[Group]:
    """Groups with verdicts and rewards, in the order of `prompts`: results do not depend on who finished first.

    A group with a response that could not be checked is left out. Raises RunFailure when that is too often.
    """
    scoring: list[tuple[Sample, Future[Verdict]]] = []
    groups: list[Group] = []
    with spans.span("rollout"):
        for group in cluster.generate(prompts, group_size, sampling):
            groups.append(group)
            scoring += [(sample, rewards.submit(task_of(sample))) for sample in group.samples]
    with spans.span("reward_wait"):
        verdicts = [future.result() for _, future in scoring]
    rewards.check_failure_rate(verdicts)
    for (sample, _), verdict in zip(scoring, verdicts, strict=True):
        sample.verdict = verdict.name
        sample.reward = 0.0 if verdict.failed else verdict.reward
    sound = [group for group in groups if all(sample.verdict != "infrastructure_error" for sample in group.samples)]
    place = {prompt.uid: i for i, prompt in enumerate(prompts)}
    return sorted(sound, key=lambda group: place[group.prompt.uid])


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Over every generated sample: reward, verdicts, lengths, truncation; groups kept and dropped."""
    samples = rollout.samples
    count = len(samples)
    lengths = [len(sample.tokens) for sample in samples]
    verdicts = Counter(sample.verdict for sample in samples)
    return {
        "reward/mean": _mean(sample.reward for sample in samples),
        **{f"verdict/{name}": number for name, number in sorted(verdicts.items())},
        "length/mean": _mean(lengths),
        "length/max": max(lengths),
        "truncated": sum(sample.truncated for sample in samples) / count,
        "groups/generated": len(rollout.generated),
        "groups/kept": len(rollout.kept),
        "groups/dropped": len(rollout.generated) - len(rollout.kept),
    }


def sampled_entropy(rollout: Rollout) -> float:
    """-mean log pi over all sampled tokens: an unbiased estimate of the policy's entropy, nats per token."""
    return -_mean(value for sample in rollout.samples for value in sample.log_probs)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
