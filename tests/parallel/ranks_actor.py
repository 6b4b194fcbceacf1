"""What the ranks of test_actor.py run."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from or1_megatron.actor import checkpoint_writer
from or1_megatron.actor.actor import MegatronActor
from or1_megatron.actor.model import named_entries
from or1_megatron.config import Config
from or1_megatron.errors import RunFailure
from or1_megatron.parallel import compiler, vocab_head
from or1_megatron.parallel.bucket import unpack_bucket
from or1_megatron.parallel.layout import unshard
from or1_megatron.parallel.packing import pack, plan, unpack_response_values
from or1_megatron.types import MicroBatch, Sequence

ALPHA, LR = 0.05, 1e-2


def my_batches(actor: MegatronActor, sequences: list[Sequence]) -> list[MicroBatch]:
    config = actor.config
    layout = plan(
        [len(s.tokens) for s in sequences],
        num_ranks=config.dp,
        token_budget=config.token_budget,
        alignment=config.alignment,
        linear_work=actor.architecture.linear_work,
    )
    return [pack(sequences, ids, alignment=config.alignment) for ids in layout.micro_batches[actor.mesh.coordinates.dp]]


def per_sequence(values: list | None, batches: list[MicroBatch], sequences: list[Sequence]) -> dict[int, torch.Tensor]:
    rows: dict[int, torch.Tensor] = {}
    for value, batch in zip(values or [], batches, strict=False):
        pieces = unpack_response_values(value.log_probs_T, batch, sequences)
        rows |= {i: torch.from_numpy(piece.copy()) for i, piece in zip(batch.sequence_ids, pieces, strict=True)}
    return rows


def gradients(actor: MegatronActor, batches: list[MicroBatch], num_tokens: int) -> dict[str, torch.Tensor]:
    """This stage's gradients under their HF names, gathered over tensor ranks; whole only at dp = cp = 1."""
    actor.model.zero_grad_buffer()
    temperature = actor.config.rollout.temperature
    loss = partial(actor._loss, entropy_coefficient=ALPHA, num_tokens=num_tokens, temperature=temperature)
    actor._schedule(batches, loss, forward_only=False)
    found: dict[str, torch.Tensor] = {}
    for parameter, entry in named_entries(actor._gpt, actor.architecture, fused_norms=False):
        grad = parameter.main_grad  # type: ignore[attr-defined]
        shards = [grad]
        if actor.mesh.dims.tp > 1 and entry.arrangement != "replicated":
            shards = [torch.empty_like(grad) for _ in range(actor.mesh.dims.tp)]
            torch.distributed.all_gather(shards, grad.contiguous(), group=actor.mesh.tp_group)
        found |= {name: tensor.clone() for name, tensor in unshard(entry, shards, actor.architecture)}
    return found


def weights(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in actor.weights.buckets(1 << 16) for name, tensor in unpack_bucket(bucket)}


def one_step(rank: int, world_size: int, config: Config, sequences: list[Sequence], steps: int = 1) -> dict[str, Any]:
    actor = MegatronActor(config, rank)
    batches = my_batches(actor, sequences)
    num_tokens = sum(len(s.tokens) - s.num_prompt_tokens for s in sequences)
    before = per_sequence(actor.log_probs(batches), batches, sequences)
    grads = gradients(actor, batches, num_tokens) if config.dp == config.parallel.cp == 1 else {}
    results = [actor.update(batches, entropy_coefficient=ALPHA, num_tokens=num_tokens, lr=LR) for _ in range(steps)]
    first = results[0]
    return {
        "log_probs": before,
        "grads": grads,
        "loss": first.loss if first else 0.0,
        "entropy": first.sums["entropy"] if first else 0.0,
        "sums": first.sums if first else {},
        "grad_norm": first.grad_norm if first else None,
        "weights": weights(actor),
        "num_batches": len(batches),
    }


