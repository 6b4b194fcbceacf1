"""Which GPU every rank and engine gets. Pure.

Ranks fill the nodes in order, so that neighbours (a tensor-parallel group above all) share a node as long as they can.
Engines with GPUs of their own fill those that follow; colocated ones are spread evenly over the ranks' GPUs, or the
ranks over the engines' where there are more engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from or1_megatron.errors import UserError


@dataclass(frozen=True)
class Placement:
    """`ranks[i]` and `engines[i]` are indices of nodes; the shares are GPUs of one process (0 without any)."""

    ranks: tuple[int, ...]
    engines: tuple[int, ...]
    rank_share: float
    engine_share: float
    colocated: bool
    engine_devices: tuple[tuple[int, ...], ...] = ()  # GPUs of its node that each engine is told; empty: Ray's choice

    def nodes(self, kind: str) -> tuple[int, ...]:
        return {"rank": self.ranks, "engine": self.engines}[kind]

    def share(self, kind: str) -> float:
        return {"rank": self.rank_share, "engine": self.engine_share}[kind]


def place(gpus_per_node: list[int], *, ranks: int, engines: int, wanted: str, engine_tp: int = 1) -> Placement:
    """Nodes and shares; `wanted` is rollout.placement. Raises UserError when there are too few GPUs.

    Without any GPU processes are dealt to the nodes in turn. Two of the larger shares do not fit on one GPU, a larger
    and a smaller one fill it: with the larger there first, each of the more numerous kind has a GPU of its own and each
    of the others joins one of them. Ray gives no fractions of several GPUs: colocated engines of more than one are told
    their devices, whole groups of a node's, and Ray counts the ranks alone.
    """
    gpus, needed = sum(gpus_per_node), engines * engine_tp
    of_engines = f"{engines} engines" if engine_tp == 1 else f"{engines} engines of {engine_tp} GPUs"
    if 0 < gpus < max(ranks, needed):
        raise UserError(f"parallel.num_ranks={ranks} and {of_engines} need more than the {gpus} GPUs there are")
    if wanted == "separate" and 0 < gpus < ranks + needed:
        raise UserError(f"rollout.placement=separate needs {ranks + needed} GPUs, there are {gpus}; use colocated")
    colocated = ranks > 0 and (wanted == "colocated" or (wanted == "auto" and 0 < gpus < ranks + needed))
    if gpus == 0:
        nodes = [i % len(gpus_per_node) for i in range(ranks + engines)]
        return Placement(tuple(nodes[:ranks]), tuple(nodes[ranks:]), 0, 0, colocated)
    slots = [node for node, count in enumerate(gpus_per_node) for _ in range(count)]
    if engine_tp > 1:
        taken = 0 if colocated else ranks
        groups = _groups(slots[taken:], gpus_per_node, engine_tp)
        if len(groups) < engines:
            raise UserError(f"{of_engines} need as many groups of GPUs on one node, there are {len(groups)}")
        chosen = _spread(groups, engines, len(groups)) if colocated else groups[:engines]
        nodes = tuple(node for node, _ in chosen)
        if not colocated:
            return Placement(tuple(slots[:ranks]), nodes, 1, engine_tp, False)
        devices = tuple(group for _, group in chosen)
        return Placement(_spread(slots, ranks, len(slots)), nodes, 1, 0, True, devices)
    if not colocated:
        return Placement(tuple(slots[:ranks]), tuple(slots[ranks : ranks + engines]), 1, 1, False)
    most = max(ranks, engines)
    shares = (0.6, 0.4) if ranks >= engines else (0.4, 0.6)
    return Placement(_spread(slots, ranks, most), _spread(slots, engines, most), *shares, True)


def _groups(slots: list[int], gpus_per_node: list[int], size: int) -> list[tuple[int, tuple[int, ...]]]:
    """(node, devices) of as many groups of `size` GPUs as the free slots hold; the last GPUs of a node are the free."""
    groups = []
    for node, count in enumerate(gpus_per_node):
        first = count - slots.count(node)
        starts = range(first, count - size + 1, size)
        groups += [(node, tuple(range(start, start + size))) for start in starts]
    return groups


def _spread(slots: Sequence[Any], number: int, most: int) -> tuple[Any, ...]:
    return tuple(slots[i * most // number] for i in range(number))
