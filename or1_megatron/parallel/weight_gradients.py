"""Gradients of weights, added straight to the float32 buffer that the optimizer reads.

Shape letters: V rows of the embedding on this rank, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from or1_megatron.parallel.compiler import compiled

_ROWS = 2048  # of one product in low precision, added up in float32 while it is in the cache
_ADDS_IN_FLOAT32 = hasattr(torch.ops.aten.addmm, "dtype_out")  # cuBLAS, of low precision, in one call


def add_product(target: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """target += a @ b; target may be float32 where a and b are not."""
    if target.dtype == a.dtype:
        target.addmm_(a, b)
        return
    if target.is_cuda and _ADDS_IN_FLOAT32:
        torch.addmm(target, a, b, out_dtype=target.dtype, out=target)  # type: ignore[call-overload]
        return
    for start in range(0, len(target), _ROWS):
        rows = slice(start, start + _ROWS)
        _add(target[rows], a[rows] @ b)


def lookup(weight_VH: torch.Tensor, grad_VH: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """[*ids.shape, H] rows of the weight; of an id outside of 0..V-1, which is another rank's, zeros.

    Backward adds to the rows of `grad_VH` that were looked up, and gives the weight itself no gradient: a dense one
    would be a pass over the whole vocabulary, mostly zeros. Without `grad_VH` there is no backward.
    """
    return _Lookup.apply(weight_VH, grad_VH, ids)  # type: ignore[return-value]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VH: torch.Tensor, grad_VH: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
        mine = (ids >= 0) & (ids < len(weight_VH))
        places = ids.where(mine, 0)
        ctx.save_for_backward(places, mine)
        ctx.grad_VH = grad_VH
        return weight_VH[places] * mine.unsqueeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        places, mine = ctx.saved_tensors
        rows = (grads[0] * mine.unsqueeze(-1)).to(ctx.grad_VH.dtype)
        ctx.grad_VH.index_add_(0, places.flatten(), rows.flatten(0, -2))
        return None, None, None


def _add(target: torch.Tensor, change: torch.Tensor) -> None:
    """One pass; torch's own makes a copy of `change` in the target's dtype first."""
    with torch._C.DisableTorchFunction():
        compiled(_accumulate, _accumulate)(target.view(-1), change.view(-1))


def _accumulate(target: torch.Tensor, change: torch.Tensor) -> None:
    target.add_(change)
