"""The training loop: MAGIC, one step of which reads as in the paper (3.1, Algorithm of section 3)."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from shlex import quote

from or1_megatron.cluster import Cluster
from or1_megatron.collect import rollout_metrics
from or1_megatron.config import Config
from or1_megatron.display import Display
from or1_megatron.errors import RunFailure, StopRequested, UserError, WorkerDied
from or1_megatron.evaluate import evaluation_line
from or1_megatron.inputs import Inputs, check_inputs
from or1_megatron.reward.preflight import check_rewards
from or1_megatron.reward.service import RewardService
from or1_megatron.run import Run, Stop, group_sizes, learning_rate
from or1_megatron.runfolder import RunFolder
from or1_megatron.runstate import Found, newest


def train(config: Config, resume: Path | None = None) -> int:
    """Runs `config` to its last step, from scratch or from a run folder; returns the exit code.

    A dead rank or engine is survived while restarts are left: all processes start anew from the newest checkpoint.
    """
    stop = Stop()
    with stop.installed(signal.SIGUSR1):  # may come at any time; before there are ranks the others end at once
        inputs = check_inputs(config)
        isolation = check_rewards(config.reward, [*chain(*inputs.sources), *inputs.held_out])
        folder = RunFolder.open(resume) if resume else RunFolder.create(config)
        with folder.driven():
            if not resume:
                folder.metrics.open_boards()
            found = newest(folder.checkpoints, inputs.architecture, group_sizes(config)) if resume else None
            if found and config.steps < found.state.step:
                raise UserError(f"steps={config.steps} is below {found.path.name} to go on from; give more steps")
            _attempts(config, inputs, folder, found, isolation, stop)
    return 0


def _attempts(
    config: Config, inputs: Inputs, folder: RunFolder, found: Found | None, isolation: str, stop: Stop
) -> None:
    restarts = 0
    while True:
        if stop.requested:
            again = f"; continue with: or1 train --resume {quote(str(folder.path))}" if found else ""
            raise StopRequested(f"stopped before the next step{again}")
        try:
            return _attempt(config, inputs, folder, found, isolation, stop)
        except WorkerDied as died:
            before, found = found, None
            with suppress(UserError):  # no sound checkpoint
                found = newest(folder.checkpoints, inputs.architecture, group_sizes(config))
            if found and (before is None or found.path != before.path):
                restarts = 0
            if found is None or restarts == config.max_restarts:
                raise
            restarts += 1
            print(f"{died}; restart {restarts} of {config.max_restarts} from {found.path}", file=sys.stderr, flush=True)
            folder = RunFolder.open(folder.path)


def _attempt(
    config: Config, inputs: Inputs, folder: RunFolder, found: Found | None, isolation: str, stop: Stop
) -> None:
    """From `found`, or the beginning, to the last step."""
    with (
        stop.installed(signal.SIGINT, signal.SIGTERM),
        Display(config.steps, config.name) as display,
        RewardService(config.reward, folder.logs) as rewards,
        _starting(display, config.widest(), folder) as cluster,
    ):
        cluster.stop_requested = lambda: stop.requested
        cluster.message, cluster.answered = display.message, display.answered
        if isolation:
            display.message(isolation)
        run = Run(config, inputs, folder, cluster, rewards, display, stop)
        if found:
            run.restore(found)
        started = time.monotonic()
        try:
            magic(run)
        except StopRequested:
            run.save()
            again = f"or1 train --resume {quote(str(folder.path))}"
            raise StopRequested(f"stopped after step {run.state.step}, saved it; continue with: {again}") from None
        except (UserError, RunFailure) as failure:
            if not isinstance(failure, WorkerDied):
                run.rescue()
            raise
        finally:
            run.close()
        minutes = (time.monotonic() - started) / 60
        display.message(evaluation_line(config.name, run.evaluator, config.steps, minutes, folder.path))


def magic(run: Run) -> None:
    """MAGIC (section 3), step by step."""
    config, spans, display = run.config, run.spans, run.display
    for step in range(run.state.step + 1, config.steps + 1):
        with spans.span("step"):
            stage = run.enter(step)
            metrics = run.sync(step - 1)
            run.evaluator.run_if_due(step - 1, display)
            display.phase("rollout")
            rollout = run.rollout(stage, step)
            display.phase("update")
            e_k = run.entropy(rollout)
            alpha = run.controller.alpha(e_k)
            metrics |= run.updater.step(rollout, alpha=alpha, learning_rate=learning_rate(config, step))
            with spans.span("metrics"):
                metrics |= rollout_metrics(rollout)
            metrics |= run.finish(step, rollout)
            metrics |= run.save_if_due(step)
        metrics |= {"entropy/signal": e_k, "entropy/c": run.controller.coefficient, "entropy/alpha": alpha}
        run.record(step, metrics, rollout)
        if run.stop.requested:
            raise StopRequested("stopped between steps")
    run.sync(config.steps)
    run.evaluator.run_if_due(config.steps, display, last=True)
    run.folder.metrics.log(config.steps, spans.take())
    run.timeline.close()


@contextmanager
def _starting(display: Display, config: Config, folder: RunFolder) -> Iterator[Cluster]:
    display.phase("starting actor ranks and engines")
    with Cluster(config, folder.path) as cluster:
        yield cluster
