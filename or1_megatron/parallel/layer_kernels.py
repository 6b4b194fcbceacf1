"""What a layer computes between its matrix products: RMSNorm, SwiGLU and the rotation of RoPE, each one pass over
memory forward and one backward.

Element by element in float32, rounded once to the input's dtype. Without a compiler the same formulas run eagerly.
Shape letters: T tokens, H hidden size, F intermediate size of this rank, N heads of this rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from or1_megatron.parallel.compiler import compiled


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; eps: float32 scalar."""
    return _RMSNorm.apply(x, weight_H, eps)  # type: ignore[return-value]


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """[..., 2F] gate and up side by side -> [..., F]: silu(gate) * up."""
    return _SwiGLU.apply(x)  # type: ignore[return-value]


def rotate(x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """RoPE: each pair (x_d, x_{d + D/2}) turned by its angle. Returns [N, T, D], contiguous, as attention reads it."""
    return _Rotate.apply(x_TND, cos_TD, sin_TD)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_H: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        y_TH, scale_T1 = _run(_norm, x.detach().flatten(0, -2), weight_H.detach(), eps)
        ctx.save_for_backward(x, weight_H, scale_T1)
        return y_TH.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_H, scale_T1 = ctx.saved_tensors
        dx_TH, dw_H = _run(_norm_backward, grads[0].flatten(0, -2), x.flatten(0, -2), weight_H, scale_T1)
        return dx_TH.view(x.shape), dw_H, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _run(_gate, x.detach().flatten(0, -2)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return _run(_gate_backward, grads[0].flatten(0, -2), x.flatten(0, -2)).view(x.shape)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _run(_turn, x_TND.detach().transpose(0, 1), cos_TD, sin_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos_TD, sin_TD = ctx.saved_tensors
        # The rotation by the opposite angles is its transpose.
        return _run(_turn, grads[0], cos_TD, -sin_TD).transpose(0, 1), None, None


def _run(formula: Any, *values: torch.Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return compiled(formula, formula)(*values)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    scale = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.float()).to(x.dtype), scale


def _norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = x.float() * scale
    wide = grad.float()
    inner = wide * weight.float()
    dx = scale * (inner - normed * (inner * normed).mean(1, keepdim=True))
    return dx.to(x.dtype), (wide * normed).sum(0).to(weight.dtype)


def _gate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, 1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def _gate_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, 1)
    wide, share = grad.float(), torch.sigmoid(gate)
    silu = gate * share
    return torch.cat(((wide * up * (share + silu * (1 - share))).to(x.dtype), (wide * silu).to(x.dtype)), 1)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.float().chunk(2, 2)
    return torch.cat(((low * cos - high * sin).to(x.dtype), (high * cos + low * sin).to(x.dtype)), 2)
