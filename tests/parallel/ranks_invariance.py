"""What the ranks of test_invariance.py run: two optimizer steps in each of many layouts, compared with a reference."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from or1_megatron.actor import attention, checkpoint
from or1_megatron.actor.actor import MegatronActor
from or1_megatron.actor.held import Held
from or1_megatron.actor.mesh import Mesh
from or1_megatron.config import Config
from or1_megatron.parallel import context
from or1_megatron.parallel.packing import pack, plan, unpack_response_values
from or1_megatron.recipe import from_tree
from or1_megatron.types import MicroBatch, Sequence, TokenValues
from tests.parallel.ranks_actor import weights

STEPS, ALPHA, LR, EPS = 2, 0.05, 3e-3, 1e-2
LONGEST = 64
TEMPERATURE = 2.0
WHOLE_BATCH = 1024  # a token budget that holds all sequences


@dataclass(frozen=True)
class Layout:
    """What an actor is built for."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    recompute: str = "none"
    head: str = "fused"

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def config(self, model: str) -> Config:
        degrees = {"num_ranks": self.num_ranks, "tp": self.tp, "pp": self.pp, "cp": self.cp}
        tree = {
            "model": {"path": model, "dtype": "fp32", "recompute": self.recompute},
            "parallel": {**degrees, "token_budget": WHOLE_BATCH},
            "rollout": {"context_length": LONGEST, "temperature": TEMPERATURE},
            # eps of the gradients' size: the step is then a smooth function of the gradient. With 1e-8 it is its
            # sign, and where a gradient is all rounding, so would the difference of two layouts be.
            "optimizer": {"eps": EPS},
            "loss": {"head": self.head},
        }
        return from_tree([("test", tree)])


