"""What the ranks of test_converted.py run."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from or1_megatron.actor.mesh import build_mesh
from or1_megatron.actor.model import build_model, named_entries
from or1_megatron.architecture import read_architecture
from or1_megatron.config import Config
from or1_megatron.parallel.dims import Dims
from or1_megatron.parallel.hf_files import HFWeights
from or1_megatron.parallel.layout import shard
from or1_megatron.sections import ModelConfig, ParallelConfig, RolloutConfig


def load_and_compare(rank: int, world_size: int, converted: Path, hf: Path, tp: int, save_to: Path | None) -> int:
    """Builds the model from `converted` and compares every parameter with the one cut straight out of `hf`.

    The number of parameters compared. With `save_to` the weights are saved there as a run would.
    """
    architecture, pp = read_architecture(converted), world_size // tp
    config = Config(
        model=ModelConfig(path=str(converted), dtype=_dtype(hf), transformer_impl="torch"),
        parallel=ParallelConfig(num_ranks=world_size, tp=tp, pp=pp),
        rollout=RolloutConfig(context_length=32),
    )
    mesh = build_mesh(Dims(tp=tp, pp=pp, dp=1), rank, seed=0, timeout_s=60)
    model = build_model(config, architecture, mesh)
    count = 0
    with HFWeights(hf, architecture) as weights:
        for parameter, entry in named_entries(model, architecture, fused_norms=False):
            expected = shard(entry, weights.read, architecture, tp=tp, rank=mesh.coordinates.tp)
            assert parameter.dtype == expected.dtype, (entry, parameter.dtype)
            assert torch.equal(parameter.data, expected), f"{entry.megatron} differs"
            count += 1
    if save_to is not None:
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(save_to))
    return count


def _dtype(hf: Path) -> str:
    with HFWeights(hf, read_architecture(hf)) as weights:
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[weights.dtypes["model.norm.weight"]]
