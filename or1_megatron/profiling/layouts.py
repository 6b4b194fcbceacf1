"""Which layouts of actor and engines are legal on so many devices, and which is the fastest. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from or1_megatron.architecture import Architecture, check_degrees
from or1_megatron.config import Config
from or1_megatron.errors import UserError
from or1_megatron.profiling.flops import Tokens
from or1_megatron.profiling.hardware import Hardware
from or1_megatron.profiling.planner import Layout, Work, costs_of, predict, update_seconds
from or1_megatron.validate import validate

ACTOR_SHARE = 0.9  # of a device's memory that an actor rank may use while the engine sleeps
SLACK = 1.05  # so near the fastest, the layout with the most replicas: what is not modelled grows with the degrees
_DEGREES = (1, 2, 4, 8)
MemoryModel = Callable[[Config, Architecture], dict[str, float]]


def legal(
    config: Config, architecture: Architecture, num_devices: int, hardware: Hardware, memory: MemoryModel
) -> Iterator[tuple[Layout, dict[str, float]]]:
    """(layout, bytes per rank by part) of every legal one, colocated: degrees that divide the model, whole replicas,
    tensor parallel within a node, and a rank that fits. `memory` is dryrun.memory_per_rank."""
    for tp in _DEGREES:
        for cp in _DEGREES:
            for pp in _DEGREES:
                if num_devices % (tp * cp * pp):
                    continue
                parallel = dataclasses.replace(config.parallel, num_ranks=num_devices, tp=tp, pp=pp, cp=cp)
                widened = dataclasses.replace(config, parallel=parallel)
                try:
                    check_degrees(architecture, tp=tp, pp=pp)
                    validate(widened)
                except UserError:
                    continue
                parts = memory(widened.widest(), architecture)
                if tp <= hardware.devices_per_node and sum(parts.values()) <= ACTOR_SHARE * hardware.memory:
                    layout = Layout(
                        num_devices, tp, pp, cp, recompute=config.model.recompute == "full",
                        token_budget=widened.widest().token_budget,
                    )  # fmt: skip
                    yield layout, parts


def engine_degrees(architecture: Architecture, hardware: Hardware, memory_share: float, context: int) -> list[int]:
    """Devices of one engine that hold the weights and at least the longest sequence."""
    found = []
    for tp in _DEGREES:
        layout = Layout(tp, engine_tp=tp, memory_share=memory_share)
        cache = costs_of(architecture, layout, hardware).decode.cache_tokens
        if architecture.num_heads % tp == 0 and tp <= hardware.devices_per_node and cache > context:
            found.append(tp)
    return found


def best(
    config: Config,
    architecture: Architecture,
    context: int,
    num_devices: int,
    hardware: Hardware,
    memory: MemoryModel,
    memory_share: float,
) -> tuple[Layout, dict[str, float]]:
    """The actor's layout with the fastest update and engines of as few devices as hold model and context; bytes per
    rank by part.

    Raises UserError when none is legal.
    """
    possible = list(legal(config, architecture, num_devices, hardware, memory))
    engines = [tp for tp in engine_degrees(architecture, hardware, memory_share, context) if num_devices % tp == 0]
    if not possible or not engines:
        what = "actor" if not possible else "engine"
        raise UserError(
            f"no legal layout of the {what} on {num_devices} x {hardware.name}: it does not fit; use more GPUs, "
            "model.recompute=full or a shorter context"
        )
    tokens = Tokens([8192] * 512)  # any batch: the order of the layouts hardly depends on it
    timed = [(update_seconds(architecture, tokens, 1, layout, hardware), layout, parts) for layout, parts in possible]
    fastest = min(seconds for seconds, *_ in timed)
    close = [(layout, parts) for seconds, layout, parts in timed if seconds <= SLACK * fastest]
    actor, parts = max(close, key=lambda pair: (pair[0].dp, -pair[0].pp))
    return dataclasses.replace(actor, engine_tp=engines[0], memory_share=memory_share), parts


def helps(
    architecture: Architecture, work: Work, layout: Layout, hardware: Hardware, engines: list[int]
) -> list[tuple[str, float]]:
    """(change, seconds saved per step), the most first; each change alone."""
    costs = costs_of(architecture, layout, hardware)
    changes: list[tuple[str, Work, Layout, Hardware]] = []

    def change(what: str, *, device: Hardware = hardware, place: Layout = layout, **values: object) -> None:
        changes.append((what, dataclasses.replace(work, **values), place, device))  # type: ignore[arg-type]

    if work.policy != "longest_first":
        change("rollout.schedule=longest_first", policy="longest_first")
    if work.max_generated_factor > 1:
        change("rollout.max_generated_factor=1: no refills, fewer groups in the update", max_generated_factor=1.0)
    if work.recomputes_old_log_probs and work.num_sgd_steps == 1:
        change("loss.old_log_probs=current: no pass for them", recomputes_old_log_probs=False)
    if hardware.layer_s:
        change("an engine without launch times per layer (CUDA graphs)", device=hardware.replaced(layer_s=0.0))
    change("an engine with half the time per response", device=hardware.replaced(response_s=hardware.response_s / 2))
    change("twice the GPUs", place=dataclasses.replace(layout, num_devices=2 * layout.num_devices))
    for tp in engines:
        if tp != layout.engine_tp and layout.num_devices % tp == 0:
            change(f"engines of {tp} GPUs each", place=dataclasses.replace(layout, engine_tp=tp))
    now = predict(work, costs).total
    saved = [(what, now - predict(new, costs_of(architecture, place, device)).total)
             for what, new, place, device in changes]  # fmt: skip
    return sorted((pair for pair in saved if pair[1] > 0.005 * now), key=lambda pair: -pair[1])
