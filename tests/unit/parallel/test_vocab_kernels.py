"""Eager, compiled and Triton passes over logits: the same numbers from each, float64 as the judge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from or1_megatron.parallel import vocab_kernels

TEMPERATURE = 0.7


def case(dtype: torch.dtype, rows: int = 13, columns: int = 5000) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, columns + 8, generator=generator) * 3).to(dtype)[:, :columns]  # strided rows
    return logits, *(torch.randn(rows, generator=generator) for _ in range(2))


def expected(logits: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, ...]:
    z = logits.double()
    top = z.amax(1)
    v = (z - top[:, None]) / TEMPERATURE
    gradient = v.exp() * (v * slope[:, None] + offset[:, None])
    return top, v.exp().sum(1), (v.exp() * v).sum(1), gradient


@pytest.mark.parametrize("columns", [100, 5000, 8192, 9000])  # less than a block, whole blocks, blocks and a rest
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_equal_float64(way: str, dtype: torch.dtype, columns: int) -> None:
    logits, slope, offset = case(dtype, columns=columns)
    before = logits.clone()
    *stats, gradient = expected(logits, slope, offset)
    found = vocab_kernels.statistics(logits, TEMPERATURE)
    for value, wanted in zip(found, stats, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=1e-6)
    out = torch.empty_like(logits)
    vocab_kernels.gradient(logits, found[0], slope, offset, TEMPERATURE, out)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), gradient, rtol=rounding, atol=1e-6)
    assert torch.equal(logits, before)
    vocab_kernels.gradient(logits, found[0], slope, offset, TEMPERATURE, logits)
    assert torch.equal(logits, out)


def test_triton_in_its_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    program = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from or1_megatron.parallel import vocab_triton
from tests.unit.parallel.test_vocab_kernels import TEMPERATURE, case, expected
vocab_triton._BLOCK = 512  # several blocks a row, the last one partly filled
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):  # the interpreter rounds bf16 down
    logits, slope, offset = case(dtype, rows=3, columns=1700)
    logits[1, :600] -= 40  # the maximum rises from block to block
    *stats, gradient = expected(logits, slope, offset)
    found = vocab_triton.statistics(logits, TEMPERATURE)
    for value, wanted in zip(found, stats, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=5e-6, atol=1e-6)
    vocab_triton.gradient(logits, found[0], slope, offset, TEMPERATURE, logits)
    torch.testing.assert_close(logits.double(), gradient, rtol=tolerance, atol=1e-6)
print("equal")
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "equal", done.stderr
