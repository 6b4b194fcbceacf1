"""What the device says about its own speed."""

from __future__ import annotations

import platform

import pytest
import torch

from or1_megatron.parallel import device


@pytest.mark.skipif(platform.machine() != "x86_64", reason="what torch emulates is known for x86 only")
@pytest.mark.skipif(device.has_cuda(), reason="a GPU multiplies bf16")
def test_a_cpu_without_avx512_is_slow_in_bf16():
    emulates = not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert any(device.slow_in_bf16() == emulates for _ in range(3))  # others may take the cores for one of the products


def test_slow_is_several_times_as_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    for bf16, slow in ((24.0, True), (26.0, False), (900.0, False)):
        monkeypatch.setattr(device, "peak_flops", {torch.bfloat16: bf16, torch.float32: 100.0}.__getitem__)
        assert device.slow_in_bf16() == slow
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    assert not device.slow_in_bf16()
