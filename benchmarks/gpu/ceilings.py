"""What this device can do at best: the rates of a copy and of a bf16 matrix product. All else is measured against them.

The copy counts bytes read and bytes written. Inputs are random: zeros are faster than real data.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.clock import Part, seconds
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness import Benchmark
from or1_megatron.parallel.device import device, peak_flops

_WARM_UP_S = 0.3


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float  # copied, read and written together
    flops: float  # bf16 matrix product
    peak_flops: float  # bf16, of the data sheet where the device is known


def parts(sizes: Sizes, ceilings: None, facts: dict[str, Any]) -> list[Part]:
    """`facts` gets the Ceilings when they have run."""
    return [partial(_measure, sizes, facts)]


def _measure(sizes: Sizes, facts: dict[str, Any], bench: Benchmark) -> None:
    here = device()
    source = torch.randn(sizes.copied // 2, device=here).bfloat16()
    target = torch.empty_like(source)
    side = sizes.square
    left, right, product = (torch.randn(side, side, device=here).bfloat16() for _ in range(3))
    until = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < until:  # an idle GPU's clocks are low
        seconds(lambda: torch.mm(left, right, out=product))
    copy = bench.case(
        f"copy of {source.nbytes / 1e9:.2g} GB", lambda: seconds(lambda: target.copy_(source)), "floor",
        2 * source.nbytes / 1e9, "GB",
    )  # fmt: skip
    gemm = bench.case(
        f"bf16 product of {side}^3", lambda: seconds(lambda: torch.mm(left, right, out=product)), "floor",
        2 * side**3 / 1e12, "TFLOP",
    )  # fmt: skip

    def finish() -> str:
        found = Ceilings(1e9 * copy.median_rate, 1e12 * gemm.median_rate, peak_flops(torch.bfloat16))
        facts["ceilings"] = asdict(found)
        return (
            f"data sheet, or the fastest product where the device is not known: {found.peak_flops / 1e12:.3g} TFLOP/s"
        )

    bench.note(finish)
