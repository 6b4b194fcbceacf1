"""Groups that wait in a checkpoint for the next step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from or1_megatron.errors import UserError
from or1_megatron.surplus import read_groups, write_groups
from or1_megatron.types import Group, Prompt, Sample
from tests.unit.random_policy import as_lists

PROMPTS = {uid: Prompt(uid, f"{uid} =", (1, 2), ("1",)) for uid in ("a", "b")}


def group(uid: str, *lengths: int) -> Group:
    """A response of each length, one of which may be 0."""
    random = np.random.default_rng(len(lengths))

    def sample(i: int, n: int) -> Sample:
        tokens = random.integers(0, 2**31 - 1, n, dtype=np.int32)
        log_probs = random.normal(size=n).astype(np.float32)
        return Sample(PROMPTS[uid], i, tokens, log_probs, f"\N{SNOWMAN} {i}", "length", 3 + i, "correct", i / 3)

    return Group(PROMPTS[uid], [sample(i, n) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("groups", [[], [group("b", 3)], [group("a", 5, 0, 4000), group("b", 1, 2), group("a", 7)]])
def test_groups_come_back_bit_for_bit(tmp_path: Path, groups: list[Group]):
    write_groups(tmp_path / "g.npz", groups)
    back = read_groups(tmp_path / "g.npz", PROMPTS)
    assert [as_lists(one) for one in back] == [as_lists(one) for one in groups]
    for sample in (sample for one in back for sample in one.samples):
        assert sample.tokens.dtype == np.int32 and sample.log_probs.dtype == np.float32
        assert sample.tokens.flags.owndata, "one that stays does not keep all in memory"


def test_a_token_takes_eight_bytes(tmp_path: Path):
    write_groups(tmp_path / "g.npz", [group("a", 100_000)])
    assert (tmp_path / "g.npz").stat().st_size < 802_000


def test_a_problem_that_is_gone_is_named(tmp_path: Path):
    write_groups(tmp_path / "g.npz", [group("a", 2), group("b", 2)])
    with pytest.raises(UserError, match=r"g\.npz holds responses to problem b, which data\.train no longer has"):
        read_groups(tmp_path / "g.npz", {"a": PROMPTS["a"]})
