"""RMSNorm of a float32 engine on a CPU by vLLM's C library: one pass each, where vLLM runs six operations of torch.

vLLM builds these kernels for CPUs but leaves fusing there to torch.compile, whose C++ an engine would wait for at every
start. They are offered to it as implementations of its own operators, for this process. Not in bf16: with AVX2 they
cut off what does not fit instead of rounding it.
"""

from __future__ import annotations

from typing import Any

import torch

_PROVIDER = "c_library"
_VECTOR = 16  # the most numbers in one of the kernels' vectors


def options() -> dict[str, Any]:
    """vLLM's option that prefers them; nothing where this vLLM has no such operators or no such kernels."""
    from vllm.platforms import current_platform

    try:
        from vllm import ir

        current_platform.import_kernels()
        kernels = torch.ops._C.rms_norm, torch.ops._C.fused_add_rms_norm
    except (ImportError, AttributeError):
        return {}
    if _PROVIDER not in ir.ops.rms_norm.impls:
        _register(ir.ops, *kernels)
    return {"ir_op_priority": {name: [_PROVIDER] for name in ("rms_norm", "fused_add_rms_norm")}}


def _register(operators: Any, rms_norm: Any, fused_add_rms_norm: Any) -> None:
    @operators.rms_norm.register_impl(_PROVIDER, supports_args=_plain)
    def norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        rms_norm(out, x, weight, epsilon)
        return out

    @operators.fused_add_rms_norm.register_impl(_PROVIDER, supports_args=_both_plain, inplace=True)
    def add_and_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual


def _plain(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """What the kernels can: whole, contiguous rows of full vectors, and a weight of their dtype."""
    whole = variance_size is None and x.is_contiguous() and x.shape[-1] % _VECTOR == 0
    return whole and weight is not None and weight.dtype == x.dtype


def _both_plain(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _plain(x, weight, epsilon, variance_size) and x_residual.is_contiguous()
