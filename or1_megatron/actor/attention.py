"""The `torch` implementation's own layers: attention over packed sequences with its RoPE, RMSNorm, SwiGLU.

Megatron's local core attention supports neither packed sequences nor context parallel, its wrapped torch norm refuses
sequence parallel, and its RoPE makes the same tables anew for each sequence in each layer. These run on CPU and on
GPU, so TransformerEngine has a reference.
Shape letters: T tokens of the pack, t those of this context-parallel rank, N query heads of this tensor rank, K
key/value heads of it, D head size, C = D / 2 angles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right

from or1_megatron.parallel.context import Part, gather
from or1_megatron.parallel.device import device
from or1_megatron.parallel.layer_kernels import rms_norm, rotate, swiglu

_LARGEST_KEPT_MASK = 1 << 14  # elements


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence; drop-in for a spec's `core_attention`."""

    def __init__(self, config: TransformerConfig, layer_number: int, *, pg_collection: Any, **_: Any):
        super().__init__()
        self.scale = config.softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query_tND: torch.Tensor,
        key_tKD: torch.Tensor,
        value_tKD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Returns [t, N * D]. `packed_seq_params` carries this rank's Part of the pack and its RoPE tables."""
        assert packed_seq_params is not None, "the actor always packs"
        packed: Any = packed_seq_params
        part: Part = packed.part
        grouped = query_tND.shape[1] != key_tKD.shape[1]
        query_NtD, key_KTD = (rotate(x, packed.cos_tC, packed.sin_tC) for x in (query_tND, key_tKD))
        value_KTD = value_tKD.transpose(0, 1)
        if part.num_ranks > 1:
            both_TKX = gather(torch.cat((key_KTD, value_KTD), -1).transpose(0, 1), part, self.cp_group)
            key_KTD, value_KTD = both_TKX.transpose(0, 1).chunk(2, -1)
        # Cut and joined once: the gradient of a slice would be a pack of zeros around it.
        queries = _of_runs(query_NtD, part)
        keys, values = _seen(key_KTD, part), _seen(value_KTD, part)
        outputs = []
        for q, k, v in zip(queries, keys, values, strict=True):
            attended = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, **_masking(q, k.shape[2]), scale=self.scale, enable_gqa=grouped
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(outputs)


def _masking(query_SNLD: torch.Tensor, num_keys: int) -> dict[str, Any]:
    """The last query sees all keys, the one before it all but the last."""
    num_queries = query_SNLD.shape[2]
    if num_queries == num_keys:
        return {"is_causal": True}
    if query_SNLD.is_cuda or num_queries * num_keys > _LARGEST_KEPT_MASK:
        return {"attn_mask": causal_lower_right(num_queries, num_keys)}
    return {"attn_mask": _mask(num_queries, num_keys, query_SNLD.dtype)}


@lru_cache(maxsize=256)
def _mask(num_queries: int, num_keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Added to the scores. On a CPU torch would write it anew for each layer, which for short stretches takes as long
    as attending to them."""
    return torch.full((num_queries, num_keys), -torch.inf, dtype=dtype).triu(num_keys - num_queries + 1)


def _of_runs(values_KtD: torch.Tensor, part: Part) -> list[torch.Tensor]:
    """[stretches, K, length, D] of each run of stretches of one length: one call attends to a whole run."""
    pieces = values_KtD.split([run.count * run.num_queries for run in part.runs], 1)
    return [piece.unflatten(1, run[:2]).transpose(0, 1) for piece, run in zip(pieces, part.runs, strict=True)]


def _seen(values_KTD: torch.Tensor, part: Part) -> list[torch.Tensor]:
    """What the queries of each run see: their stretches, after the prompt that these share. With context parallel two
    stretches see keys of the same sequence."""
    if part.num_ranks > 1:
        return [values_KTD[None, :, s.key : s.key + s.num_keys] for s in part.stretches]
    own = _of_runs(values_KTD, part)
    return [
        piece if run.continues is None else torch.cat((own[run.continues].expand(run.count, -1, -1, -1), piece), 2)
        for piece, run in zip(own, part.runs, strict=True)
    ]


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight is marked for the gradient reduction that sequence parallel needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = torch.tensor(eps, device=device())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(MegatronModule):
    """The activation of the MLP, built as a spec's `activation_func`; Megatron-Core 0.19 asks for a module."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(x)
