"""Which GPU every rank and engine gets. Pure.

Ranks fill the nodes in order, so that neighbours (a tensor-parallel group above all) share a node as long as they can.
Engines with GPUs of their own fill those that follow; colocated ones are spread evenly over the ranks' GPUs, or the
ranks over the engines' where there are more engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from or1_megatron.errors import UserError


@dataclass(frozen=True)
class Placement:
    """`ranks[i]` and `engines[i]` are indices of nodes; the shares are GPUs of one process (0 without any)."""

    ranks: tuple[int, ...]
    engines: tuple[int, ...]
    rank_share: float
    engine_share: float
    colocated: bool

    def nodes(self, kind: str) -> tuple[int, ...]:
        return {"rank": self.ranks, "engine": self.engines}[kind]

    def share(self, kind: str) -> float:
        return {"rank": self.rank_share, "engine": self.engine_share}[kind]


def place(gpus_per_node: list[int], *, ranks: int, engines: int, wanted: str) -> Placement:
    """Nodes and shares; `wanted` is rollout.placement. Raises UserError when there are too few GPUs.

    Without any GPU processes are dealt to the nodes in turn. Two of the larger shares do not fit on one GPU, a larger
    and a smaller one fill it: with the larger there first, each of the more numerous kind has a GPU of its own and each
    of the others joins one of them.
    """
    gpus = sum(gpus_per_node)
    if 0 < gpus < max(ranks, engines):
        raise UserError(f"parallel.num_ranks={ranks} and {engines} engines need more than the {gpus} GPUs there are")
    if wanted == "separate" and 0 < gpus < ranks + engines:
        raise UserError(f"rollout.placement=separate needs {ranks + engines} GPUs, there are {gpus}; use colocated")
    colocated = ranks > 0 and (wanted == "colocated" or (wanted == "auto" and 0 < gpus < ranks + engines))
    if gpus == 0:
        nodes = [i % len(gpus_per_node) for i in range(ranks + engines)]
        return Placement(tuple(nodes[:ranks]), tuple(nodes[ranks:]), 0, 0, colocated)
    slots = [node for node, count in enumerate(gpus_per_node) for _ in range(count)]
    if not colocated:
        return Placement(tuple(slots[:ranks]), tuple(slots[ranks : ranks + engines]), 1, 1, False)
    most = max(ranks, engines)
    shares = (0.6, 0.4) if ranks >= engines else (0.4, 0.6)
    return Placement(_spread(slots, ranks, most), _spread(slots, engines, most), *shares, True)


def _spread(slots: list[int], number: int, most: int) -> tuple[int, ...]:
    return tuple(slots[i * most // number] for i in range(number))
