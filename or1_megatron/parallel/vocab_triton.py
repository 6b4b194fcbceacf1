"""The two passes over logits on CUDA, in Triton; also runs in Triton's interpreter on a CPU, for its tests.

One program per row. Statistics: one pass with an online maximum; when the maximum of a row so far rises by d (scaled),
s and t of what came before become s e^-d and (t - d s) e^-d. Gradient: one read and one write of each element, in
place where asked. Bytes moved per bf16 element: 2 + 4, the floor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _statistics_kernel(logits, out, columns, row_stride, num_rows, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    centred = tl.zeros((), tl.float32)
    for first in range(0, columns, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < columns
        z = tl.load(start + index, mask=inside, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, 0))
        drop = tl.where(top == float("-inf"), 0.0, (top - new_top) * scale)
        centred = (centred + drop * total) * tl.exp(drop)
        total = total * tl.exp(drop)
        shifted = (z - new_top) * scale
        weights = tl.where(inside, tl.exp(shifted), 0.0)
        total += tl.sum(weights, 0)
        centred += tl.sum(tl.where(inside, weights * shifted, 0.0), 0)
        top = new_top
    tl.store(out + row, top)
    tl.store(out + num_rows + row, total)
    tl.store(out + 2 * num_rows + row, centred)


@triton.jit
def _gradient_kernel(logits, out, top, slope, offset, columns, row_stride, out_stride, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < columns
    z = tl.load(logits + row * row_stride + index, mask=inside, other=0.0).to(tl.float32)
    shifted = (z - tl.load(top + row)) * scale
    value = tl.exp(shifted) * (shifted * tl.load(slope + row) + tl.load(offset + row))
    tl.store(out + row * out_stride + index, value.to(out.dtype.element_ty), mask=inside)


def statistics(logits_TV: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See vocab_kernels.statistics. Rows may be strided, columns not."""
    assert logits_TV.stride(1) == 1, logits_TV.stride()
    rows, columns = logits_TV.shape
    out_3T = logits_TV.new_empty(3, rows, dtype=torch.float32)
    if rows:
        _statistics_kernel[(rows,)](
            logits_TV,
            out_3T,
            columns,
            logits_TV.stride(0),
            rows,
            1 / temperature,
            BLOCK=_BLOCK,
            num_warps=8,  # pyright: ignore[reportCallIssue]
        )
    top, total, centred = out_3T.unbind(0)
    return top, total, centred


def gradient(
    logits_TV: torch.Tensor,
    top_T: torch.Tensor,
    slope_T: torch.Tensor,
    offset_T: torch.Tensor,
    temperature: float,
    out_TV: torch.Tensor,
) -> None:
    """See vocab_kernels.gradient. Rows may be strided, columns not."""
    assert logits_TV.stride(1) == out_TV.stride(1) == 1
    rows, columns = logits_TV.shape
    if rows:
        _gradient_kernel[(rows, triton.cdiv(columns, _BLOCK))](
            logits_TV,
            out_TV,
            top_T.contiguous(),
            slope_T.contiguous(),
            offset_T.contiguous(),
            columns,
            logits_TV.stride(0),
            out_TV.stride(0),
            1 / temperature,
            BLOCK=_BLOCK,
            num_warps=8,  # pyright: ignore[reportCallIssue]
        )
