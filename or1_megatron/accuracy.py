"""What a set of scored responses says about a model: avg@n, the unbiased pass@k and their uncertainty (8.1).

    avg@n  = mean over problems of c / n                     c of a problem's n responses are correct
    pass@k = mean over problems of 1 - C(n-c, k) / C(n, k)   the chance that one of k responses is correct

Problems are what an accuracy is uncertain about: the responses to one problem stand or fall together. The interval is
the percentile bootstrap over problems, 95 %, from 10,000 resamples of a fixed seed. It has no width where all problems
agree, and says nothing about problems of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from or1_megatron.types import Group

_NUM_RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean over problems with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """All responses to one problem."""

    correct: int
    lengths: tuple[int, ...]  # tokens, one per response
    truncated: int

    @property
    def num_responses(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, group: Group) -> Outcome:
        lengths = tuple(len(sample.tokens) for sample in group.samples)
        return cls(int(sum(group.rewards)), lengths, sum(group.truncated))


@dataclass(frozen=True)
class Accuracy:
    """Of one set of problems with n responses each."""

    num_problems: int
    num_samples: int  # n
    average: Estimate  # avg@n
    passing: dict[int, Estimate]  # k -> pass@k, k = 2, 4, 8 ... up to n
    length: float  # mean, tokens
    truncated: float  # share of the responses

    def lines(self) -> list[str]:
        """For people: one line an estimate, in percent."""
        named = {f"avg@{self.num_samples}": self.average, **{f"pass@{k}": e for k, e in self.passing.items()}}
        lines = [
            f"{name:8} {100 * value:6.2f} %   95 % [{100 * low:.2f}, {100 * high:.2f}]"
            for name, (value, low, high) in named.items()
        ]
        return [*lines, f"length   {self.length:6.1f} tokens, truncated {100 * self.truncated:.1f} %"]


def accuracy(outcomes: Sequence[Outcome]) -> Accuracy:
    """Of problems with the same number of responses each."""
    (n,) = {outcome.num_responses for outcome in outcomes}
    lengths = [length for outcome in outcomes for length in outcome.lengths]
    ks = [*(2**i for i in range(1, n.bit_length()) if 2**i < n), *([n] if n > 1 else [])]
    return Accuracy(
        len(outcomes),
        n,
        estimate(outcome.correct / n for outcome in outcomes),
        {k: estimate(pass_at_k(n, outcome.correct, k) for outcome in outcomes) for k in ks},
        sum(lengths) / len(lengths),
        sum(outcome.truncated for outcome in outcomes) / len(lengths),
    )


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k responses is right, estimated without bias from n of which `correct` are."""
    assert k <= n, (k, n)
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and bootstrap interval of one value per problem."""
    values_P = np.array(list(values))
    count, draw = len(values_P), np.random.default_rng(0)
    means = [values_P[draw.integers(count, size=(100, count))].mean(1) for _ in range(_NUM_RESAMPLES // 100)]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return Estimate(float(values_P.mean()), float(low), float(high))


def held_out(rows: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, avg@n at the first temperature) of a run's metrics. In older runs the line of a step holds the evaluation
    before it."""
    found = []
    for row in rows:
        values = [value for name, value in row.items() if name.startswith("eval/") and "avg@" in name]
        if values:
            found.append((row["step"] - ("seconds/step" in row), values[0]))
    return found
