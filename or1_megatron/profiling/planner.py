"""Seconds of one training step before it is run: rollout, policy update and others, as in Tables 7 and 8.

rollout  simulated, see profiling/decoding.py
update   forward and backward FLOPs of the kept responses, times 4/3 with full recomputation, over
         (devices x peak x train_efficiency); the pipeline's bubble and what tensor, context and data parallelism
         move, by bytes over link or network; and a constant per optimizer step
others   pushing the weights, old log-probs where they are recomputed, and a constant and a share per response for
         scoring and for moving data through the driver. Scoring that overlaps with decoding hides behind it: what
         is left of it is the share of the responses that end last. Packing that does not overlap: a time per token.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from or1_megatron.architecture import Architecture
from or1_megatron.parallel.bundles import bundle_limit, bundles
from or1_megatron.profiling.decoding import DecodeModel, RolloutTime, decode_model, simulate_rollout
from or1_megatron.profiling.flops import Tokens, forward_flops, training_flops
from or1_megatron.profiling.hardware import Hardware
from or1_megatron.profiling.lengths import Lengths
from or1_megatron.rl.filter import refill_size

DRAWS = 4
_OVERLAP_REST = 0.05  # of the scoring: that of the responses that end last


@dataclass(frozen=True)
class Work:
    """What one training step has to do. Tokens and prompts."""

    rollout_batch_size: int  # D_R
    group_size: int
    context_length: int
    num_sgd_steps: int
    lengths: Lengths
    kept_share: float  # of the groups, after rejection
    recomputes_old_log_probs: bool
    overlaps_scoring: bool
    overlaps_packing: bool = True
    prompt_tokens: int = 128
    max_response_length: int = 0  # 0: what the context leaves
    policy: str = "round_robin"  # how prompts are dealt to the engines
    max_generated_factor: float = 1.0  # refill bound; each refill is a rollout of its own
    shares_prompts: bool = False  # in the actor, where its context is not cut
    num_reuse: int = 1  # N_reuse
    token_budget: int = 0  # of a micro-batch; 0: the context length

    @property
    def num_mini_batches(self) -> int:
        """D_R / D_T."""
        return self.num_sgd_steps // self.num_reuse


@dataclass(frozen=True)
class Layout:
    """Where it is done. tp, pp, cp: the actor's; engine_tp: devices of one engine."""

    num_devices: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    engine_tp: int = 1
    recompute: bool = True
    token_budget: int = 0  # of a micro-batch; 0: the context length
    memory_share: float = 0.8  # of a device, that an engine may use

    @property
    def dp(self) -> int:
        return self.num_devices // (self.tp * self.pp * self.cp)


@dataclass(frozen=True)
class StepTime:
    """Seconds; the mean of several batches."""

    rollout: float
    update: float
    sync: float
    old_log_probs: float
    scoring: float
    packing: float
    mean_engine: float  # of the rollout, until the average engine has ended
    tail: float  # of the rollout, with at most 5 % of all responses still unfinished
    preempted: float
    tokens: float  # generated

    @property
    def others(self) -> float:
        return self.sync + self.old_log_probs + self.scoring + self.packing

    @property
    def total(self) -> float:
        return self.rollout + self.update + self.others


@dataclass(frozen=True)
class Costs:
    """What a machine takes for the parts of a step; see `costs_of` and profiling/calibration.py. Seconds."""

    decode: DecodeModel
    num_engines: int
    update: Callable[[Tokens, int], float]  # in so many optimizer steps
    old_log_probs: Callable[[Tokens], float]
    sync: float
    step_s: float  # see Hardware
    scoring_s: float
    packing_s: float
    rest_s: float = 0.0  # of the rest, as measured: what no overlap hides any more
    replicas: int = 1  # of the actor
    cuts_context: bool = False  # cp > 1


def costs_of(architecture: Architecture, layout: Layout, hardware: Hardware) -> Costs:
    """From the data sheet and the achieved efficiencies."""
    return Costs(
        decode=decode_model(architecture, hardware, layout.engine_tp, layout.memory_share),
        num_engines=layout.num_devices // layout.engine_tp,
        update=lambda tokens, steps: update_seconds(architecture, tokens, steps, layout, hardware),
        old_log_probs=lambda tokens: _pass_seconds(architecture, tokens, layout, hardware),
        sync=sync_seconds(architecture, layout, hardware),
        step_s=hardware.step_s,
        scoring_s=hardware.scoring_s,
        packing_s=hardware.packing_s,
        replicas=layout.dp,
        cuts_context=layout.cp > 1,
    )


def predict(work: Work, costs: Costs, draws: int = DRAWS) -> StepTime:
    """The mean over so many batches, drawn with fixed seeds."""
    found = [_predict(work, costs, random.Random(seed)) for seed in range(draws)]
    mean = {name: sum(getattr(step, name) for step in found) / draws for name in StepTime.__dataclass_fields__}
    return StepTime(**mean)