def one_step_in_chunks(rank: int, world_size: int, chunk_bytes: int, *args: Any) -> dict[str, Any]:
    """The head's logits in chunks of at most so many bytes, of which a tiny model would have one only."""
    vocab_head._CHUNK_BYTES = {"cpu": (chunk_bytes, chunk_bytes)}
    return one_step(rank, world_size, *args)


def log_probs(rank: int, world_size: int, config: Config, sequences: list[Sequence]) -> dict[int, torch.Tensor]:
    actor = MegatronActor(config, rank)
    batches = my_batches(actor, sequences)
    return per_sequence(actor.log_probs(batches), batches, sequences)


def shares_prompts(rank: int, world_size: int, config: Config) -> bool:
    return MegatronActor(config, rank).shares_prompts()


def can_compile(rank: int, world_size: int) -> bool:
    return compiler.can_compile()


def one_compiled_step(rank: int, world_size: int, *args: Any) -> dict[str, Any]:
    os.environ["OR1_COMPILE"] = "1"
    return one_step(rank, world_size, *args)


def poisoned_update(
    rank: int, world_size: int, config: Config, sequences: list[Sequence], poison: Callable[[MegatronActor], None]
) -> tuple[str, bool]:
    """An update after `poison`: (what it raised, whether weights and moments are bitwise as before)."""
    actor = MegatronActor(config, rank)
    batches = my_batches(actor, sequences)
    settings = {"num_tokens": sum(len(s.tokens) - s.num_prompt_tokens for s in sequences), "lr": LR}
    actor.update(batches, entropy_coefficient=ALPHA, **settings)  # now there are moments
    poison(actor)
    before = _state(actor)
    try:
        actor.update(batches, entropy_coefficient=ALPHA, **settings)
    except RunFailure as failure:
        after = _state(actor)
        assert len(before) == len(after) > 10
        return str(failure), all(map(torch.equal, before, after))
    return "nothing", False


def _state(actor: MegatronActor) -> list[torch.Tensor]:
    """Bytes, so that NaN equals itself."""
    tensors = list(actor.model.parameters())
    optimizer: Any = actor.optimizer
    for state in optimizer.chained_optimizers[0].optimizer.state.values():
        tensors += [state["step"], state["exp_avg"], state["exp_avg_sq"]]
    return [tensor.detach().clone().reshape(-1).view(torch.uint8) for tensor in tensors]


def poison_row(actor: MegatronActor, *, weight: str, row: int, value: float) -> None:
    """Of a weight whose rows are the vocabulary, split over the tensor ranks."""
    parameter = dict(actor._gpt.named_parameters())[weight]
    local = row - actor.mesh.coordinates.tp * len(parameter)
    if 0 <= local < len(parameter):
        parameter.data[local] = value


def poison_hidden_state(actor: MegatronActor, *, token: int) -> None:
    """The last layer's output is NaN at `token`, and only there; tp = 1."""
    inputs = []

    def see(module: Any, arguments: tuple) -> None:
        inputs.append(arguments[0].squeeze(0))

    def poison(module: Any, arguments: Any, hidden_t1H: torch.Tensor) -> torch.Tensor:
        return hidden_t1H.masked_fill((inputs[-1] == token)[:, None, None], torch.nan)

    actor._gpt.register_forward_pre_hook(see)
    actor._gpt.decoder.register_forward_hook(poison)


