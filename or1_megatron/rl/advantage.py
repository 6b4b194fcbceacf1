"""Group-relative advantages (2.4, 3.1): A_ij = (r_ij - mean_j r) / std_j r, one value for every token of response j."""

from __future__ import annotations

import math
from collections.abc import Sequence


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Advantages of one group; std is the unbiased one (ddof = 1), as in the released code.

    All rewards equal: exactly 0 for all.
    """
    assert len(rewards) >= 2, rewards
    mean = sum(rewards) / len(rewards)
    variance = sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    return [(reward - mean) / math.sqrt(variance) for reward in rewards]