def _predict(work: Work, costs: Costs, rng: random.Random) -> StepTime:
    room = work.context_length - work.prompt_tokens
    limit = min(room, work.max_response_length or room)
    rounds: list[RolloutTime] = []
    trained: list[list[int]] = []
    prompts = rollout_rounds(work)
    for num_prompts in prompts:
        groups = work.lengths.draw(num_prompts, work.group_size, limit, rng)
        expected = _expected(groups, rng) if work.policy in ("pending_tokens", "longest_first") else None
        settings = {"prompt_tokens": work.prompt_tokens, "policy": work.policy, "expected": expected}
        rounds.append(simulate_rollout(groups, costs.num_engines, costs.decode, **settings))
        trained += groups[: round(len(groups) * work.kept_share)]
    rollout = sum(part.seconds for part in rounds)
    scoring = costs.step_s + sum(prompts) * work.group_size * costs.scoring_s
    if work.overlaps_scoring:
        scoring = max(_OVERLAP_REST * scoring, scoring - rollout)
    scoring += costs.rest_s
    tokens = sum(part.tokens for part in rounds)
    computed = _computed(trained, work, costs)
    return StepTime(
        rollout=rollout,
        update=work.num_reuse * costs.update(computed, work.num_mini_batches) if trained else 0.0,
        sync=costs.sync,
        old_log_probs=costs.old_log_probs(computed) if work.recomputes_old_log_probs else 0.0,
        scoring=scoring,
        packing=0.0 if work.overlaps_packing else tokens * costs.packing_s,
        mean_engine=sum(part.mean_seconds for part in rounds),
        tail=sum(part.tail_seconds for part in rounds),
        preempted=sum(part.preempted for part in rounds),
        tokens=tokens,
    )


def _computed(groups: list[list[int]], work: Work, costs: Costs) -> Tokens:
    """What a pass over these groups' sequences computes."""
    lengths = [length + work.prompt_tokens for group in groups for length in group]
    spared: list[int] = []
    if work.shares_prompts and not costs.cuts_context and lengths:
        common = work.prompt_tokens - 1
        shared = [common if i else 0 for group in groups for i in range(len(group))]
        budget = work.token_budget or work.context_length
        whole = bundles(lengths, shared, most=bundle_limit(lengths, costs.replicas * work.num_mini_batches, budget))
        spared = [common] * (len(lengths) - len(whole))
    return Tokens(lengths, sum(map(sum, groups)), spared)


def rollout_rounds(work: Work) -> list[int]:
    """Prompts of the first rollout and of each refill, when kept_share of every rollout's groups are kept."""
    wanted, limit = work.rollout_batch_size, int(work.rollout_batch_size * work.max_generated_factor)
    rounds, kept, missing = [], 0.0, wanted
    while missing > 0:
        rounds.append(missing)
        kept += missing * work.kept_share
        missing = refill_size(kept=int(kept + 1e-9), wanted=wanted, generated=sum(rounds), limit=limit)
    return rounds


def _expected(groups: list[list[int]], rng: random.Random) -> list[float]:
    """What history says about each group's tokens: another group of the same prompt, here one resampled from it."""
    return [float(sum(rng.choices(group, k=len(group)))) for group in groups]


def sync_seconds(architecture: Architecture, layout: Layout, hardware: Hardware) -> float:
    """Every engine takes all weights in bf16 over the network, while another bucket is gathered inside a node."""
    return 2 * architecture.num_parameters / (layout.engine_tp * hardware.network)


def _pass_seconds(architecture: Architecture, tokens: Tokens, layout: Layout, hardware: Hardware) -> float:
    compute = forward_flops(architecture, tokens) / (
        layout.num_devices * hardware.peak_flops * hardware.train_efficiency
    )
    return compute * _bubble(tokens, layout) + _moved(architecture, tokens, 1, layout, hardware)


def update_seconds(
    architecture: Architecture, tokens: Tokens, sgd_steps: int, layout: Layout, hardware: Hardware
) -> float:
    flops = training_flops(architecture, tokens) * (4 / 3 if layout.recompute else 1)
    compute = flops / (layout.num_devices * hardware.peak_flops * hardware.train_efficiency)
    passes = 4 if layout.recompute else 3
    return (
        compute * _bubble(tokens, layout)
        + _moved(architecture, tokens, passes, layout, hardware)
        + sgd_steps * (hardware.optimizer_step_s + _gradient_seconds(architecture, layout, hardware))
    )


def _bubble(tokens: Tokens, layout: Layout) -> float:
    """(m + pp - 1) / m for the m micro-batches of a replica; a replica cannot have less than one."""
    budget = layout.token_budget or max(tokens.lengths, default=1)
    micro_batches = max(1.0, tokens.in_layers / layout.dp / budget)
    return (micro_batches + layout.pp - 1) / micro_batches


def _moved(architecture: Architecture, tokens: Tokens, passes: int, layout: Layout, hardware: Hardware) -> float:
    """Seconds of tensor and context parallel traffic: activations of each layer, keys and values of each layer.

    Tensor parallelism gathers and scatters a token's hidden state twice a layer and pass; context parallelism brings
    every rank the keys and values of the others. A group within a node moves over its links.
    """
    a, peers = architecture, layout.tp * layout.cp
    mine = tokens.in_layers / (layout.dp * layout.cp) * a.num_layers / layout.pp * passes * 2
    across = hardware.link if layout.tp <= hardware.devices_per_node else hardware.network
    hidden = mine * 4 * a.hidden_size * (layout.tp - 1) / layout.tp / across
    across = hardware.link if peers <= hardware.devices_per_node else hardware.network
    keys = mine * 2 * a.num_kv_heads * a.head_dim / layout.tp * (layout.cp - 1) / across
    return hidden + keys


def _gradient_seconds(architecture: Architecture, layout: Layout, hardware: Hardware) -> float:
    """Reduce-scatter of fp32 gradients, all-gather of bf16 weights, over the data- and context-parallel ranks."""
    peers = layout.dp * layout.cp
    across = hardware.link if layout.num_devices <= hardware.devices_per_node else hardware.network
    return 6 * architecture.num_parameters / (layout.tp * layout.pp) * (peers - 1) / peers / across
