"""What can be refused before a process is started: model, problems and the packages they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from or1_megatron.architecture import Architecture, check_degrees, read_architecture
from or1_megatron.boards import check_boards
from or1_megatron.cluster import check_host
from or1_megatron.cluster.joining import address_to_join
from or1_megatron.config import Config
from or1_megatron.data.prompts import Difficulty, check_names, load_prompts, load_tokenizer
from or1_megatron.errors import UserError
from or1_megatron.parallel.device import has_cuda, use_transformer_engine
from or1_megatron.parallel.megatron_files import open_weights
from or1_megatron.types import Prompt
from or1_megatron.validate import divisors

_PROCESS_BYTES = 200e6  # what a rank that has only imported has for itself; an engine has more


@dataclass(frozen=True)
class Inputs:
    """What a run is made from."""

    architecture: Architecture
    sources: list[list[Prompt]]  # problems per weighted source; without weights all are one
    held_out: list[Prompt]


def check_model(config: Config) -> Architecture:
    """Whether engines can run it: degree, context, readable weights. Raises UserError."""
    architecture = read_architecture(config.model.path)
    if architecture.num_heads % config.rollout.engine_tp:
        raise UserError(
            f"rollout.engine_tp={config.rollout.engine_tp} does not divide the model's {architecture.num_heads} "
            f"attention heads; use {divisors(architecture.num_heads)}"
        )
    contexts = [stage.rollout.context_length for stage in config.all_stages()]
    if max(contexts) > architecture.max_positions:
        raise UserError(
            f"rollout.context_length={max(contexts)} is above the model's max_position_embeddings="
            f"{architecture.max_positions}; use at most that"
        )
    with open_weights(Path(config.model.path), architecture):
        pass  # opening them is the check
    _check_memory("rollout.num_engines", config.rollout.num_engines, _weight_bytes(architecture, config.engine_dtype))
    return architecture


def _weight_bytes(architecture: Architecture, dtype: str) -> int:
    return (4 if dtype == "fp32" else 2) * architecture.num_parameters


def _check_memory(name: str, number: int, weight_bytes: float) -> None:
    """Without GPUs, processes of this host share its memory. Refused is what cannot be even without caches, gradients
    and activations; where Ray is joined, its nodes have the processes."""
    needed, there = number * (weight_bytes + _PROCESS_BYTES), psutil.virtual_memory().total + psutil.swap_memory().total
    if needed > there and not has_cuda() and not address_to_join():
        raise UserError(
            f"{name}={number} needs {needed / 1e9:.1f} GB for weights and processes alone, this machine has "
            f"{there / 1e9:.1f} GB of memory; use fewer, or a smaller model"
        )


def check_inputs(config: Config) -> Inputs:
    """Reads them; raises UserError for everything that can be refused before a process is started."""
    architecture = check_model(config)
    parallel = config.parallel
    check_degrees(architecture, tp=parallel.tp, pp=parallel.pp)
    shard_bytes = _weight_bytes(architecture, config.model.dtype) / (parallel.tp * parallel.pp)
    _check_memory("parallel.num_ranks", parallel.num_ranks, shard_bytes)
    check_host(config)
    use_transformer_engine(config.model.transformer_impl, config.model.dtype)
    check_boards(config)
    if config.profiling.tool == "nsys" and not has_cuda():
        raise UserError("profiling.tool=nsys needs a CUDA device, there is none here; use torch")
    tokenizer = load_tokenizer(config.model.path, architecture)
    if not config.data.train:
        raise UserError("data.train is empty; name at least one problem file")
    check_names(config.data.train)
    context, suffix = min(stage.rollout.context_length for stage in config.all_stages()), config.data.instruction_suffix
    files = [[name] for name in config.data.train] if config.data.weights else [config.data.train]
    data = config.data
    wanted = Difficulty(data.difficulty_model, *data.difficulty_range) if data.difficulty_model else None
    sources = [
        load_prompts(some, tokenizer, context_length=context, instruction_suffix=suffix, wanted=wanted)
        for some in files
    ]
    held_out = load_prompts(config.evaluation.files, tokenizer, context_length=context, instruction_suffix=suffix)
    return Inputs(architecture, sources, held_out)
