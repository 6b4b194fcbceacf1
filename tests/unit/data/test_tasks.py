"""The quickstart's problems: nothing leaks from train to held-out, and the rows say what the reader expects."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from or1_megatron.data.tasks import EXAMPLES, addition_pairs, split_pairs, write_addition_problems

ALL_PAIRS = [(a, b) for a in range(10) for b in range(10)]


@given(st.integers(0, 2**31), st.permutations(ALL_PAIRS))
@settings(max_examples=50, deadline=None)
def test_split_covers_all_pairs_without_leaking_a_mirror(seed, pairs):
    train, held_out = split_pairs(pairs, seed)
    assert sorted(train + held_out) == ALL_PAIRS
    for a, b in held_out:
        assert (b, a) in held_out and (a, b) not in train and (b, a) not in train
    assert not {pair for example in EXAMPLES for pair in (example, example[::-1])} & set(held_out)
    unordered = {tuple(sorted(pair)) for pair in held_out}
    assert 0.20 <= len(unordered) / 55 <= 0.25


@given(st.integers(0, 2**31), st.permutations(ALL_PAIRS))
@settings(max_examples=20, deadline=None)
def test_split_depends_on_the_seed_only(seed, shuffled):
    assert set(split_pairs(ALL_PAIRS, seed)[1]) == set(split_pairs(shuffled, seed)[1])


def test_different_seeds_hold_out_different_pairs():
    assert len({tuple(split_pairs(ALL_PAIRS, seed)[1]) for seed in range(10)}) == 10


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_generator_yields_every_pair_once(seed):
    assert sorted(addition_pairs(seed)) == ALL_PAIRS


def test_rows_of_the_files(tmp_path):
    train, held_out = tmp_path / "deep" / "train.jsonl", tmp_path / "held_out.jsonl"
    counts = write_addition_problems(train, held_out, seed=0)
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (train, held_out)]
    assert counts == (len(rows[0]), len(rows[1])) and sum(counts) == 100
    for row in rows[0] + rows[1]:
        first, second, question = row["prompt"].split("\n")
        assert (first, second) == ("2 + 5 = \\boxed{7}", "4 + 1 = \\boxed{5}")
        left, right = question.removesuffix(" =").split(" + ")
        assert row["reward_model"] == {"style": "rule", "ground_truth": str(int(left) + int(right))}
        assert row["ability"] == "math" and row["data_source"] and not row["prompt"].endswith(" ")
    assert [row["extra_info"]["index"] for row in rows[1]] == list(range(counts[1]))
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["held_out.jsonl", "train.jsonl"]

    again = write_addition_problems(tmp_path / "a", tmp_path / "b", seed=0)
    assert again == counts and (tmp_path / "b").read_text() == held_out.read_text()
