"""Buffers that another process maps: it never sees a bucket that is not whole, and neither side waits for ever."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from or1_megatron.parallel import shared_memory
from or1_megatron.parallel.bucket import TensorSlot
from or1_megatron.parallel.packed_weights import Box, PackedBucket
from or1_megatron.parallel.weight_exchange import MappedReceiver, Plan, Sender, Turns, offer_buffers

NUM_BUCKETS, SIZE = 7, 1 << 18


def plan_of_one_tensor_each() -> Plan:
    return tuple(
        PackedBucket(
            (TensorSlot(f"w{i}", "float32", (SIZE, 1), 0),),
            ((Box(f"w{i}", (0, 0), (SIZE, 1), 0),),),
            ((0, 4 * SIZE),),
        )
        for i in range(NUM_BUCKETS)
    )


@pytest.mark.parametrize("slow", ["rank", "engine"])
def test_each_side_waits_for_the_other(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pushes over two buffers; every bucket is a number, so a buffer refilled or read too early has another."""
    plan = plan_of_one_tensor_each()
    weights = [torch.full((SIZE, 1), float(i)) for i in range(NUM_BUCKETS)]
    offer, buffers, turns = offer_buffers(plan, 60)
    sender = Sender(plan, 0, [[weight] for weight in weights], None, buffers, turns)
    receiver = MappedReceiver(plan, offer)
    fill, take, taken = Turns.fill, Turns.take, []
    pauses = {"rank": (0.01, 0.0), "engine": (0.0, 0.01)}[slow]
    monkeypatch.setattr(Turns, "fill", lambda self: (time.sleep(pauses[0]), fill(self)))
    monkeypatch.setattr(Turns, "take", lambda self: (time.sleep(pauses[1]), taken.append(None), take(self)))

    def receive() -> list[dict[str, torch.Tensor]]:
        return [dict(receiver.tensors()) for _ in range(2)]

    with ThreadPoolExecutor(1) as threads:
        received = threads.submit(receive)
        sender.send()
        assert len(taken) == NUM_BUCKETS, "a push ends when all is taken"
        for weight in weights:
            weight += 100
        sender.send()
        pushes = received.result()
    for push, more in zip(pushes, (0, 100), strict=True):
        assert [tensor.unique().tolist() for tensor in push.values()] == [[i + more] for i in range(NUM_BUCKETS)]


def test_a_wait_for_the_other_side_ends() -> None:
    path = shared_memory.create(Turns.BYTES)
    try:
        turns = Turns(path, 0.05)
    finally:
        path.unlink()
    turns.fill()
    turns.wait_filled(1)
    turns.wait_taken(0)
    with pytest.raises(TimeoutError, match=r"the engine on this rank's GPU has taken no weights for 0 s \(parallel"):
        turns.wait_taken(1)
    with pytest.raises(TimeoutError, match="the rank whose weights this engine maps has sent nothing"):
        turns.wait_filled(2)
