"""Rollout of one training step: generate, score while others still decode, reject, refill."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from or1_megatron.cluster import Cluster
from or1_megatron.config import Config
from or1_megatron.data.mixture import PromptMixture
from or1_megatron.errors import RunFailure
from or1_megatron.profiling.spans import Spans
from or1_megatron.reward.service import RewardService, task_of
from or1_megatron.rl.filter import is_informative, refill_size
from or1_megatron.rollout.engine import SamplingSpec
from or1_megatron.rollout.schedule import LengthHistory, whole_groups
from or1_megatron.types import Group, Prompt, Sample, Verdict

_ABANDON_S = 30.0


@dataclass
class Rollout:
    """What one step sampled. `generated` holds every group, scored; `kept` those that the step is trained on.

    The first `num_carried` of the kept were sampled for an earlier step; `surplus` is left for the next one.
    `num_left_out` groups more were rolled out, of which a response could not be checked.
    """

    generated: list[Group] = field(default_factory=list)
    kept: list[Group] = field(default_factory=list)
    surplus: list[Group] = field(default_factory=list)
    num_carried: int = 0
    num_left_out: int = 0

    @property
    def num_asked(self) -> int:
        return len(self.generated) + self.num_left_out

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
        pack=rollout.pack_while_decoding,
    )


def collect(
    config: Config,
    cluster: Cluster,
    rewards: RewardService,
    stream: PromptMixture,
    spans: Spans,
    carried: list[Group],
    history: LengthHistory,
) -> Rollout:
    """The rollout of one step, with real engines and verifiers; see `fill`."""
    size, sampling = config.rollout.group_size, training_sampling(config)
    checked: list[Verdict] = []

    def answer(prompts: list[Prompt]) -> list[Group]:
        with spans.span("deal"):
            dealt = history.deal(prompts, size, cluster.num_engines, config.rollout.schedule)
        return score_groups(cluster, rewards, prompts, size, sampling, spans, dealt, checked)

    return fill(config, answer, stream, carried)


class RolloutAhead:
    """A rollout in the background, with the weights that the engines have when it starts: one step off-policy."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcome: Rollout | BaseException | None = None

    def start(self, sample: Callable[[], Rollout]) -> None:
        assert self._thread is None and self._outcome is None, "the rollout before has not been taken"

        def run() -> None:
            try:
                self._outcome = sample()
            except BaseException as error:  # handed to the thread that waits
                self._outcome = error

        self._thread = threading.Thread(target=run, name="rollout", daemon=True)
        self._thread.start()

    @property
    def under_way(self) -> bool:
        """Whether one was started that nobody has waited for yet."""
        return self._thread is not None

    def wait(self) -> None:
        """Until the engines are free. Raises what the rollout died of."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if isinstance(self._outcome, BaseException):
            raise self._outcome

    def abandon(self) -> None:
        """Waits for the end of a rollout that was told to stop, and forgets it."""
        if self._thread is not None:
            self._thread.join(_ABANDON_S)
        self._thread = self._outcome = None

    def take(self) -> Rollout | None:
        """The rollout that was started; None when none was."""
        self.wait()
        outcome, self._outcome = self._outcome, None
        assert not isinstance(outcome, BaseException)
        return outcome


def fill(
    config: Config, answer: Callable[[list[Prompt]], list[Group]], stream: PromptMixture, carried: list[Group]
) -> Rollout:
    """Rolls out what the surplus of earlier steps leaves of rollout_batch_size, and refills up to the refill bound.

    answer: scored groups of these prompts, in their order. At most half of a step is carried over; what is more waits
    for the step after, and what is too long for a new stage is dropped. Which groups are left over follows from the
    order of the prompts, never from who finished first. Raises RunFailure when none of its groups could be checked.
    """
    wanted = config.rollout.rollout_batch_size
    limit = int(wanted * config.rollout.max_generated_factor)
    carried = [group for group in carried if group.longest <= config.rollout.context_length]
    used = carried[: wanted // 2]
    rollout = Rollout(kept=list(used), num_carried=len(used))
    missing = wanted - len(used)
    while missing > 0:
        groups = answer(stream.take(missing))
        rollout.generated += groups
        rollout.num_left_out += missing - len(groups)
        mask = config.loss.advantage_mask
        rollout.kept += [group for group in groups if is_informative(group, mask) or not config.loss.rejection]
        missing = refill_size(
            kept=len(rollout.kept),
            wanted=wanted,
            generated=rollout.num_asked,
            limit=limit,
            carried=len(used),
            expected=config.rollout.refill == "expected",
        )
    if not rollout.generated:
        raise RunFailure(f"none of the {rollout.num_asked} groups could be checked; the run's logs/reward.log says why")
    rollout.surplus = [*carried[len(used) :], *rollout.kept[wanted:]]
    del rollout.kept[wanted:]
    return rollout


def shortfall(config: Config, rollout: Rollout) -> str:
    """What to tell the user when the refill bound was reached; empty when it was not, or nothing was to be refilled."""
    wanted, factor = config.rollout.rollout_batch_size, config.rollout.max_generated_factor
    if len(rollout.kept) >= wanted or factor == 1:
        return ""
    return (
        f"{len(rollout.kept)} of {wanted} groups are informative after {rollout.num_asked} were rolled out, the "
        f"bound by rollout.max_generated_factor={factor}; the step goes on with those"
    )


def score_groups(
    cluster: Cluster,
    rewards: RewardService,
    prompts: list[Prompt],
    group_size: int,
    sampling: SamplingSpec,
    spans: Spans,
    dealt: tuple[list[list[Prompt]], int] | None = None,
    checked: list[Verdict] | None = None,
) -> list[Group]:
    """Groups with verdicts and rewards, in the order of `prompts`: results do not depend on who finished first.

    dealt: each engine's prompts and the responses that it gives to each, see rollout/schedule.py; None: in turn.
    Responses are checked while others are decoded, or after them all: reward.during_rollout; packed by the engines, or
    here at last: sampling.pack. A group with a response that could not be checked is left out. Raises RunFailure when
    that is too often, among these and the earlier verdicts `checked` of the same step, to which they are added.
    """
    scoring: list[tuple[Sample, Future[Verdict]]] = []
    groups: list[Group] = []

    def check(group: Group) -> None:
        scoring.extend((sample, rewards.submit(task_of(sample))) for sample in group.samples)

    at_once = cluster.config.reward.during_rollout
    with spans.span("rollout"):
        engines = cluster.num_engines
        shares, piece = dealt or ([prompts[i::engines] for i in range(engines)], group_size)
        for group in cluster.generate(shares, piece, sampling):
            groups.append(group)
            if at_once:
                check(group)
    with spans.span("reward_wait"):
        if not at_once:
            for group in groups:
                check(group)
        verdicts = [future.result() for _, future in scoring]
    if not sampling.pack:
        with spans.span("pack"):
            for sample, _ in scoring:
                sample.pack()
    with spans.span("groups"):
        checked = [] if checked is None else checked
        checked += verdicts
        rewards.check_failure_rate(checked)
        for (sample, _), verdict in zip(scoring, verdicts, strict=True):
            _set_verdict(sample, verdict)
        whole = whole_groups(groups, group_size)
        sound = [group for group in whole if all(sample.verdict != "infrastructure_error" for sample in group.samples)]
        place = {prompt.uid: i for i, prompt in enumerate(prompts)}
        # A prompt dealt twice has two groups in one place: by their tokens then, not by who finished first.
        sound.sort(key=lambda group: (place[group.prompt.uid], [sample.tokens.tobytes() for sample in group.samples]))
    return sound


def scored(
    cluster: Cluster, rewards: RewardService, prompts: list[Prompt], group_size: int, sampling: SamplingSpec
) -> Iterator[Group]:
    """Groups with verdicts in the order they finish, for a caller who keeps each one at once.

    A group with a response that could not be checked is left out. Raises RunFailure when that was too often.
    """
    waiting: deque[tuple[Group, list[Future[Verdict]]]] = deque()
    verdicts: list[Verdict] = []

    def judged() -> Iterator[Group]:
        group, futures = waiting.popleft()
        found = [future.result() for future in futures]
        verdicts.extend(found)
        for sample, verdict in zip(group.samples, found, strict=True):
            _set_verdict(sample, verdict)
        if not any(verdict.failed for verdict in found):
            yield group

    engines = cluster.num_engines
    for group in cluster.generate([prompts[i::engines] for i in range(engines)], group_size, sampling):
        waiting.append((group, [rewards.submit(task_of(sample)) for sample in group.samples]))
        while waiting and all(future.done() for future in waiting[0][1]):
            yield from judged()
    while waiting:
        yield from judged()
    rewards.check_failure_rate(verdicts)


def _set_verdict(sample: Sample, verdict: Verdict) -> None:
    sample.verdict = verdict.name
    sample.reward = 0.0 if verdict.failed else verdict.reward


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Over every generated sample: reward, verdicts, lengths, truncation; groups kept and dropped."""
    samples = rollout.samples
    count = len(samples)
    lengths = [len(sample.tokens) for sample in samples]
    verdicts = Counter(sample.verdict for sample in samples)
    generated = {id(group) for group in rollout.generated}
    fresh = len(rollout.kept) - rollout.num_carried
    num_left = sum(id(group) in generated for group in rollout.surplus)
    return {
        "reward/mean": _mean(sample.reward for sample in samples),
        **{f"verdict/{name}": number for name, number in sorted(verdicts.items())},
        "length/mean": _mean(lengths),
        "length/max": max(lengths),
        "truncated": sum(sample.truncated for sample in samples) / count,
        "groups/generated": len(rollout.generated),
        "groups/left_out": rollout.num_left_out,
        "groups/kept": len(rollout.kept),
        "groups/dropped": len(rollout.generated) - fresh - num_left,
        "groups/carried": rollout.num_carried,
        "groups/surplus": len(rollout.surplus),
    }


def sampled_entropy(rollout: Rollout) -> float:
    """-mean log pi over all sampled tokens: an unbiased estimate of the policy's entropy, nats per token."""
    return -float(np.concatenate([sample.log_probs for sample in rollout.samples]).mean(dtype=np.float64))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
