"""The weights of an engine whose model is cut over several processes (tensor parallel).

vLLM's worker processes map one memory that holds all weights as the checkpoint has them; each loads its shard from it.
Functions that begin with `worker` in their arguments run in those processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from or1_megatron.parallel import shared_memory
from or1_megatron.parallel.bucket import Bucket, TensorSlot, plan_buckets, slot_view, unpack_bucket
from or1_megatron.rollout.receiver import reload


class SharedWeights:
    """run: calls a function with the given arguments in every worker process."""

    def __init__(self, run: Callable[..., Any], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        self._run = run
        size = sum(4096 + dtype.itemsize * torch.Size(shape).numel() for shape in shapes.values())
        (slots,), size = plan_buckets(shapes, dtype, bucket_bytes=size)
        path = shared_memory.create(size, otherwise="set rollout.transport=gloo (nccl with GPUs)")
        try:
            data = shared_memory.attach(path)
            run(_attach, args=(path, slots))
        finally:
            path.unlink()
        self._views = {slot.name: slot_view(data, slot) for slot in slots}

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies (name, tensor) pairs of any device and float dtype into the memory."""
        for name, tensor in tensors:
            self._views[name].copy_(tensor)

    def load(self, *, tied: bool, seed: int) -> None:
        """All processes take what is written, and draw from `seed` from now on."""
        self._run(_load, args=(tied, seed))


def _attach(worker: Any, path: Path, slots: tuple[TensorSlot, ...]) -> None:
    worker.or1_weights = Bucket(slots, shared_memory.attach(path))


def _load(worker: Any, tied: bool, seed: int) -> None:
    reload(worker, unpack_bucket(worker.or1_weights), tied=tied, seed=seed)
