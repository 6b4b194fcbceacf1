"""Who holds the device, over all orders of calls: needs met, memory within bounds, stale engines never asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from or1_megatron.handover import ACTOR_PARTS, ENGINE_PARTS, NEEDS, Handover, Part, Phase

GB = {
    Part.ACTOR_WEIGHTS: 14.0,
    Part.GRADIENTS: 28.0,
    Part.OPTIMIZER: 21.0,
    Part.ENGINE_WEIGHTS: 14.0,
    Part.KV_CACHE: 40.0,
}
LARGEST = max(sum(GB[part] for part in parts) for parts in [*NEEDS.values(), ACTOR_PARTS])
TRAINING = [Phase.PUSH, Phase.SCORE, Phase.ROLLOUT, Phase.ROLLOUT, Phase.SCORE, Phase.UPDATE, Phase.CHECKPOINT]


class Device:
    """Counts what lies on one device; engine weights are fresh from a push until their memory is released."""

    def __init__(self) -> None:
        self.held, self.fresh, self.moves = set(ACTOR_PARTS), False, 0
        self.handover = Handover(self.release, self.restore)

    def release(self, parts: frozenset[Part]) -> None:
        assert parts and parts <= self.held
        self.held -= parts
        self.fresh &= Part.ENGINE_WEIGHTS in self.held
        self.moves += 1

    def restore(self, parts: frozenset[Part]) -> None:
        assert parts and not parts & self.held
        self.held |= parts
        self.moves += 1
        assert self.gb <= LARGEST

    @property
    def gb(self) -> float:
        return sum(GB[part] for part in self.held)

    def do(self, phase: Phase) -> None:
        self.handover.enter(phase)
        assert NEEDS[phase] <= self.held == self.handover.resident
        self.fresh |= phase is Phase.PUSH
        assert phase is not Phase.ROLLOUT or self.fresh


@given(st.lists(st.sampled_from(Phase), max_size=30))
def test_any_order_is_safe_or_refused_without_a_move(phases: list[Phase]) -> None:
    device = Device()
    for phase in phases:
        held, moves, fresh = set(device.held), device.moves, device.fresh
        if phase is Phase.ROLLOUT and not fresh:
            with pytest.raises(AssertionError, match="push them first"):
                device.do(phase)
            assert (device.held, device.moves) == (held, moves)
        else:
            device.do(phase)


def test_a_step_never_holds_both_sides_in_full_and_fifty_end_where_they_began() -> None:
    device = Device()
    levels = []
    for _ in range(50):
        for phase in TRAINING:
            device.do(phase)
            assert not (device.held >= ACTOR_PARTS or device.held >= ENGINE_PARTS) or not (
                device.held & ACTOR_PARTS and device.held & ENGINE_PARTS
            )
        levels.append((device.gb, frozenset(device.held)))
    assert set(levels) == {levels[0]}


def test_what_is_there_is_not_moved() -> None:
    device = Device()
    for phase in (Phase.UPDATE, Phase.CHECKPOINT, Phase.SCORE, Phase.UPDATE):
        device.do(phase)
    assert device.moves == 0
    device.do(Phase.PUSH)
    before = device.moves
    device.do(Phase.SCORE)
    assert device.moves == before


def test_a_checkpoint_has_the_optimizer_and_an_update_all_of_the_actor() -> None:
    device = Device()
    device.do(Phase.PUSH)
    device.do(Phase.CHECKPOINT)
    assert {Part.ACTOR_WEIGHTS, Part.OPTIMIZER} <= device.held
    device.do(Phase.UPDATE)
    assert device.held >= ACTOR_PARTS
