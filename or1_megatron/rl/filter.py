"""Rejection sampling (3.1): a group whose rewards are all equal has no advantage and is dropped whole."""

from __future__ import annotations

from or1_megatron.rl.advantage import group_advantages
from or1_megatron.types import Group


def is_informative(group: Group, mask: str = "none") -> bool:
    """Whether any response of the group has a non-zero advantage under this mask for truncated responses."""
    return any(group_advantages(group.rewards, group.truncated, mask=mask))


def refill_size(*, kept: int, wanted: int, generated: int, limit: int, carried: int = 0, expected: bool = False) -> int:
    """How many more prompts to roll out, never beyond `limit` generated prompts in all.

    Exactly the missing number: at most all of them turn out informative, so there is never a surplus. Or `expected`:
    as many as it takes at the share that was informative so far, which needs fewer rounds, each of which waits for its
    longest response, and leaves a surplus of at most half of `wanted`. `carried` of the kept were not generated here.
    """
    missing = wanted - kept
    if expected and generated and missing > 0:
        fresh = max(1, kept - carried)
        missing = min(-(-missing * generated // fresh), missing + wanted // 2)
    return max(0, min(missing, limit - generated))
