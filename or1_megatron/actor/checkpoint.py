"""Saving and restoring an actor through Megatron's dist_checkpointing: loadable at any tp, pp and dp.

Weights and optimizer state are written by all ranks (optimizer_state.py). Holds the mends that torch's AdamW needs
inside Megatron's distributed optimizer; with TransformerEngine's or apex's fused Adam they find nothing to do:

- its state must exist before the first step, for saving and for loading (`initialise_state`);
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

from or1_megatron.actor import optimizer_state
from or1_megatron.actor.checkpoint_writer import CheckpointWriter
from or1_megatron.actor.mesh import Mesh
from or1_megatron.errors import UserError
from or1_megatron.parallel.device import own_optimizer_steps


def _part(optimizer: Any) -> Any:
    """The distributed optimizer inside Megatron's chain: a dense model has exactly one."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    assert len(parts) == 1, parts
    return parts[0]


def initialise_state(optimizer: Any) -> None:
    """Zero moments and step 0, which otherwise come into being at the first step."""
    part = _part(optimizer)
    if not isinstance(part.optimizer, torch.optim.AdamW):
        part.load_state_dict(part.state_dict())  # allocates
        for state in part.optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].zero_()
        return
    for group in part.optimizer.param_groups:
        group["fused"] = True  # one pass over each parameter, without temporaries of its size
        for parameter in group["params"]:
            part.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def state_tensors(optimizer: Any) -> list[torch.Tensor]:
    """What the optimizer alone holds: moments, and main weights where the model's are of another dtype. In float32
    the main weights are views of the model's."""
    part = _part(optimizer)
    states = [value for state in part.optimizer.state.values() for value in state.values()]
    main = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
    model = {p.untyped_storage()._cdata for group in part.model_float16_groups + part.model_fp32_groups for p in group}
    tensors = [x for x in [*states, *main] if torch.is_tensor(x) and x.numel() > 1]
    return [x for x in tensors if x.untyped_storage()._cdata not in model]


def _tracker() -> Any:
    return get_cuda_rng_tracker()


def _generators(mesh: Mesh) -> ShardedObject:
    here, dims = mesh.coordinates, mesh.dims
    generators = {"torch": torch.get_rng_state(), "tracker": _tracker().get_states()}
    # Other degrees have other generators: not restored.
    key = f"generators.tp{dims.tp}-cp{dims.cp}-pp{dims.pp}-dp{dims.dp}"
    shape, place = (dims.pp, dims.tp, dims.cp, dims.dp), (here.pp, here.tp, here.cp, here.dp)
    return ShardedObject(key, generators, shape, place, replica_id=0)


def begin_save(directory: Path, model: Any, optimizer: Any, mesh: Mesh) -> CheckpointWriter:
    """Collective; `directory` exists and is empty. The state may change as soon as this returns."""
    weights, part = model.sharded_state_dict(), _part(optimizer)
    optimizer_state.own_weights(part, weights)
    state = {
        "model": weights,
        "optimizer": part.state_dict(),
        "optimizer_state": optimizer_state.to_save(part, weights),
        "generators": _generators(mesh),
    }
    return CheckpointWriter(directory, state)


def load(directory: Path, model: Any, optimizer: Any, mesh: Mesh) -> None:
    """Collective. Raises UserError when `directory` is not a readable checkpoint."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        raise UserError(f"{directory} is not a checkpoint of a run; give the run folder to --resume")
    weights, part = model.sharded_state_dict(), _part(optimizer)
    wanted = {"model": weights, "optimizer_state": optimizer_state.to_load(part, weights)}
    generators = _generators(mesh)
    if _holds_generators(directory, generators.key):
        wanted["generators"] = generators
    loaded: Any = dist_checkpointing.load(wanted, str(directory))
    model.load_state_dict(loaded["model"])
    part.load_state_dict(loaded["optimizer"])
    own_optimizer_steps(part.optimizer)
    optimizer_state.take(part, loaded["optimizer_state"])
    if "generators" in loaded:
        torch.set_rng_state(loaded["generators"]["torch"])
        _tracker().set_states(loaded["generators"]["tracker"])


def _holds_generators(directory: Path, key: str) -> bool:
    return any(name.startswith(f"{key}/") for name in load_sharded_metadata(str(directory)))
