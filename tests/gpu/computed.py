"""What one rank computes for the tests here; importable by name, the same on the CPU and on the GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from or1_megatron.config import Config
from or1_megatron.parallel import device
from or1_megatron.parallel.packing import pack
from or1_megatron.types import MicroBatch, Sequence

ALPHA, LR, STEPS = 0.05, 1e-2, 2


def actor_facts(configs: dict[Any, Config], sequences: list[Sequence]) -> dict[Any, dict[str, Any]]:
    """Per config: log-probs, entropies, gradients, then two updates with their losses and norms, and the weights."""
    return {name: _facts(config, sequences) for name, config in configs.items()}


def _facts(config: Config, sequences: list[Sequence]) -> dict[str, Any]:
    from or1_megatron.actor.actor import MegatronActor
    from tests.parallel.ranks_actor import per_sequence, weights

    actor = MegatronActor(config, 0)
    batches = _batches(actor, sequences)
    scored = actor.log_probs(batches)
    assert scored is not None
    entropies = [replace(value, log_probs_T=value.entropy_T) for value in scored]
    num_tokens = sum(s.num_response_tokens for s in sequences)
    found = {
        "log_probs": per_sequence(scored, batches, sequences),
        "entropies": per_sequence(entropies, batches, sequences),
        "grads": dict(gradients(actor, batches, num_tokens)),
        "spared": sum(sum(batch.spared_prompts) for batch in batches),
    }
    results = [actor.update(batches, entropy_coefficient=ALPHA, num_tokens=num_tokens, lr=LR) for _ in range(STEPS)]
    found["losses"] = [result.loss for result in results if result]
    found["grad_norms"] = [result.grad_norm for result in results if result]
    found["weights"] = weights(actor)
    return device_free(found)


def _batches(actor: Any, sequences: list[Sequence]) -> list[MicroBatch]:
    """Of four neighbours each; equal prompts among them are shared where the layers can."""
    config, ids = actor.config, range(len(sequences))
    settings: dict[str, Any] = {"alignment": config.alignment, "share_prompts": actor.shares_prompts()}
    return [pack(sequences, ids[first : first + 4], **settings) for first in ids[::4]]


def gradients(actor: Any, batches: list[Any], num_tokens: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Of the loss at the current weights, under their Hugging Face names."""
    from or1_megatron.actor.model import named_entries
    from or1_megatron.parallel.layout import unshard

    actor.model.zero_grad_buffer()
    temperature = actor.config.rollout.temperature
    loss = partial(actor._loss, entropy_coefficient=ALPHA, num_tokens=num_tokens, temperature=temperature)
    actor._schedule(batches, loss, forward_only=False)
    fused_norms = device.use_transformer_engine(actor.config.model.transformer_impl, actor.config.model.dtype)
    for parameter, entry in named_entries(actor._gpt, actor.architecture, fused_norms=fused_norms):
        grad: Any = parameter.main_grad  # type: ignore[attr-defined]
        yield from ((name, tensor.clone()) for name, tensor in unshard(entry, [grad], actor.architecture))


def device_free(value: Any) -> Any:
    """The same nest of dicts and lists with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: device_free(item) for key, item in value.items()}
    return [device_free(item) for item in value] if isinstance(value, list) else value


def updates_twice(configs: dict[str, Config], sequences: list[Sequence]) -> dict[str, list[list[torch.Tensor]]]:
    """Per config: weights and moments after two updates, by two actors one after the other."""
    return {name: [_updated(config, sequences) for _ in range(2)] for name, config in configs.items()}


def _updated(config: Config, sequences: list[Sequence]) -> list[torch.Tensor]:
    from or1_megatron.actor import checkpoint
    from or1_megatron.actor.actor import MegatronActor
    from tests.parallel.ranks_actor import weights

    actor = MegatronActor(config, 0)
    batches = _batches(actor, sequences)
    for _ in range(STEPS):
        actor.update(batches, entropy_coefficient=ALPHA, num_tokens=100, lr=LR)
    state = [*weights(actor).values(), *checkpoint.state_tensors(actor.optimizer)]
    return [tensor.detach().cpu().clone() for tensor in state]


def process_facts() -> dict[str, Any]:
    """What the device seam and the process group made of this process."""
    return {
        "replaced": replaced_entries(),
        "made on cuda": torch.zeros(1, device="cuda").device.type,
        "backend": torch.distributed.get_backend(),
        "device": device.device().type,
        "collectives": collectives(),
    }


def collectives() -> dict[str, list[float]]:
    """Every collective of a step in a group of one, on this rank's device; the values that each gave."""
    here, dist = device.device(), torch.distributed
    values = torch.arange(4.0, device=here)
    summed, largest, sent = values.clone(), values.bfloat16(), values.clone()
    part, whole = torch.empty_like(values), torch.empty_like(values)
    dist.all_reduce(summed)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.reduce_scatter_tensor(part, values)
    dist.all_gather_into_tensor(whole, values)
    pieces = [torch.empty_like(values)]
    dist.all_gather(pieces, values)
    dist.broadcast(sent, src=0)
    dist.barrier()
    results = {"all_reduce": summed, "max in bf16": largest, "reduce_scatter": part, "all_gather_into": whole}
    results |= {"all_gather": pieces[0], "broadcast": sent}
    return {name: tensor.tolist() for name, tensor in results.items()}


def replaced_entries() -> list[str]:
    """Entry points that the device seam has replaced in this process: all come from its module then."""
    cuda: Any = torch.cuda
    entries: dict[str, Any] = {
        **{name: getattr(cuda, name) for name in ("current_device", "device_count", "synchronize", "Stream", "Event")},
        **{name: getattr(cuda, name) for name in ("get_rng_state", "set_rng_state", "manual_seed", "_lazy_call")},
        **{name: getattr(torch.distributed, name) for name in ("reduce_scatter_tensor", "all_gather_into_tensor")},
        "Tensor.cuda": torch.Tensor.cuda,
        "Module.cuda": torch.nn.Module.cuda,
    }
    host_types = [name for name in ("FloatTensor", "BFloat16Tensor") if getattr(cuda, name) is getattr(torch, name)]
    seam = [name for name, entry in entries.items() if getattr(entry, "__module__", "") == device.__name__]
    host_rng = [name for name in ("manual_seed",) if entries[name] is torch.manual_seed]
    modes = ["TorchFunctionMode"] if torch.overrides._get_current_function_mode() is not None else []
    return sorted({*seam, *host_types, *host_rng, *modes})


def tiny_sections(directory: Path) -> None:
    """Every section of the GPU benchmarks, one file each, with sizes for a CPU."""
    from benchmarks.gpu.ceilings import Ceilings
    from benchmarks.gpu.section import SECTIONS, measure
    from benchmarks.gpu.sizes import TINY

    ceilings = Ceilings(bytes_per_s=1e9, flops=1e12, peak_flops=2e12)
    for name in SECTIONS:
        measure(name, TINY, ceilings, time.monotonic() + 60, directory / f"{name}.json")
