"""How long responses are: a log-normal law, or what a run measured.

log L = log(median) + sigma (sqrt(share) z_prompt + sqrt(1 - share) z_response), cut at the limit: some prompts are
harder than others, which is why a group's responses are alike and why history predicts something. Tokens everywhere.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol


class Lengths(Protocol):
    """A source of response lengths."""

    def draw(self, num_prompts: int, group_size: int, limit: int, rng: random.Random) -> list[list[int]]:
        """Lengths of a batch, per prompt, each at most `limit`."""
        ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class LogNormal:
    """median and sigma of the uncut law; `prompt_share` of log L's variance lies between prompts."""

    median: float
    sigma: float
    prompt_share: float

    def draw(self, num_prompts: int, group_size: int, limit: int, rng: random.Random) -> list[list[int]]:
        between = self.sigma * math.sqrt(self.prompt_share)
        inside = self.sigma * math.sqrt(1 - self.prompt_share)
        centre = math.log(self.median)
        groups = []
        for _ in range(num_prompts):
            prompt = centre + between * rng.gauss(0, 1)
            groups.append(
                [max(1, min(limit, round(math.exp(prompt + inside * rng.gauss(0, 1))))) for _ in range(group_size)]
            )
        return groups

    def describe(self) -> str:
        return (
            f"log-normal, median {self.median:.0f} tokens, sigma {self.sigma:g}, {self.prompt_share:.0%} of the "
            "variance between prompts"
        )


@dataclass(frozen=True)
class Measured:
    """Groups of response lengths that a run has had.

    A longer limit than the run's shows too few tokens: how far a cut response would have gone is not known.
    """

    groups: tuple[tuple[int, ...], ...]
    origin: str

    def draw(self, num_prompts: int, group_size: int, limit: int, rng: random.Random) -> list[list[int]]:
        return [
            [max(1, min(limit, length)) for length in rng.choices(rng.choice(self.groups), k=group_size)]
            for _ in range(num_prompts)
        ]

    def describe(self) -> str:
        count = sum(map(len, self.groups))
        mean = sum(map(sum, self.groups)) / count
        return f"{count} responses of {self.origin}, mean {mean:.0f} tokens, longest {max(map(max, self.groups))}"