def poison_negative_logit(actor: MegatronActor, *, row: int) -> None:
    """The logit of `row` is -infinity at every token; tp = 1."""
    logits = vocab_head._logits

    def poisoned(hidden_CH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        found_CV = logits(hidden_CH, weight_VH)
        found_CV[:, row] = -torch.inf
        return found_CV

    vocab_head._logits = poisoned


def exported(rank: int, world_size: int, config: Config) -> dict[str, torch.Tensor]:
    return weights(MegatronActor(config, rank))


def save_and_go_on(
    rank: int, world_size: int, config: Config, sequences: list[Sequence], directory: Path, steps: int
) -> tuple[list[float], list[torch.Tensor]]:
    """Two steps, then `steps` more while the state of that moment is written; the latter's losses, the last state."""
    actor = MegatronActor(config, rank)
    torch.rand(rank + 1)  # every rank's generator is somewhere else
    update_times(actor, sequences, 2)
    actor.begin_save(directory)
    losses = update_times(actor, sequences, steps)
    actor.finish_save()
    return losses, [*_state(actor), torch.rand(3)]


def load_and_go_on(
    rank: int, world_size: int, config: Config, sequences: list[Sequence], directory: Path, steps: int
) -> tuple[list[float], list[torch.Tensor]]:
    actor = MegatronActor(config, rank)
    actor.load(directory)
    losses = update_times(actor, sequences, steps)
    return losses, [*_state(actor), torch.rand(3)]


def update_times(actor: MegatronActor, sequences: list[Sequence], steps: int) -> list[float]:
    batches = my_batches(actor, sequences)
    num_tokens = sum(len(s.tokens) - s.num_prompt_tokens for s in sequences)
    losses = []
    for _ in range(steps):
        result = actor.update(batches, entropy_coefficient=ALPHA, num_tokens=num_tokens, lr=1e-3)
        losses.append(result.loss if result else 0.0)
    return losses


def updates_with_handovers(
    rank: int, world_size: int, config: Config, sequences: list[Sequence], cycles: int
) -> tuple[list[torch.Tensor], list[int]]:
    """State after two updates, with all memory given away and taken back `cycles` times before each; bytes held
    while it is away, and after."""
    actor = MegatronActor(config, rank)
    batches = my_batches(actor, sequences)
    num_tokens = sum(len(s.tokens) - s.num_prompt_tokens for s in sequences)
    held = [sum(part.num_bytes() for part in actor.memory.values())]
    for _ in range(2):
        for _ in range(cycles):
            actor.release(list(actor.memory))
            held.append(sum(part.num_bytes() for part in actor.memory.values()))
            actor.restore(list(actor.memory))
            held.append(sum(part.num_bytes() for part in actor.memory.values()))
        actor.update(batches, entropy_coefficient=ALPHA, num_tokens=num_tokens, lr=LR)
    return _state(actor), held


def save_on_a_full_disk(rank: int, world_size: int, config: Config, directory: Path) -> str:
    """What a save says when no file can grow beyond 16 KiB on any rank."""
    actor = MegatronActor(config, rank)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        actor.begin_save(directory)
        actor.finish_save()
    except Exception as error:
        return repr(error)
    return ""


def save_with_a_killed_writer(rank: int, world_size: int, config: Config, directory: Path) -> str:
    """What a save says when the writing processes are killed."""
    actor = MegatronActor(config, rank)
    checkpoint_writer.file_sum = lambda path: time.sleep(600)  # type: ignore[assignment]
    actor.begin_save(directory)
    assert actor.save_written() is None
    os.kill(actor._writer._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
    try:
        actor.finish_save()
    except Exception as error:
        return repr(error)
    return ""


def reference_after_a_step(
    rank: int, world_size: int, config: Config, sequences: list[Sequence]
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor], dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Log-probs: at the start, of the reference after one step, of the policy before and after asking for those."""
    actor = MegatronActor(config, rank)
    batches = my_batches(actor, sequences)
    start = per_sequence(actor.log_probs(batches), batches, sequences)
    asked = [replace(s, reference_log_probs=(0.0,) * s.num_response_tokens) for s in sequences]
    actor.update(my_batches(actor, asked), entropy_coefficient=ALPHA, num_tokens=10, lr=LR)
    before = per_sequence(actor.log_probs(batches), batches, sequences)
    reference = per_sequence(actor.reference_log_probs(batches), batches, sequences)
    return start, reference, before, per_sequence(actor.log_probs(batches), batches, sequences)
