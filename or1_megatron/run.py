"""One training run: its parts, the driver's state, and what happens around a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from shlex import quote
from typing import Any

from or1_megatron.accuracy import held_out
from or1_megatron.cluster import Cluster
from or1_megatron.collect import Rollout, RolloutAhead, collect, sampled_entropy, shortfall
from or1_megatron.config import Config
from or1_megatron.data.mixture import PromptMixture
from or1_megatron.display import Display
from or1_megatron.errors import RunFailure, UserError
from or1_megatron.evaluate import Evaluator
from or1_megatron.inputs import Inputs
from or1_megatron.profiling.spans import Spans
from or1_megatron.reward.service import RewardService
from or1_megatron.rl.entropy import EntropyController
from or1_megatron.rl.stages import Stages, solved
from or1_megatron.rollout.schedule import LengthHistory
from or1_megatron.runfolder import RunFolder
from or1_megatron.runstate import Checkpoints, Found, RunState
from or1_megatron.timeline import Timeline
from or1_megatron.types import Group, Prompt
from or1_megatron.update import Updater


class Run:
    """The parts of one training run and the driver's state."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        folder: RunFolder,
        cluster: Cluster,
        rewards: RewardService,
        display: Display,
        stop: Stop,
    ):
        self.config, self.architecture, self.folder = config, inputs.architecture, folder
        self.cluster, self.rewards, self.display, self.stop = cluster, rewards, display, stop
        folder.metrics.message = display.message
        self.spans = Spans()
        self.timeline = Timeline(config.profiling, folder, cluster, rewards, self.spans)
        self.stream = PromptMixture(inputs.sources, config.data.weights or [1.0], config.data.seed)
        self.carried: list[Group] = []  # the last rollout's surplus
        self._stream_state = self.stream.state_dict()  # after the last rollout, not after one that is under way
        self._ahead = RolloutAhead()
        self.stages = Stages(config)
        self.lengths = LengthHistory()
        self.controller = entropy_controller(config)
        self.updater = Updater(config, self.architecture, cluster, self.spans)
        self.evaluator = Evaluator(config, cluster, rewards, inputs.held_out, self.spans, folder)
        self.state = self.state_after(0)
        keep = {"keep": config.keep_checkpoints, "keep_every": config.keep_every}
        self.checkpoints = Checkpoints(folder.checkpoints, cluster, self.architecture, **keep)
        self._peak_flops = cluster.peak_flops()
        self._probe_tokens = probe_tokens(inputs.sources[0])

    def state_after(self, step: int) -> RunState:
        return RunState(
            step=step,
            stream=self._stream_state,
            entropy=self.controller.state_dict(),
            stage=self.stages.state_dict(),
            model=asdict(self.architecture),
            group_sizes=group_sizes(self.config),
            surplus=self.carried,
        )

    def enter(self, step: int) -> Config:
        """The configuration of the stage that `step` belongs to; at its first step also what a stage start does."""
        self.timeline.begin(step)
        before = self.stages.first_step
        if self.stages.moves_on(step):
            if self.config.drop_solved:
                newly = solved(self.folder.read_history(before, step - 1))
                self.stages.dropped = sorted({*self.stages.dropped, *newly})
                self.stream.drop(self.stages.dropped)
                self.display.message(f"{len(newly)} problems solved in the stage before are dropped")
            if self.config.entropy.at_stage == "reset":
                self.controller = entropy_controller(self.config)
            self.display.message(self.stages.describe())
        self.updater.config = self.stages.config
        return self.stages.config

    def rollout(self, stage: Config, step: int) -> Rollout:
        """Of this step: the one sampled while the step before was trained, else sampled now. Starts the next one's."""
        rollout = self._ahead.take() or self._collect(stage, self.spans, self.lengths)
        self.carried, self._stream_state = rollout.surplus, self.stream.state_dict()
        if stage.rollout.overlap and step < self.config.steps and self.stages.lasts(step + 1):
            known = self.lengths.copy()  # a step that ends meanwhile adds to it
            self._ahead.start(lambda: self._collect(stage, Spans(), known))
        return rollout

    def _collect(self, stage: Config, spans: Spans, lengths: LengthHistory) -> Rollout:
        return collect(stage, self.cluster, self.rewards, self.stream, spans, self.carried, lengths)

    def finish(self, step: int, rollout: Rollout) -> dict[str, float]:
        """Takes note of a completed step: history, stage and the state that a checkpoint holds."""
        with self.spans.span("history"):
            self.folder.save_history(step, rollout.generated)
            self.lengths.record(rollout.generated)
        short = shortfall(self.stages.config, rollout)
        if short:
            self.display.message(f"step {step}: {short}")
        samples = rollout.samples
        counts = self.stages.record(
            sum(sample.reward for sample in samples) / len(samples),
            responses=len(samples),
            truncated=sum(sample.truncated for sample in samples),
        )
        self.state, self.updater.midway = self.state_after(step), False
        versions = [sample.weight_version for group in rollout.kept for sample in group.samples]
        behind = {"staleness": step - 1 - sum(versions) / len(versions)} if versions else {}
        return counts | behind

    def restore(self, found: Found) -> None:
        """Continues from a checkpoint of the folder."""
        for line in found.set_damaged_aside():
            self.display.message(line)
        self.cluster.load(found.path / "actor")
        self.state = found.state
        self.stages.load_state_dict(self.state.stage)
        self.stream.drop(self.stages.dropped)
        self.stream.load_state_dict(self.state.stream)
        self._stream_state = self.stream.state_dict()
        self.controller.load_state_dict(self.state.entropy)
        self.carried = self.state.surplus = found.surplus(self.stream.prompts)
        if self.carried and not self.config.may_train_stale:
            self.display.message(
                f"{len(self.carried)} groups left over by the step before are dropped: earlier weights have sampled "
                f"them, which loss.old_log_probs={self.config.loss.old_log_probs} does not allow for"
            )
            self.carried = []
        for uid, tokens, responses in self.folder.read_lengths(self.state.step):
            self.lengths.note(uid, tokens, responses)
        self.folder.metrics.rewind(self.state.step)
        known = held_out(self.folder.metrics.read())
        if self.folder.config.evaluation != self.config.evaluation:  # then the one that is due now is another
            known = [(step, value) for step, value in known if step != self.state.step]
        self.evaluator.history = known
        self.folder.save_config(self.config)
        self.display.resumed(self.state.step)

    def close(self) -> None:
        """A rollout under way must not outlive the cluster: its thread would wake Ray anew."""
        self.cluster.stop_requested = lambda: True
        self._ahead.abandon()
        self.folder.metrics.close()

    def save_if_due(self, step: int) -> dict[str, float]:
        """Begins a checkpoint when one is due; makes the one before visible as soon as it is written."""
        with self.spans.span("save"):
            written = self.checkpoints.publish_if_written()
        interval = self.config.save_interval
        last = step == self.config.steps or self.stop.requested
        if last or (interval and step % interval == 0):
            self.save(wait=last or not self.config.background_save)
        return {} if written is None else {"save/write_seconds": written}

    def save(self, *, wait: bool = True) -> None:
        """Saves the state after the last completed step. Raises UserError."""
        self.display.phase("saving")
        with self.spans.span("save"):
            self.checkpoints.begin(self.state)
            if wait:
                self.checkpoints.finish()

    def rescue(self) -> None:
        """After a failure that all processes survived: saves the last completed step, unless weights are past it."""
        if self.state.step == 0 or self.updater.midway:
            return
        with suppress(UserError, RunFailure):  # the first failure is the one to tell
            self.save()
            again = f"or1 train --resume {quote(str(self.folder.path))}"
            self.display.message(f"saved step {self.state.step}, the last that was completed; continue with: {again}")

    def sync(self, completed: int) -> dict[str, float]:
        """Pushes the weights after `completed` steps to the engines and probes them.

        Raises RunFailure when engine and actor disagree on a fixed text beyond the tolerance.
        """
        self.display.phase("syncing weights")
        if self._ahead.under_way:
            with self.spans.span("rollout"):
                self._ahead.wait()
            self.timeline.add_engines()
        with self.spans.span("sync"):
            self.cluster.push_weights(version=completed)
        interval, tolerance = self.config.rollout.probe_interval, self.config.probe_tolerance
        if not interval or completed % interval:
            return {}
        with self.spans.span("probe"):
            mean, largest = self.updater.probe(self._probe_tokens)
        if not mean <= tolerance:
            raise RunFailure(
                f"after step {completed} engine and actor disagree on the pushed weights: mean |delta log p| "
                f"{mean:.2g} "
                f"(max {largest:.2g}) exceeds {tolerance:.2g}; the engine does not hold the actor's weights"
            )
        return {"probe/mean": mean, "probe/max": largest}

    def entropy(self, rollout: Rollout) -> float:
        """e_k, over every sample of the rollout buffer."""
        vocabulary = self.config.entropy.signal == "vocabulary"
        with self.spans.span("entropy"):
            return self.updater.vocabulary_entropy(rollout) if vocabulary else sampled_entropy(rollout)

    def record(self, step: int, metrics: dict[str, Any], rollout: Rollout) -> None:
        """Writes down a step that has ended. The time this takes is in the next step's line."""
        seconds = paper_seconds(self.spans.take())
        metrics |= self.rewards.take_metrics()
        trained = seconds["seconds/step"] - seconds.get("seconds/evaluation", 0.0)
        metrics |= seconds | {"tokens_per_second": metrics.get("tokens", 0) / trained}
        if not self.stages.config.rollout.overlap:  # else the seconds are those of waiting for it
            sampled = sum(len(sample.tokens) for sample in rollout.samples)
            metrics["tokens_per_second/rollout"] = sampled / seconds["seconds/rollout"]
        if "flops" in metrics:
            peak = self._peak_flops * self.config.parallel.num_ranks
            metrics["training_flops"] = metrics.pop("flops")
            metrics["mfu"] = metrics["training_flops"] / (seconds["seconds/update"] * peak)
            metrics["tokens_per_second/update"] = metrics["tokens"] / seconds["seconds/update"]
        metrics |= self.timeline.end(step, engines=not self._ahead.under_way)
        with self.spans.span("record"):
            self.folder.save_rollouts(step, rollout.generated)
            self.folder.metrics.log(step, metrics)
            self.display.step({"step": step, **metrics})


