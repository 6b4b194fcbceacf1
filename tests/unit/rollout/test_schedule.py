"""Dealing prompts by what is known of their lengths."""

from __future__ import annotations

import numpy as np

from or1_megatron.rollout.schedule import LengthHistory, whole_groups
from or1_megatron.types import Group, Prompt, Sample


def prompt(name: str) -> Prompt:
    return Prompt(name, name, (1,), ("1",))


def group(name: str, *lengths: int) -> Group:
    mine = prompt(name)
    return Group(
        mine, [Sample(mine, i, np.ones(length), np.zeros(0), "", "stop", 0) for i, length in enumerate(lengths)]
    )


def names(shares: list[list[Prompt]]) -> list[list[str]]:
    return [[prompt.uid for prompt in share] for share in shares]


def test_unknown_prompts_are_dealt_in_turn():
    prompts = [prompt(name) for name in "abcde"]
    for policy in ("round_robin", "pending_tokens", "longest_first"):
        shares, size = LengthHistory().deal(prompts * 2, 2, 2, policy)
        assert names(shares) == [["a", "c", "e", "b", "d"], ["b", "d", "a", "c", "e"]] and size == 2


def test_known_lengths_even_the_engines_out():
    history = LengthHistory()
    history.record([group("a", 2, 4), group("b", 10, 10), group("c", 90, 110), group("d", 40, 40), group("e", 45, 45)])
    prompts = [prompt(name) for name in "abcde"]
    more = [prompt(name) for name in ("f", "g", "h")]
    for each in more:
        history.note(each.uid, 2, 2)
    assert history.expected([*prompts, prompt("new")]) == [3, 10, 100, 40, 45, 201 / 8]
    shares, size = history.deal(prompts + more, 4, 2, "longest_first")
    assert names(shares) == [["c", "h"], ["e", "d", "b", "a", "f", "g"]] and size == 4
    assert names(history.deal(prompts + more, 4, 2, "pending_tokens")[0])[1][:3] == ["b", "d", "e"]
    history.note("c", tokens=4, responses=2)  # the last visit counts
    assert history.expected(prompts)[2] == 2


def test_few_groups_are_dealt_in_pieces_and_put_together():
    prompts = [prompt(name) for name in "abc"]
    shares, size = LengthHistory().deal(prompts, 8, 5, "longest_first")
    assert len(shares) == 5 and size == 1 and sorted(sum(names(shares), [])) == ["a"] * 8 + ["b"] * 8 + ["c"] * 8
    assert all(len(share) >= 4 for share in shares)
    whole, size = LengthHistory().deal(prompts, 8, 5, "round_robin")
    assert size == 8 and names(whole) == [["a"], ["b"], ["c"], [], []]


def test_joined_groups_do_not_depend_on_who_finished_first():
    pieces = [group("a", 3), group("b", 4), group("a", 1), group("a", 2), group("b", 4), group("b", 5)]
    found = []
    for order in (pieces, pieces[::-1], pieces[3:] + pieces[:3]):
        joined = {found.prompt.uid: found for found in whole_groups(order, 3)}
        found.append([[len(sample.tokens) for sample in joined[name].samples] for name in "ab"])
        assert all([sample.index for sample in mine.samples] == [0, 1, 2] for mine in joined.values())
    assert found[0] == found[1] == found[2] and [sorted(lengths) for lengths in found[0]] == [[1, 2, 3], [4, 4, 5]]


def test_a_prompt_dealt_twice_gets_two_groups():
    whole = [group("a", 1, 2), group("b", 3, 3), group("a", 4, 5)]
    assert [len(found.samples) for found in whole_groups(whole, 2)] == [2, 2, 2]
    pieces = [group("a", length) for length in (1, 2, 4, 5)]
    assert [len(found.samples) for found in whole_groups(pieces, 2)] == [2, 2]


def test_the_two_groups_of_a_prompt_are_independent_draws():
    """Right or wrong in one token, half of the time: a group of 8 is all alike in 2 of 256 cases."""
    draw, alike = np.random.default_rng(0), 0
    for number in range(500):
        pieces = [group(f"p{number}", length) for length in draw.integers(1, 3, size=16)]
        groups = [[len(sample.tokens) for sample in found.samples] for found in whole_groups(pieces, 8)]
        alike += sum(len(set(lengths)) == 1 for lengths in groups)
        backwards = [[len(sample.tokens) for sample in found.samples] for found in whole_groups(pieces[::-1], 8)]
        assert groups == backwards
    assert 1 <= alike <= 20, alike  # 7.8 of 1,000 expected