@dataclass(frozen=True)
class Packing:
    """`planned`: by plan(). `dealt`: sequence i to rank i mod dp whatever its length, shortest micro-batch first, so
    that ranks differ in work and some have micro-batches of padding only. `shared`: neighbours stay together, and
    those with one prompt share it."""

    name: str
    token_budget: int

    def micro_batches(self, lengths: list[int], config: Config) -> tuple[tuple[tuple[int, ...], ...], ...]:
        settings: dict[str, Any] = {"token_budget": self.token_budget, "alignment": config.alignment}
        if self.shares_prompts:
            size = -(-len(lengths) // config.dp)
            ranks = [self._filled(range(len(lengths))[start : start + size], lengths, config.alignment)
                     for start in range(0, size * config.dp, size)]  # fmt: skip
            return tuple(batches + ((),) * (max(map(len, ranks)) - len(batches)) for batches in ranks)
        if self.name == "planned":
            return plan(lengths, num_ranks=config.dp, linear_work=100.0, **settings).micro_batches
        dealt = [range(len(lengths))[rank :: config.dp] for rank in range(config.dp)]
        alone = [plan([lengths[i] for i in mine], num_ranks=1, linear_work=0.0, **settings) for mine in dealt]
        counts = [len(one.micro_batches[0]) for one in alone]
        return tuple(
            tuple(tuple(mine[k] for k in batch) for batch in reversed(one.micro_batches[0]))
            + ((),) * (max(counts) - len(one.micro_batches[0]))
            for mine, one in zip(dealt, alone, strict=True)
        )

    @property
    def shares_prompts(self) -> bool:
        return self.name == "shared"

    def possible(self, layout: Layout) -> bool:
        return layout.cp == 1 or not self.shares_prompts

    def _filled(self, mine: range, lengths: list[int], alignment: int) -> tuple[tuple[int, ...], ...]:
        batches: list[list[int]] = [[]]
        for i in mine:
            if sum(lengths[j] + alignment for j in [*batches[-1], i]) > self.token_budget:
                batches.append([])
            batches[-1].append(i)
        return tuple(map(tuple, batches))


@dataclass
class Outcome:
    """What one rank knows after the two steps. Losses are shares to be added; the others are the whole quantity."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    log_probs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # (step, sequence)
    entropies: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    num_batches: int = 0
    num_empty: int = 0
    num_spared: int = 0  # tokens of shared prompts


def two_steps(actor: MegatronActor, packing: Packing, sequences: list[Sequence], *, num_tokens: int) -> Outcome:
    chosen = packing.micro_batches([len(s.tokens) for s in sequences], actor.config)[actor.mesh.coordinates.dp]
    settings: dict[str, Any] = {"alignment": actor.config.alignment, "share_prompts": packing.shares_prompts}
    batches = [pack(sequences, ids, **settings) for ids in chosen]
    outcome = Outcome(num_batches=len(batches), num_empty=sum(not ids for ids in chosen))
    outcome.num_spared = sum(sum(batch.spared_prompts) for batch in batches)
    for step in range(STEPS):
        result = actor.update(batches, entropy_coefficient=ALPHA, num_tokens=num_tokens, lr=LR)
        if result is None:
            continue
        outcome.losses.append(result.loss)
        outcome.grad_norms.append(result.grad_norm)
        outcome.log_probs |= _per_sequence(step, batches, result.values, sequences, "log_probs_T")
        outcome.entropies |= _per_sequence(step, batches, result.values, sequences, "entropy_T")
    outcome.weights = weights(actor)
    return outcome


def _per_sequence(
    step: int, batches: list[MicroBatch], values: list[TokenValues], sequences: list[Sequence], quantity: str
) -> dict[tuple[int, int], torch.Tensor]:
    rows = {}
    for batch, value in zip(batches, values, strict=True):
        pieces = unpack_response_values(getattr(value, quantity), batch, sequences)
        rows |= {(step, i): torch.from_numpy(p.copy()) for i, p in zip(batch.sequence_ids, pieces, strict=True)}
    return rows


def response_tokens(sequences: list[Sequence]) -> int:
    return sum(len(s.tokens) - s.num_prompt_tokens for s in sequences)


def reference(rank: int, world_size: int, model: str, sequences: list[Sequence]) -> Outcome:
    """One process, one micro-batch."""
    actor = MegatronActor(Layout().config(model), rank)
    return two_steps(actor, Packing("planned", WHOLE_BATCH), sequences, num_tokens=response_tokens(sequences))


@dataclass
class Compared:
    """One rank's part of a comparison; see test_invariance.deviations.

    Deviations are largest differences over largest magnitudes: of the batch, and of each tensor of weights.
    """

    losses: list[float]
    grad_norms: list[float]
    deviations: dict[str, float]
    seen: list[tuple[int, int]]
    names: list[str]
    num_batches: int
    num_empty: int
    num_spared: int


def compare(found: Outcome, expected: Outcome) -> Compared:
    deviations = {
        "log-probs": _largest_difference(found.log_probs, expected.log_probs),
        "entropy": _largest_difference(found.entropies, expected.entropies),
        "weights": max(
            (_relative(tensor, expected.weights[name]) for name, tensor in found.weights.items()), default=0
        ),
    }
    return Compared(
        found.losses,
        found.grad_norms,
        deviations,
        list(found.log_probs),
        list(found.weights),
        found.num_batches,
        found.num_empty,
        found.num_spared,
    )


def _largest_difference(found: dict, expected: dict) -> float:
    differences = [float((found[key] - expected[key]).abs().max()) for key in found]
    return max(differences, default=0.0) / max(float(values.abs().max()) for values in expected.values())


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def all_layouts(
    rank: int,
    world_size: int,
    model: str,
    layouts: list[Layout],
    packings: list[Packing],
    sequences: list[Sequence],
    expected: Outcome,
) -> list[list[Compared]]:
    """Per layout and packing. One launch for many layouts: starting ranks costs more than their work."""
    rows = []
    for layout in layouts:
        actor = MegatronActor(layout.config(model), rank)
        start = [parameter.detach().clone() for parameter in actor.model.parameters()]
        row = []
        for packing in filter(lambda packing: packing.possible(layout), packings):
            _restart(actor, start)
            found = two_steps(actor, packing, sequences, num_tokens=response_tokens(sequences))
            row.append(compare(found, expected))
        rows.append(row)
    return rows


def _restart(actor: MegatronActor, start: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(actor.model.parameters(), start, strict=True):
            parameter.copy_(value)
    actor.optimizer.reload_model_params()
    checkpoint.initialise_state(actor.optimizer)


def with_fault(
    rank: int,
    world_size: int,
    model: str,
    layout: Layout,
    packing: Packing,
    sequences: list[Sequence],
    expected: Outcome,
    fault: str,
) -> Compared:
    """The same with a mistake made on purpose."""
    num_tokens = response_tokens(sequences)
    with FAULTS[fault]():
        actor = MegatronActor(layout.config(model), rank)
        if fault == "local denominator":
            mine = packing.micro_batches([len(s.tokens) for s in sequences], actor.config)[actor.mesh.coordinates.dp]
            num_tokens = response_tokens([sequences[i] for i in itertools.chain(*mine)])
        return compare(two_steps(actor, packing, sequences, num_tokens=num_tokens), expected)


def _shift_labels_after_the_cut() -> Any:
    """The last token of a chunk then predicts whatever comes next on its own rank."""

    def of(batch: MicroBatch, mesh: Mesh) -> Held:
        held = honest(batch, mesh)
        labels_R = held.tokens.tokens_T.roll(-1)[held.rows_R]
        return replace(held, predicting=replace(held.predicting, labels_T=labels_R))

    honest = Held.of
    return mock.patch.object(Held, "of", of)


def _hide_shared_prompts() -> Any:
    """Responses see themselves only."""
    return mock.patch.object(attention, "_seen", attention._of_runs)


def _keep_key_value_gradients_local() -> Any:
    """Each rank keeps the gradient that its own queries cause to its own keys and values."""

    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad_T.index_select(0, ctx.part.held_t), None, None

    return mock.patch.object(context._Gather, "backward", staticmethod(backward))


@contextlib.contextmanager
def _reduce_weight_gradients_over_dp_only() -> Iterator[None]:
    honest = parallel_state.get_data_parallel_group

    def without_context_parallel(*_: Any, **__: Any) -> Any:
        return honest()

    with mock.patch.object(parallel_state, "get_data_parallel_group", without_context_parallel):
        yield


FAULTS = {
    "none": contextlib.nullcontext,
    "local denominator": contextlib.nullcontext,
    "labels shifted after the cut": _shift_labels_after_the_cut,
    "key and value gradients not reduced": _keep_key_value_gradients_local,
    "shared prompts not seen": _hide_shared_prompts,
    "weight gradients not reduced over cp": _reduce_weight_gradients_over_dp_only,
}
