"""When the actor is given packs with shared prompts."""

from __future__ import annotations

import pytest

from or1_megatron.recipe import from_tree
from or1_megatron.update import shares_prompts


@pytest.mark.parametrize(
    ("parallel", "shares"),
    [
        ({"num_ranks": 1}, True),
        ({"share_prompts": False}, False),
        ({"num_ranks": 2, "cp": 2}, False),
        ({"num_ranks": 2, "tp": 2}, True),
    ],
)
def test_prompts_are_shared_unless_switched_off_or_cut(parallel: dict, shares: bool) -> None:
    tree = {"model": {"path": "model", "transformer_impl": "torch"}, "parallel": parallel}
    assert shares_prompts(from_tree([("test", tree)])) == shares
