"""Rejection sampling (3.1): a group whose rewards are all equal has no advantage and is dropped whole."""

from __future__ import annotations

from or1_megatron.rl.advantage import group_advantages
from or1_megatron.types import Group


def is_informative(group: Group, mask: str = "none") -> bool:
    """Whether any response of the group has a non-zero advantage under this mask for truncated responses."""
    return any(group_advantages(group.rewards, group.truncated, mask=mask))


def refill_size(*, kept: int, wanted: int, generated: int, limit: int) -> int:
    """How many more prompts to roll out: the missing ones, never beyond `limit` generated prompts in all.

    At most all of them turn out informative, so exactly the missing number can never leave a surplus. A surplus
    would have to be thrown away, unpaid rollout time, or trained on a step later, off-policy.
    """
    return max(0, min(wanted - kept, limit - generated))
