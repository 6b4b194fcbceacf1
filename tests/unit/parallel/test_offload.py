"""Storages give up their bytes and get them back; views stay valid and nothing is lost or left over."""

from __future__ import annotations

import psutil
import pytest
import torch

from or1_megatron.parallel.device import release_memory
from or1_megatron.parallel.offload import Offload


def test_views_of_one_storage_come_back_with_their_contents():
    flat = torch.arange(12, dtype=torch.float32)
    weight, bias = flat[:8].view(2, 4), flat[8:]
    alone = torch.ones(3, dtype=torch.bfloat16)
    offload = Offload(lambda: [weight, bias, alone], keep=True)
    assert offload.num_bytes() == 12 * 4 + 3 * 2
    offload.release()
    assert offload.is_released and offload.num_bytes() == 0
    offload.restore()
    assert weight.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and bias.tolist() == [8, 9, 10, 11]
    assert alone.tolist() == [1, 1, 1]
    flat[0] = 5
    assert weight[0, 0] == 5, "the views have come apart"


def test_what_is_not_kept_is_zero():
    gradient = torch.ones(4)
    offload = Offload(lambda: [gradient], keep=False)
    offload.release()
    offload.restore()
    assert gradient.tolist() == [0, 0, 0, 0]


def test_released_twice_or_restored_unreleased_is_our_mistake():
    offload = Offload(lambda: [torch.ones(1)], keep=True)
    with pytest.raises(AssertionError, match="without a release"):
        offload.restore()
    offload.release()
    with pytest.raises(AssertionError, match="twice"):
        offload.release()


def test_memory_is_back_at_the_same_level_over_fifty_cycles():
    kept, scratch = torch.ones(8 << 20), torch.ones(16 << 20)
    offloads = [Offload(lambda: [kept], keep=True), Offload(lambda: [scratch], keep=False)]
    process, levels, released = psutil.Process(), [], []
    for _ in range(50):
        for offload in offloads:
            offload.release()
        release_memory()  # as the actor does: an allocator may keep what was freed
        released.append(process.memory_info().rss)
        for offload in offloads:
            offload.restore()
        release_memory()
        levels.append(process.memory_info().rss)
    assert max(levels[1:]) - min(levels[1:]) < 4 << 20
    assert min(levels) - max(released) > 48 << 20, "gradients were not given back"  # 64 MiB
