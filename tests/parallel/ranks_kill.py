"""What the ranks of test_kill.py run: a small training run with real checkpoints, killed at any moment.

Rank 0 is also the driver, as train.py's loop is: a prompt stream, an entropy controller, `Checkpoints`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist

from or1_megatron.actor.actor import MegatronActor
from or1_megatron.config import Config
from or1_megatron.data.mixture import PromptMixture
from or1_megatron.parallel.file_sums import FileSums
from or1_megatron.rl.entropy import EntropyController
from or1_megatron.runstate import Checkpoints, RunState, newest
from or1_megatron.types import Prompt, Sequence
from tests.parallel.ranks_actor import my_batches

LAST_STEP = 400  # more than any of the killed runs reaches


class Ranks:
    """What cluster.py is to a run, over gloo: rank 0 says what all ranks do."""

    def __init__(self, config: Config, rank: int):
        torch._dynamo.config.disable = True  # compiling the loss would take far longer than any of these runs
        self.actor = MegatronActor(config, rank)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        dist.broadcast_object_list([method, arguments], src=0)
        return self.here(method, *arguments)

    def here(self, method: str, *arguments: Any) -> list[Any]:
        result = getattr(self, f"_{method}", None) or getattr(self.actor, method)
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, result(*arguments))
        return results

    def follow(self) -> None:
        while True:
            order: list[Any] = [None, None]
            dist.broadcast_object_list(order, src=0)
            if order[0] == "end":
                return
            self.here(order[0], *order[1])

    def _step(self, sequences: list[Sequence], alpha: float) -> float:
        num_tokens = sum(s.num_response_tokens for s in sequences)
        batches = my_batches(self.actor, sequences)
        noise = float(torch.rand(()))  # of every rank's own generator: it has to be restored too
        result = self.actor.update(batches, entropy_coefficient=alpha + noise, num_tokens=num_tokens, lr=1e-3)
        return result.loss if result else 0.0

    def begin_save(self, directory: Path) -> None:
        self.call("begin_save", directory)

    def save_written(self) -> float | None:
        took = self.call("save_written")
        return None if None in took else max(took)

    def finish_save(self) -> FileSums:
        return {name: value for files in self.call("finish_save") for name, value in files.items()}


def train(rank: int, world_size: int, config: Config, prompts: list[Prompt], folder: Path, background: bool) -> None:
    """From the newest checkpoint of `folder` to LAST_STEP. Appends a line a step to `losses`, and one to `promised`
    for each checkpoint that is visible."""
    ranks = Ranks(config, rank)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if rank > 0:
        ranks.follow()
        return
    stream = PromptMixture([prompts], [1.0], seed=3)
    controller = EntropyController(rule="paper", target=9.0, delta=0.01, initial=0.0, minimum=0.0, maximum=1.0)
    directory, architecture = folder / "checkpoints", ranks.actor.architecture
    start = 0
    if any(directory.glob("step-*")):
        found = newest(directory, architecture, [2])
        assert not found.damaged, found.damaged
        ranks.call("load", found.path / "actor")
        stream.load_state_dict(found.state.stream)
        controller.load_state_dict(found.state.entropy)
        start = found.state.step
    checkpoints = Checkpoints(directory, ranks, architecture, keep=2, keep_every=50)
    with (folder / "losses").open("a") as losses, (folder / "promised").open("a") as promised:
        for step in range(start + 1, LAST_STEP + 1):
            drawn = [Sequence(p.tokens, 2, 1.0 - i % 3, None) for i, p in enumerate(stream.take(4))]
            alpha = controller.alpha(1.0)
            loss = sum(ranks.call("step", drawn, alpha))
            print(json.dumps([step, loss, alpha]), file=losses, flush=True)
            checkpoints.publish_if_written()
            state = RunState(step, stream.state_dict(), controller.state_dict(), {}, asdict(architecture), [2])
            checkpoints.begin(state)
            if not background:
                checkpoints.finish()
            visible = sorted(path.name for path in directory.glob("step-*"))
            print(visible[-1] if visible else "", file=promised, flush=True)
    checkpoints.finish()
    ranks.call("end")


def losses_of(rank: int, world_size: int, config: Config, prompts: list[Prompt], steps: int) -> list[list[float]]:
    """The same run without a checkpoint or an interruption: [step, loss, alpha] of each step."""
    ranks = Ranks(config, rank)
    stream = PromptMixture([prompts], [1.0], seed=3)
    controller = EntropyController(rule="paper", target=9.0, delta=0.01, initial=0.0, minimum=0.0, maximum=1.0)
    rows = []
    for step in range(1, steps + 1):
        drawn = [Sequence(p.tokens, 2, 1.0 - i % 3, None) for i, p in enumerate(stream.take(4))]
        alpha = controller.alpha(1.0)
        rows.append([step, sum(ranks.here("step", drawn, alpha)), alpha])
    return rows
