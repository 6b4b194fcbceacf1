"""The `torch` implementation's own layers: attention over packed sequences and RMSNorm.

Megatron's local core attention supports neither packed sequences nor context parallel, and its wrapped torch norm
refuses sequence parallel. These two run on CPU and on GPU, so TransformerEngine has a reference.
Shape letters: T packed tokens, N query heads of this rank, K key/value heads of this rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence; drop-in for a spec's `core_attention`."""

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any):
        super().__init__()
        self.scale = config.softmax_scale

    def forward(
        self,
        query_TND: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Returns [T, N * D]. `packed_seq_params.cu_seqlens_host` holds the offsets as Python ints."""
        assert packed_seq_params is not None, "the actor always packs"
        offsets: tuple[int, ...] = packed_seq_params.cu_seqlens_host  # type: ignore[attr-defined]
        grouped = query_TND.shape[1] != key_TKD.shape[1]
        outputs = []
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):
            q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query_TND, key_TKD, value_TKD))
            attended = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped
            )
            outputs.append(attended.squeeze(0).transpose(0, 1).flatten(1))
        return torch.cat(outputs)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked for the gradient reduction that sequence parallel needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
