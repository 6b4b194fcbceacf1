"""Which stage of the table (3.1, Tables 10 to 12) a step belongs to. Pure; what a change of stage does is train.py's.

A stage ends after its `until`, or earlier by its `patience` p: when the mean reward of its last p steps is not above
that of the p steps before them. The stages after it still end at their own `until`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from or1_megatron.config import Config


def solved(history: Iterable[tuple[str, int, int]]) -> set[str]:
    """uids of problems whose correctness was 1: `history` holds (uid, responses, correct), several rows a problem."""
    wrong: dict[str, int] = {}
    for uid, responses, correct in history:
        wrong[uid] = wrong.get(uid, 0) + responses - correct
    return {uid for uid, count in wrong.items() if count == 0}


class Stages:
    """The running stage and what it has seen. `state_dict` holds plain JSON types."""

    def __init__(self, config: Config):
        self._table = config.stages
        self._configs = config.all_stages()
        self.index = 0
        self.first_step = 1
        self.dropped: list[str] = []  # uids that no later stage samples
        self._rewards: list[float] = []
        self._responses = self._truncated = 0

    @property
    def config(self) -> Config:
        """Of the running stage."""
        return self._configs[self.index]

    def moves_on(self, step: int) -> bool:
        """Whether a new stage begins with `step`; it is then the running one."""
        before = self.index
        while self.index + 1 < len(self._table) and (step > self._table[self.index].until or self.converged):
            self.index, self.first_step = self.index + 1, step
            self._rewards, self._responses, self._truncated = [], 0, 0
        return self.index > before

    def lasts(self, step: int) -> bool:
        """Whether `step` still belongs to the running stage by its `until`."""
        return not self._table or self.index + 1 == len(self._table) or step <= self._table[self.index].until

    @property
    def converged(self) -> bool:
        patience = self._table[self.index].patience
        if not patience or len(self._rewards) < 2 * patience:
            return False
        earlier, later = self._rewards[-2 * patience : -patience], self._rewards[-patience:]
        return sum(later) <= sum(earlier)

    def record(self, reward: float, *, responses: int, truncated: int) -> dict[str, float]:
        """A step's mean reward and counts; the stage's counts up to now, as metrics."""
        self._rewards.append(reward)
        self._responses += responses
        self._truncated += truncated
        return {"stage": self.index + 1, "stage/responses": self._responses, "stage/truncated": self._truncated}

    def describe(self) -> str:
        config = self.config
        return (
            f"stage {self.index + 1} of {len(self._configs)} from step {self.first_step}: context "
            f"{config.rollout.context_length}, D_R {config.rollout.rollout_batch_size}, D_T {config.mini_batch_size}, "
            f"gs {config.rollout.group_size}, N_SGD {config.num_sgd_steps}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "first_step": self.first_step,
            "dropped": self.dropped,
            "rewards": list(self._rewards),
            "responses": self._responses,
            "truncated": self._truncated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index, self.first_step = min(state["index"], len(self._configs) - 1), state["first_step"]
        self.dropped, self._rewards = list(state["dropped"]), list(state["rewards"])
        self._responses, self._truncated = state["responses"], state["truncated"]
