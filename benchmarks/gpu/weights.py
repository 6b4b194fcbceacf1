"""The actor's weights on their way to a second process on the same GPU, and its memory given up and taken back.

A push is what the engine of a colocated rank gets: packed by the rank into buffers that the process has mapped (CUDA
IPC), bucket by bucket, and copied out by that process, as vLLM needs it. It is timed by the host's clock, as it ends in
another process. Without a GPU the buffers are files in memory.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.clock import Part, free_memory, seconds, used_memory
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.step import write_random_model
from benchmarks.harness import Benchmark
from or1_megatron.parallel import device
from or1_megatron.parallel.packed_weights import plan_packed
from or1_megatron.parallel.weight_exchange import MappedReceiver, Offer, Plan
from or1_megatron.recipe import from_tree
from or1_megatron.reward.isolation import die_with_parent

MODEL, CYCLES, TIMEOUT_S = "1.5B", 50, 20.0


def parts(sizes: Sizes, ceilings: Ceilings, facts: dict[str, Any]) -> list[Part]:
    """A push per size of the buckets, then the cycles."""
    scratch = tempfile.TemporaryDirectory(prefix="or1-gpu-check-")
    facts["scratch"] = scratch  # lives as long as the process
    path = write_random_model(Path(scratch.name), sizes.models[MODEL])
    pushes = [partial(_push, ceilings, path, bucket_bytes) for bucket_bytes in sizes.buckets]
    return [*pushes, partial(_cycles, sizes)]


def _actor(path: Path) -> Any:
    from or1_megatron.actor.actor import MegatronActor

    tree = {"model": {"path": str(path), "dtype": "bf16"}, "rollout": {"context_length": 64}}
    return MegatronActor(from_tree([("gpu-check", tree)]), 0)


def _push(ceilings: Ceilings, path: Path, bucket_bytes: int, bench: Benchmark) -> None:
    actor = _actor(path)
    plan = plan_packed(actor.architecture, tp=1, pp=1, dtype=torch.bfloat16, bucket_bytes=bucket_bytes)
    size = sum(bucket.unpacked_bytes for bucket in plan)
    offer = actor.weights.offer(plan, TIMEOUT_S, mapped=True)
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_receive, args=(plan, offer, theirs))
    process.start()
    theirs.close()  # so that its death ends a wait for it
    bench.stack.callback(process.join, TIMEOUT_S)
    bench.stack.callback(mine.send, False)
    mine.recv()

    def push() -> float:
        mine.send(True)
        started = time.perf_counter()
        actor.weights.send(checksums=False)
        mine.recv()
        return time.perf_counter() - started

    label = f"{MODEL}, {len(plan)} buckets of at most {bucket_bytes / 2**20:.4g} MiB"
    case = bench.case(label, push, "ours", size / 1e9, "GB")
    # Each byte is copied twice, into a buffer and out of it, on the same memory; a copy reads and writes.
    share = lambda: 4 * size / case.median / ceilings.bytes_per_s  # noqa: E731
    case.remark = lambda: f"two copies of each byte at {share():.1%} of a copy's rate, delivered at {share() / 2:.1%}"
    bench.mark(f"weights_{MODEL}_buckets_{len(plan)}_share_of_copy", share, 0.6)


def _receive(plan: Plan, offer: Offer, pipe: Connection) -> None:
    """Body of the second process: takes a push each time it is told to."""
    die_with_parent()
    device.install()
    receiver = MappedReceiver(plan, offer)
    pipe.send("ready")
    while pipe.recv():
        for _ in receiver.tensors():
            pass
        pipe.send("taken")
    receiver.close()


def _cycles(sizes: Sizes, bench: Benchmark) -> None:
    with tempfile.TemporaryDirectory(prefix="or1-gpu-check-") as scratch:
        actor = _actor(write_random_model(Path(scratch), sizes.cycled))
    memory, held, released = list(actor.memory), [], []
    size = sum(offload.num_bytes() for offload in actor.memory.values())
    before = [parameter.detach().cpu().clone() for parameter in actor.model.parameters()]

    def cycle() -> None:
        actor.release(memory)
        released.append(used_memory())
        actor.restore(memory)
        held.append(used_memory())

    free_memory()
    case = bench.recorded(
        f"{CYCLES} times released and restored, {size / 1e9:.3g} GB", [seconds(cycle) for _ in range(CYCLES)],
        2 * size / 1e9, "GB",
    )  # fmt: skip
    for parameter, old in zip(actor.model.parameters(), before, strict=True):
        assert torch.equal(parameter.detach().cpu(), old), "a weight has changed"
    case.remark = f"{(held[-1] - max(released)) / 1e9:.3g} GB given up each time"
    # The first cycle makes the pinned memory on the host.
    drift = (max(held[1:]) - min(held[1:])) / 1e6
    bench.mark("weights_cycles_level_drift_MB", lambda: drift, 20, "lower")
