"""The two passes over logits: statistics of each row, and the gradient with respect to each element.

z is a block [T, V] of logits of any float dtype; everything is computed in float32, element by element in registers
where a compiler is at hand: torch.compile's C++ on a CPU, Triton on CUDA. Without a compiler, the same formulas run
eagerly in blocks of rows that fit a cache. With v = (z - top) / temperature:

    statistics  top = max z,  s = sum e^v,  t = sum v e^v      per row
    gradient    e^v (slope v + offset)                         slope and offset per row

On a CPU in powers of two, e^v = 2^(v log2 e): 2^x takes fewer instructions, and torch.compile would write every e^v
that is used twice to memory, and then no longer read bf16 in whole vectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from or1_megatron.parallel.compiler import compiled

_BLOCK_ELEMENTS = 1 << 20  # float32 elements of one eager block: a cache's worth
# Statistics are made per block of columns and then combined: a row of it stays in the cache between the search for its
# maximum and its sums, and no sum of 150,000 terms is added up in one float32, which costs 2e-5 nats. Of more terms
# than this torch.compile adds up pairwise, in memory instead of registers.
_COLUMNS = 4096
_LOG2_E, _LN_2 = math.log2(math.e), math.log(2)


def statistics(logits_TV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(top, s, t), each [T] float32. V is at least 1."""
    if logits_TV.is_cuda:
        from or1_megatron.parallel import vocab_triton

        return vocab_triton.statistics(logits_TV, temperature)
    scale = torch.tensor(_LOG2_E / temperature)
    with torch._C.DisableTorchFunction():
        run = compiled(_statistics, _statistics_eager)
        parts = [run(blocks_TNC, scale) for blocks_TNC in _column_blocks(logits_TV)]
        top_TN, s_TN, t_TN = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        top_T = top_TN.amax(1)
        below_TN = ((top_TN - top_T[:, None]) * scale).clamp(min=-1e30)
        weight_TN = below_TN.exp2()
        return top_T, (weight_TN * s_TN).sum(1), (weight_TN * (t_TN + below_TN * s_TN)).sum(1) * _LN_2


def gradient(
    logits_TV: torch.Tensor,
    top_T: torch.Tensor,
    slope_T: torch.Tensor,
    offset_T: torch.Tensor,
    temperature: float,
    out_TV: torch.Tensor,
) -> None:
    """Writes the gradient to `out_TV`, which may be `logits_TV` itself. Per-row values are float32."""
    if logits_TV.is_cuda:
        from or1_megatron.parallel import vocab_triton

        vocab_triton.gradient(logits_TV, top_T, slope_T, offset_T, temperature, out_TV)
        return
    values = (logits_TV, top_T, slope_T * _LN_2, offset_T, torch.tensor(_LOG2_E / temperature))
    with torch._C.DisableTorchFunction():
        if out_TV is logits_TV:
            compiled(_gradient_, _gradient_eager_)(*values)
        else:
            compiled(_gradient, _gradient_eager)(*values, out_TV)


def _column_blocks(logits_TV: torch.Tensor) -> list[torch.Tensor]:
    """Views [T, N, C] of all columns: the blocks of _COLUMNS, and what is left of the row."""
    whole = logits_TV.shape[1] // _COLUMNS * _COLUMNS
    blocks = [logits_TV[:, :whole].unflatten(1, (-1, _COLUMNS))] if whole else []
    rest_TC = logits_TV[:, whole:]
    return [*blocks, rest_TC.unsqueeze(1)] if rest_TC.shape[1] else blocks


def _statistics(z: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = z.float()
    top = z.amax(-1)
    shifted = (z - top.unsqueeze(-1)) * scale
    weights = shifted.exp2()
    return top, weights.sum(-1), (weights * shifted).sum(-1)


def _gradient_(z: torch.Tensor, top: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor, scale: Any) -> None:
    shifted = (z.float() - top.unsqueeze(1)) * scale
    z.copy_(shifted.exp2() * (shifted * slope.unsqueeze(1) + offset.unsqueeze(1)))


def _gradient(
    z: torch.Tensor, top: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor, scale: Any, out: torch.Tensor
) -> None:
    shifted = (z.float() - top.unsqueeze(1)) * scale
    out.copy_(shifted.exp2() * (shifted * slope.unsqueeze(1) + offset.unsqueeze(1)))


def _row_blocks(rows: int, columns: int) -> list[slice]:
    size = max(1, _BLOCK_ELEMENTS // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _statistics_eager(z: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parts = []
    for rows in _row_blocks(len(z), z[0].numel()):
        block = z[rows].float()
        top = block.amax(-1)
        shifted = torch.sub(block, top.unsqueeze(-1)).mul_(scale)
        weights = shifted.exp2()
        total = weights.sum(-1)
        parts.append((top, total, weights.mul_(shifted).sum(-1)))
    top, total, centred = (torch.cat(column) for column in zip(*parts, strict=True))
    return top, total, centred


def _gradient_eager_(z: torch.Tensor, top: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor, scale: Any) -> None:
    _gradient_eager(z, top, slope, offset, scale, z)


def _gradient_eager(
    z: torch.Tensor, top: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor, scale: Any, out: torch.Tensor
) -> None:
    for rows in _row_blocks(*z.shape):
        shifted = torch.sub(z[rows].float(), top[rows, None]).mul_(scale)
        weights = shifted.exp2()
        out[rows] = weights.mul_(torch.addcmul(offset[rows, None], shifted, slope[rows, None]))
