"""Which engine gets which prompt, from how long the responses to it were before. Changes no distribution: on-policy.

A rollout ends when its last response does. Prompts whose responses were long go first, each to the engine with the
fewest expected tokens, so that engines end together; an unknown prompt counts as the mean of the known ones. Where
there are few groups for each engine, a group is dealt in pieces, and put together again by `whole_groups`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence

from or1_megatron.profiling.decoding import assign, piece_size
from or1_megatron.types import Group, Prompt, Sample


class LengthHistory:
    """Mean response length of each prompt when it was last rolled out, tokens."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def copy(self) -> LengthHistory:
        """As it is now, for a thread of its own."""
        twin = LengthHistory()
        twin._means = dict(self._means)
        return twin

    def record(self, groups: Iterable[Group]) -> None:
        """Groups of a step that has ended, dropped or not."""
        for group in groups:
            self.note(group.prompt.uid, sum(len(sample.tokens) for sample in group.samples), len(group.samples))

    def note(self, uid: str, tokens: int, responses: int) -> None:
        self._means[uid] = tokens / responses

    def expected(self, prompts: Sequence[Prompt]) -> list[float]:
        """Mean response length to expect of each, tokens."""
        known = sum(self._means.values()) / len(self._means) if self._means else 1.0
        return [self._means.get(prompt.uid, known) for prompt in prompts]

    def deal(
        self, prompts: Sequence[Prompt], group_size: int, num_engines: int, policy: str
    ) -> tuple[list[list[Prompt]], int]:
        """Each engine's prompts in the order in which it starts them, and how many responses it gives to each.

        With fewer than group_size of them a prompt stands there several times. Policies: see profiling/decoding.py.
        """
        size = group_size if policy == "round_robin" else piece_size(len(prompts), group_size, num_engines)
        pieces = [prompt for prompt in prompts for _ in range(group_size // size)]
        shares = assign([[1]] * len(pieces), num_engines, policy, self.expected(pieces))
        return [[pieces[i] for i in share] for share in shares], size


def whole_groups(pieces: Iterable[Group], group_size: int) -> list[Group]:
    """Groups from their pieces, which may come in any order: responses are ordered by a checksum of their tokens, so
    that the result does not depend on who finished first. A prompt that was dealt twice gets two groups, of responses
    drawn from all of its pieces: an order by tokens would put equal answers into the same group."""
    found: dict[str, list[Group]] = {}
    for piece in pieces:
        found.setdefault(piece.prompt.uid, []).append(piece)
    groups: list[Group] = []
    for uid, parts in found.items():
        if len(parts[0].samples) == group_size:
            groups += parts
            continue
        samples = sorted((sample for part in parts for sample in part.samples), key=_order)
        assert len(samples) % group_size == 0, (len(samples), group_size)
        if len(samples) > group_size:
            sums = [_order(sample)[0] for sample in samples]
            random.Random(f"{uid} {samples[0].weight_version} {sums}").shuffle(samples)
        for first in range(0, len(samples), group_size):
            mine = samples[first : first + group_size]
            for index, sample in enumerate(mine):
                sample.index = index
            groups.append(Group(parts[0].prompt, mine))
    return groups


def _order(sample: Sample) -> tuple[int, bytes]:
    tokens = sample.tokens.tobytes()
    return zlib.crc32(tokens), tokens
