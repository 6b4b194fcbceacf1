"""RMSNorm, SwiGLU and RoPE: values and gradients equal the plain formulas differentiated by torch, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from or1_megatron.parallel.layer_kernels import rms_norm, rotate, swiglu

T, N, D, H, F = 7, 3, 8, 24, 10
EPS = 1e-5


def dense_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def dense_gate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x[..., :F], x[..., F:]
    return gate / (1 + torch.exp(-gate)) * up


def angles() -> torch.Tensor:
    return torch.arange(T)[:, None] * 10.0 ** -torch.arange(D // 2)


def dense_rotation(x: torch.Tensor) -> torch.Tensor:
    """As complex numbers."""
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones(()), angles())[:, None]
    return torch.cat((turned.real, turned.imag), -1).transpose(0, 1)


def our_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight, torch.tensor(EPS))


def our_rotation(x: torch.Tensor) -> torch.Tensor:
    return rotate(x, angles().cos(), angles().sin())


CASES = {
    "norm": (our_norm, dense_norm, [(T, 1, H), (H,)]),
    "norm of heads": (our_norm, dense_norm, [(T, N, D), (D,)]),
    "gate": (swiglu, dense_gate, [(T, 1, 2 * F)]),
    "rotation": (our_rotation, dense_rotation, [(T, N, D)]),
}


def with_gradients(formula: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = formula(*leaves)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, dtype: torch.dtype, way: str):
    ours, dense, shapes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    found = with_gradients(ours, inputs)
    expected = with_gradients(dense, [x.double() for x in inputs])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # bf16 keeps 8 bits
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_inputs_may_be_views_as_attention_has_them(way: str):
    mixed = torch.randn(T, N, 2 * D, generator=torch.Generator().manual_seed(0))
    view = mixed[:, :, D:]
    torch.testing.assert_close(our_rotation(view), our_rotation(view.clone()))
    torch.testing.assert_close(our_norm(view, torch.ones(D)), our_norm(view.clone(), torch.ones(D)))
