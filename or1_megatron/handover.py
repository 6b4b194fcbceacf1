"""Who holds the device in which phase of a step, when actor and engines share it: one state machine.

An operation names its phase; what the phase does not need is released before what it lacks is restored, so that the
two sides are never both there in full. Released engine weights are gone (the next push brings them), hence a rollout
can only follow a push: anything else is refused, whatever the order of calls. Pure; the calls to ranks and engines are
cluster/'s.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Part(StrEnum):
    """What lies on a device."""

    ACTOR_WEIGHTS = "actor weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ENGINE_WEIGHTS = "engine weights"
    KV_CACHE = "kv cache"


class Phase(StrEnum):
    """What is being done."""

    PUSH = "push"
    ROLLOUT = "rollout"
    SCORE = "score"
    UPDATE = "update"
    CHECKPOINT = "checkpoint"


NEEDS: dict[Phase, frozenset[Part]] = {
    Phase.PUSH: frozenset({Part.ACTOR_WEIGHTS, Part.ENGINE_WEIGHTS}),
    Phase.ROLLOUT: frozenset({Part.ENGINE_WEIGHTS, Part.KV_CACHE}),
    Phase.SCORE: frozenset({Part.ACTOR_WEIGHTS}),
    Phase.UPDATE: frozenset({Part.ACTOR_WEIGHTS, Part.GRADIENTS, Part.OPTIMIZER}),
    Phase.CHECKPOINT: frozenset({Part.ACTOR_WEIGHTS, Part.OPTIMIZER}),
}
ACTOR_PARTS = frozenset({Part.ACTOR_WEIGHTS, Part.GRADIENTS, Part.OPTIMIZER})
ENGINE_PARTS = frozenset({Part.ENGINE_WEIGHTS, Part.KV_CACHE})
Move = Callable[[frozenset[Part]], None]


class Handover:
    """Begins with the actor in possession: engines have released what they hold, the actor has all of its own."""

    def __init__(self, release: Move, restore: Move):
        self._release, self._restore = release, restore
        self.resident: frozenset[Part] = ACTOR_PARTS

    def enter(self, phase: Phase) -> None:
        """Makes the device ready for `phase`; nothing moves when all that it needs is there."""
        needed = NEEDS[phase]
        if needed <= self.resident:
            return
        lacking, unneeded = needed - self.resident, self.resident - needed
        assert phase is Phase.PUSH or Part.ENGINE_WEIGHTS not in lacking, (
            f"{phase} needs engine weights, which were released: push them first"
        )
        if unneeded:
            self.resident -= unneeded
            self._release(unneeded)
        self._restore(lacking)
        self.resident |= lacking
