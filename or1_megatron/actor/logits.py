"""Logits of one prompt, for comparing a checkpoint with another."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from or1_megatron.actor.mesh import build_mesh
from or1_megatron.actor.model import build_model, packed_parameters
from or1_megatron.architecture import read_architecture
from or1_megatron.config import Config
from or1_megatron.parallel import device
from or1_megatron.parallel.context import part_of
from or1_megatron.parallel.dims import Dims
from or1_megatron.sections import ModelConfig, RolloutConfig
from or1_megatron.types import MicroBatch

_TIMEOUT_S = 60.0


def prompt_logits(path: Path, tokens: list[int]) -> torch.Tensor:
    """Megatron's float32 logits, [len(tokens), vocab_size], of the checkpoint at `path`.

    For a process of its own, with the device seam installed: it becomes a world of one rank.
    """
    with tempfile.TemporaryDirectory() as scratch:
        device.init_process_group(f"file://{scratch}/store", 0, 1, _TIMEOUT_S)
        try:
            return _logits(path, tokens)
        finally:
            torch.distributed.destroy_process_group()


def _logits(path: Path, tokens: list[int]) -> torch.Tensor:
    count = len(tokens)
    config = Config(
        model=ModelConfig(path=str(path), dtype="fp32", transformer_impl="torch"),
        rollout=RolloutConfig(context_length=count),
    )
    architecture = read_architecture(path)
    model = build_model(config, architecture, build_mesh(Dims(tp=1, pp=1, dp=1), 0, seed=0, timeout_s=_TIMEOUT_S))
    tokens_T, nothing_T = torch.tensor(tokens), torch.zeros(count)
    part = part_of((0, count), rank=0, num_ranks=1, device=device.device())
    batch = MicroBatch(
        tokens_T=tokens_T,
        positions_T=torch.arange(count),
        labels_T=tokens_T,
        weights_T=nothing_T,
        advantages_T=nothing_T,
        old_log_probs_T=None,
        cu_seqlens=(0, count),
        sequence_ids=(0,),
    )
    with torch.no_grad():
        logits_1TV = model(
            batch.tokens_T.unsqueeze(0).to(device.device()),
            batch.positions_T.unsqueeze(0).to(device.device()),
            None,
            packed_seq_params=packed_parameters(
                batch, part, batch.positions_T.to(device.device()), model, 2 * count + 1
            ),
        )
    return logits_1TV.squeeze(0)[:, : architecture.vocab_size].float().cpu()
