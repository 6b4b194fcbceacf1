"""The actor's process groups; the only reader of Megatron's parallel_state.

Everything else takes groups as arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from or1_megatron.parallel.dims import Coordinates, Dims


@dataclass(frozen=True)
class Mesh:
    """This rank's place and its groups. `coordinates` agree with Megatron's (asserted at start)."""

    rank: int
    dims: Dims
    coordinates: Coordinates
    tp_group: ProcessGroup
    cp_group: ProcessGroup
    model_group: ProcessGroup  # of this replica's tensor and pipeline ranks; member tp + dims.tp * pp

    @property
    def first_stage(self) -> bool:
        return self.coordinates.pp == 0

    @property
    def last_stage(self) -> bool:
        return self.coordinates.pp == self.dims.pp - 1


def build_mesh(dims: Dims, rank: int, seed: int, timeout_s: float) -> Mesh:
    """Creates Megatron's groups over the initialised world and seeds its generators. Collective over all ranks."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        context_parallel_size=dims.cp,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    coordinates = dims.coordinates(rank)
    theirs = Coordinates(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
    )
    assert coordinates == theirs, (coordinates, theirs)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    cp_group = parallel_state.get_context_parallel_group()
    model_group = parallel_state.get_model_parallel_group()
    assert isinstance(tp_group, ProcessGroup) and isinstance(cp_group, ProcessGroup)
    assert isinstance(model_group, ProcessGroup)
    assert model_group.rank() == coordinates.tp + dims.tp * coordinates.pp, (model_group.rank(), coordinates)
    return Mesh(rank, dims, coordinates, tp_group, cp_group, model_group)
