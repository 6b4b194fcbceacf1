"""Group-relative advantages (2.4, 3.1): A_ij = (r_ij - mean_j r) / std_j r, one value for every token of response j.

The advantage mask for truncated responses (3.2.3): `none`, they are like any other; `before`, they are left out of mean
and std and get advantage 0; `after`, they count in mean and std and get advantage 0. That their reward is 0 is said by
reward.truncated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def group_advantages(
    rewards: Sequence[float],
    truncated: Sequence[bool] | None = None,
    *,
    mask: str = "none",
    normalise_std: bool = True,
) -> list[float]:
    """Advantages of one group; std is the unbiased one (ddof = 1), as in the released code.

    truncated: per response; None when none is. normalise_std False: r - mean only. All counted rewards equal, or
    fewer than two of them: exactly 0 for all.
    """
    assert len(rewards) >= 2, rewards
    assert mask in ("none", "before", "after"), mask
    cut = truncated if truncated is not None and mask != "none" else [False] * len(rewards)
    counted = [reward for reward, out in zip(rewards, cut, strict=True) if not (out and mask == "before")]
    if len(counted) < 2 or max(counted) == min(counted):
        return [0.0] * len(rewards)
    mean = sum(counted) / len(counted)
    variance = sum((reward - mean) ** 2 for reward in counted) / (len(counted) - 1)
    scale = math.sqrt(variance) if normalise_std else 1.0
    return [0.0 if out else (reward - mean) / scale for reward, out in zip(rewards, cut, strict=True)]