def paper_seconds(seconds: dict[str, float]) -> dict[str, float]:
    """A step's seconds with `others` as in Tables 7 and 8: all but rollout, policy update and held-out evaluation.

    Rewards, old and reference log-probs, weight push and checkpoints are others; an update is forward, backward and
    optimizer of every SGD step.
    """
    named = sum(seconds.get(f"seconds/{name}", 0.0) for name in ("rollout", "update", "evaluation"))
    return seconds | {"seconds/others": seconds["seconds/step"] - named}


def entropy_controller(config: Config) -> EntropyController:
    rule = config.entropy
    return EntropyController(
        rule=rule.rule,
        target=rule.target,
        delta=rule.delta,
        initial=rule.initial,
        minimum=rule.min,
        maximum=rule.max,
    )


def probe_tokens(prompts: list[Prompt]) -> list[int]:
    """Of the first problem with two tokens at least, as the first has no log-prob."""
    tokens = next((prompt.tokens for prompt in prompts if len(prompt.tokens) > 1), 2 * prompts[0].tokens)
    return list(tokens[:256])


def group_sizes(config: Config) -> list[int]:
    """gs of every stage."""
    return [stage.rollout.group_size for stage in config.all_stages()]


def learning_rate(config: Config, step: int) -> float:
    """Constant after a linear warm-up; `step` counts from 1."""
    warmup = config.optimizer.warmup_steps
    return config.optimizer.lr * min(1.0, step / warmup if warmup else 1.0)


class Stop:
    """SIGINT, SIGTERM and SIGUSR1: the first asks for a stop, a second ends at once; USR1 may come again and again."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number != signal.SIGUSR1:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def installed(self, *numbers: signal.Signals) -> Iterator[None]:
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
