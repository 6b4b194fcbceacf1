"""Parallel degrees -> coordinates of a rank (pure).

Megatron's order: tensor varies fastest, then data, then pipeline: rank = tp_rank + tp * (dp_rank + dp * pp_rank).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dims:
    """Degrees of one actor. `world_size` is their product."""

    tp: int
    pp: int
    dp: int

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def coordinates(self, rank: int) -> Coordinates:
        assert 0 <= rank < self.world_size, (rank, self.world_size)
        return Coordinates(rank % self.tp, rank // (self.tp * self.dp), rank // self.tp % self.dp)

    def rank(self, tp: int, pp: int, dp: int) -> int:
        return tp + self.tp * (dp + self.dp * pp)

    def reporting_ranks(self) -> list[int]:
        """One rank per data-parallel replica whose results are the replica's: last stage, first tensor rank."""
        return [self.rank(0, self.pp - 1, dp) for dp in range(self.dp)]


@dataclass(frozen=True)
class Coordinates:
    tp: int
    pp: int
    dp: int
