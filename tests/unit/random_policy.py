"""Groups as engines and verifiers give them, drawn at random, for tests of what becomes of them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from or1_megatron.config import Config
from or1_megatron.recipe import from_tree
from or1_megatron.types import Group, Prompt, Sample

PROMPTS = [Prompt(f"p{i}", "x", (1, 2), ("1",)) for i in range(40)]
SHARE = 0.4  # of the groups, informative


def config(**rollout: Any) -> Config:
    tree = {"rollout_batch_size": 16, "group_size": 2, "refill": "expected", "max_generated_factor": 9, **rollout}
    loss = {"old_log_probs": "engine"}
    return from_tree([("t", {"model": {"path": "/m"}, "rollout": tree, "loss": loss})])


def as_lists(group: Group) -> tuple[str, list[dict[str, Any]]]:
    """What can be compared of it, per token too."""

    def plain(sample: Sample) -> dict[str, Any]:
        return {name: getattr(value, "tolist", lambda value=value: value)() for name, value in vars(sample).items()}

    return group.prompt.uid, [plain(sample) for sample in group.samples]


class Policy:
    """Scored groups, as engines and verifiers give them: drawn from the step and the prompt."""

    def __init__(self) -> None:
        self.version, self.rounds = 0, 0

    def __call__(self, prompts: list[Prompt]) -> list[Group]:
        self.rounds += 1
        return [self._group(prompt) for prompt in prompts]

    def _group(self, prompt: Prompt) -> Group:
        draw = random.Random(f"{self.version}/{self.rounds}/{prompt.uid}")
        rewards = (1.0, 0.0) if draw.random() < SHARE else (0.0, 0.0)
        return Group(
            prompt,
            [
                Sample(
                    prompt,
                    i,
                    np.array([draw.randrange(9)], np.int32),
                    np.array([-draw.random()], np.float32),
                    "x",
                    "stop",
                    self.version,
                    "wrong",
                    reward,
                )
                for i, reward in enumerate(rewards)
            ],
        )
