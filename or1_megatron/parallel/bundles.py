"""Which sequences of one prompt are packed together, so that it is computed once for all of them (pure)."""

from __future__ import annotations

from collections.abc import Sequence as Seq

_MOST_KEYS = 4  # per token


def bundles(lengths: Seq[int], shared: Seq[int], *, most: int) -> list[list[int]]:
    """Neighbours of one prompt, at most `most` tokens together, or one sequence alone.

    shared[i]: how many first tokens sequence i has in common with the one before it; none given: no prompt is shared.
    Attention joins the prompt's keys and values to each response's. So that a token budget still bounds memory, the
    sequences of a bundle have at most four times its tokens.
    """
    found: list[list[int]] = []
    size = keys = 0
    for i, length in enumerate(lengths):
        common = shared[i] if shared else 0
        grown = size + length - common
        if common and grown <= most and keys + length <= _MOST_KEYS * grown:
            found[-1].append(i)
            size, keys = grown, keys + length
        else:
            found.append([i])
            size = keys = length
    return found


def bundle_limit(lengths: Seq[int], num_ranks: int, token_budget: int) -> int:
    """Tokens of the largest bundle: a quarter of a micro-batch and an eighth of a rank's part, so that both can be
    filled evenly. Where responses are long a bundle is one of them, and its prompt would be a small part anyway."""
    return min(token_budget // 4, sum(lengths) // num_ranks // 8)
