"""The training loop: MAGIC, one step of which reads as in the paper (3.1, Algorithm of section 3)."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from or1_megatron import runstate
from or1_megatron.architecture import Architecture, check_degrees, read_architecture
from or1_megatron.cluster import Cluster
from or1_megatron.collect import collect, rollout_metrics, sampled_entropy
from or1_megatron.config import Config
from or1_megatron.data.prompts import PromptStream, load_prompts, load_tokenizer
from or1_megatron.display import Display
from or1_megatron.errors import RunFailure, StopRequested, UserError
from or1_megatron.evaluate import Evaluator, evaluation_line
from or1_megatron.parallel.hf_files import HFWeights
from or1_megatron.profiling.spans import Spans
from or1_megatron.reward.service import RewardService
from or1_megatron.rl.entropy import EntropyController
from or1_megatron.runfolder import RunFolder
from or1_megatron.types import Prompt
from or1_megatron.update import Updater


def train(config: Config, resume: Path | None = None) -> int:
    """Runs `config` to its last step, from scratch or from a run folder; returns the exit code."""
    architecture, prompts, held_out = check_inputs(config)
    folder = RunFolder.open(resume) if resume else RunFolder.create(config)
    spans, stop = Spans(), _Stop()
    with (
        stop.installed(),
        Display(config.steps, config.name) as display,
        RewardService(config.reward.num_workers, config.reward.timeout_s, config.reward.memory_mb, folder.logs) as rewards,
        _starting(display, config, folder) as cluster,
    ):
        cluster.stop_requested = lambda: stop.requested
        stream = PromptStream(prompts, config.data.seed)
        controller = entropy_controller(config)
        updater = Updater(config, architecture, cluster, spans)
        evaluator = Evaluator(config, cluster, rewards, held_out, spans)
        state = runstate.RunState(0, stream.state_dict(), controller.state_dict(), asdict(architecture))
        if resume:
            state = runstate.restore(folder.checkpoints, cluster, architecture)
            stream.load_state_dict(state.stream)
            controller.load_state_dict(state.entropy)
            folder.rewind(state.step)
            display.message(f"resumed after step {state.step}")

        def save() -> Path:
            display.phase("saving")
            with spans.span("save"):
                return runstate.save(folder.checkpoints, state, cluster, architecture, config.keep_checkpoints)

        def sync(completed: int) -> dict[str, float]:
            display.phase("syncing weights")
            with spans.span("sync"):
                cluster.push_weights(version=completed)
            return probe(config, updater, prompts[0], completed, spans)

        started = time.monotonic()
        try:
            for step in range(state.step + 1, config.steps + 1):
                with spans.span("step"):
                    metrics = sync(step - 1)
                    metrics |= evaluator.run_if_due(step - 1, display)
                    display.phase("rollout")
                    rollout = collect(config, cluster, rewards, stream, spans)
                    display.phase("update")
                    vocabulary = config.entropy.signal == "vocabulary"
                    e_k = updater.vocabulary_entropy(rollout) if vocabulary else sampled_entropy(rollout)
                    alpha = controller.alpha(e_k)
                    metrics |= updater.step(rollout, alpha=alpha, learning_rate=learning_rate(config, step))
                state = runstate.RunState(step, stream.state_dict(), controller.state_dict(), asdict(architecture))
                metrics |= rollout_metrics(rollout)
                metrics |= {"entropy/signal": e_k, "entropy/c": controller.coefficient, "entropy/alpha": alpha}
                if step == config.steps or (config.save_interval and step % config.save_interval == 0) or stop.requested:
                    save()
                metrics |= finish_metrics(metrics, spans.take())
                folder.save_rollouts(step, rollout.generated)
                folder.log_metrics(step, metrics)
                display.step({"step": step, **metrics})
                if stop.requested:
                    raise StopRequested("stopped")
            sync(config.steps)
            evaluator.run_if_due(config.steps, display, last=True)
            folder.log_metrics(config.steps, {**evaluator.summary(), **spans.take()})
        except StopRequested:
            kept = save()
            raise StopRequested(f"stopped after step {state.step}, saved {kept}; continue with: or1 train --resume {folder.path}") from None
        finally:
            folder.close()
        display.message(evaluation_line(config.name, evaluator, config.steps, time.monotonic() - started, folder.path))
    return 0


def check_inputs(config: Config) -> tuple[Architecture, list[Prompt], list[Prompt]]:
    """Everything that can be refused before a process is started. Raises UserError."""
    architecture = read_architecture(config.model.path)
    check_degrees(architecture, tp=config.parallel.tp, pp=config.parallel.pp)
    if config.rollout.context_length > architecture.max_positions:
        raise UserError(
            f"rollout.context_length={config.rollout.context_length} is above the model's max_position_embeddings="
            f"{architecture.max_positions}; use at most that"
        )
    with HFWeights(Path(config.model.path), architecture):
        pass
    tokenizer = load_tokenizer(config.model.path, architecture)
    if not config.data.train:
        raise UserError("data.train is empty; name at least one problem file")
    context, suffix = config.rollout.context_length, config.data.instruction_suffix
    prompts = load_prompts(config.data.train, tokenizer, context_length=context, instruction_suffix=suffix)
    held_out = load_prompts(config.evaluation.files, tokenizer, context_length=context, instruction_suffix=suffix)
    return architecture, prompts, held_out


@contextmanager
def _starting(display: Display, config: Config, folder: RunFolder) -> Iterator[Cluster]:
    display.phase("starting actor ranks and engines")
    with Cluster(config, folder.path) as cluster:
        yield cluster


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


def learning_rate(config: Config, step: int) -> float:
    """Constant after a linear warm-up; `step` counts from 1."""
    warmup = config.optimizer.warmup_steps
    return config.optimizer.lr * min(1.0, step / warmup if warmup else 1.0)


def probe(config: Config, updater: Updater, prompt: Prompt, completed: int, spans: Spans) -> dict[str, float]:
    """Engine against actor log-probs of a fixed text after a push. Raises RunFailure beyond the tolerance."""
    interval = config.rollout.probe_interval
    if not interval or completed % interval:
        return {}
    with spans.span("probe"):
        mean, largest = updater.probe(list(prompt.tokens[:256]))
    if not mean <= config.probe_tolerance:
        raise RunFailure(
            f"after step {completed} engine and actor disagree on the pushed weights: mean |delta log p| {mean:.2g} "
            f"(max {largest:.2g}) exceeds {config.probe_tolerance:.2g}; the engine does not hold the actor's weights"
        )
    return {"probe/mean": mean, "probe/max": largest}


def finish_metrics(metrics: dict[str, Any], seconds: dict[str, float]) -> dict[str, float]:
    tokens = metrics.get("tokens", 0)
    total = seconds.get("seconds/step", 0.0)
    return {**seconds, "tokens_per_second": tokens / total if total else 0.0}


class _Stop:
    """SIGINT and SIGTERM: the first asks for a stop, the second ends at once."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
