"""Saving and restoring an actor through Megatron's dist_checkpointing: loadable at any tp, pp and dp.

Holds the mends that torch's AdamW needs inside Megatron's distributed optimizer; with TransformerEngine's or
apex's fused Adam they find nothing to do:

- its state must exist before the first step, for saving and for loading (`initialise_state`);
- its per-parameter `step` is not part of the sharded state, and the loader asks for it (`_keep_step_while_loading`);
- after loading, all parameters share one `step` tensor (`parallel.device.own_optimizer_steps`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from or1_megatron.actor.mesh import Mesh
from or1_megatron.errors import UserError
from or1_megatron.parallel.device import has_cuda, own_optimizer_steps

# Without GPUs all ranks share one host's memory: gather the state on replica 0 only instead of on every rank.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": not has_cuda(),
}


def _parts(optimizer: Any) -> list[Any]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def initialise_state(optimizer: Any) -> None:
    """Zero moments and step 0 for torch's AdamW, which otherwise creates them at its first step."""
    for part in _parts(optimizer):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _keep_step_while_loading(part: Any) -> None:
    """The loader copies every key of a parameter's state from the checkpoint; `step` comes from the param groups."""
    copy_states = part._set_main_param_and_optimizer_states

    def copy_states_and_step(model_param: Any, tensors: dict[str, Any]) -> None:
        current = part._get_main_param_and_optimizer_states(model_param)
        copy_states(model_param, {**({"step": current["step"]} if "step" in current else {}), **tensors})

    part._set_main_param_and_optimizer_states = copy_states_and_step


def _sharded(model: Any, optimizer: Any, mesh: Mesh, *, is_loading: bool) -> dict[str, Any]:
    weights = model.sharded_state_dict(metadata=_METADATA)
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_METADATA),
    }
    here, dims = mesh.coordinates, mesh.dims
    generators = {"torch": torch.get_rng_state(), "tracker": _tracker().get_states()}
    key = f"generators.tp{dims.tp}-pp{dims.pp}-dp{dims.dp}"  # other degrees have other generators: not restored
    shape, place = (dims.pp, dims.tp, dims.dp), (here.pp, here.tp, here.dp)
    state["generators"] = ShardedObject(key, generators, shape, place, replica_id=0)
    return state


def save(directory: Path, model: Any, optimizer: Any, mesh: Mesh) -> None:
    """Collective; `directory` exists and is empty."""
    dist_checkpointing.save(_sharded(model, optimizer, mesh, is_loading=False), str(directory))


def load(directory: Path, model: Any, optimizer: Any, mesh: Mesh) -> None:
    """Collective. Raises UserError when `directory` is not a readable checkpoint."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise UserError(f"{directory} is not a checkpoint of a run; give the run folder to --resume")
    for part in _parts(optimizer):
        _keep_step_while_loading(part)
    wanted = _sharded(model, optimizer, mesh, is_loading=True)
    if not _holds_generators(directory, wanted["generators"].key):
        del wanted["generators"]
    loaded: Any = dist_checkpointing.load(wanted, str(directory))
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    for part in _parts(optimizer):
        own_optimizer_steps(part.optimizer)
    if "generators" in loaded:
        torch.set_rng_state(loaded["generators"]["torch"])
        _tracker().set_states(loaded["generators"]["tracker"])


def _tracker() -> Any:
    return get_cuda_rng_tracker()


def _holds_generators(directory: Path, key: str) -> bool:
    return any(name.startswith(key) for name in load_sharded_metadata(str(directory)))
