"""Packed buckets on their way from the ranks to the engines' processes, two of them at a time.

Two ways, one format (parallel/packed_weights.py) and one sender:

    by broadcast  every sender broadcasts its stretch of a bucket in a group of all senders and all engine processes:
                  NCCL between GPUs, gloo between hosts without any. Bucket i + 1 is packed and bucket i is on its way
                  while bucket i - 1 is loaded
    mapped        the engine process maps the buffers of the rank on its own GPU (CUDA IPC), once for the run. The
                  ranks of a replica fill them by the same broadcasts among themselves, where there are several

Receivers put each bucket's tensors together in memory of their own and hand that on: vLLM keeps references to what it
was given until a layer is complete, and a buffer that is reused would change under it.
"""

from __future__ import annotations

import datetime
import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from or1_megatron.parallel import device, shared_memory
from or1_megatron.parallel.packed_weights import PackedBucket, copy_all, packed_views, unpack

NUM_BUFFERS = 2
LOOPBACK = "127.0.0.1"
_SPIN_S, _NAP_S = 1e-3, 1e-4  # of a wait: at first without sleep, which is where most end on a GPU
Plan = tuple[PackedBucket, ...]


@dataclass(frozen=True)
class Meeting:
    """A store that a process of `host` keeps at `port`, where others find it."""

    host: str
    port: int
    timeout_s: float

    def connect(self) -> Any:
        return TCPStore(self.host, self.port, timeout=datetime.timedelta(seconds=self.timeout_s))


def open_meeting(host: str, timeout_s: float) -> tuple[Meeting, Any]:
    """A meeting and its store, which lives as long as the second is kept. Any free port."""
    timeout = datetime.timedelta(seconds=timeout_s)
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    return Meeting(host, store.port, timeout_s), store


def join(meeting: Meeting, rank: int, size: int) -> Any:
    """The group of `size` processes that meet there; `rank` 0 to the number of senders - 1 are the senders."""
    if meeting.host == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return device.join_group(meeting.connect(), rank, size, meeting.timeout_s)


def _buffer_bytes(plan: Plan) -> int:
    return max(bucket.packed_bytes for bucket in plan)


def _broadcast(group: Any, bucket: PackedBucket, buffer: torch.Tensor) -> list[Any]:
    """Starts what fills the stretches of all senders; `group` None: a sender alone."""
    if group is None:
        return []
    works = []
    for root, (begin, end) in enumerate(bucket.stretches):
        if begin < end:
            options = torch.distributed.BroadcastOptions()
            options.rootRank = root
            works.append(group.broadcast([buffer[begin:end]], options))
    return works


def _finish(works: list[Any]) -> None:
    for work in works:
        work.wait()


class Turns:
    """How many of a rank's buckets lie full in its buffers, and how many of them one engine process has taken: two
    counts, through all pushes, in memory that both have mapped. A turn costs microseconds so, where a store's answer
    takes as long as the copy of a bucket on a GPU.
    """

    BYTES = 128  # a count in a cache line of its own, as each has one writer

    def __init__(self, path: Path, timeout_s: float):
        counts = shared_memory.attach(path).view(np.int64)
        self._filled, self._taken, self._timeout_s = counts[:1], counts[8:9], timeout_s

    def fill(self) -> None:
        self._filled += 1

    def take(self) -> None:
        self._taken += 1

    def wait_filled(self, count: int) -> None:
        """Returns once `count` buckets have been filled. Raises TimeoutError after timeout_s."""
        self._wait(self._filled, count, "the rank whose weights this engine maps has sent nothing")

    def wait_taken(self, count: int) -> None:
        self._wait(self._taken, count, "the engine on this rank's GPU has taken no weights")

    def _wait(self, reached: np.ndarray, count: int, problem: str) -> None:
        started = time.monotonic()
        while reached[0] < count:
            waited = time.monotonic() - started
            if waited > self._timeout_s:
                raise TimeoutError(f"{problem} for {self._timeout_s:.0f} s (parallel.timeout_s)")
            if waited > _SPIN_S:
                time.sleep(_NAP_S)


class Sender:
    """One rank's side. sources[i] are views of its boxes of bucket i, in the plan's order.

    group: of the senders, and of the receivers unless these map the buffers; None: alone. turns: with who maps them.
    """

    def __init__(
        self,
        plan: Plan,
        sender: int,
        sources: list[list[torch.Tensor]],
        group: Any,
        buffers: list[torch.Tensor] | None = None,
        turns: Turns | None = None,
    ):
        self._plan, self._group, self._turns = plan, group, turns
        self._buffers = buffers or make_buffers(plan, device.device())
        self._sources = sources
        self._targets = [[packed_views(bucket, sender, buffer) for buffer in self._buffers] for bucket in plan]
        self._number = 0

    def send(self) -> None:
        """All weights as they are now; returns when the receivers have them, or no longer need this rank."""
        busy: list[list[Any]] = [[] for _ in self._buffers]
        for index, bucket in enumerate(self._plan):
            place = self._number % len(self._buffers)
            _finish(busy[place])
            if self._turns:
                self._turns.wait_taken(self._number + 1 - len(self._buffers))
            copy_all(self._targets[index][place], self._sources[index])
            busy[place] = _broadcast(self._group, bucket, self._buffers[place])
            if self._turns:
                _finish(busy[place])
                device.synchronize()
                self._turns.fill()
            self._number += 1
        for works in busy:
            _finish(works)
        device.synchronize()
        if self._turns:
            self._turns.wait_taken(self._number)


class BroadcastReceiver:
    """A member of the group that sends nothing."""

    def __init__(self, plan: Plan, group: Any, on: torch.device):
        self._plan, self._group = plan, group
        self._buffers = make_buffers(plan, on)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, tensor) of one push, in the plan's order. The next buckets are on their way meanwhile."""
        works = [_broadcast(self._group, *pair) for pair in zip(self._plan, self._buffers, strict=False)]
        for index, bucket in enumerate(self._plan):
            place = index % len(self._buffers)
            _finish(works[place])
            ready = unpack(bucket, self._buffers[place])
            if (following := index + len(self._buffers)) < len(self._plan):
                works[place] = _broadcast(self._group, self._plan[following], self._buffers[place])
            yield from ready

    def close(self) -> None:
        device.leave_group(self._group)


class MappedReceiver:
    """A process that maps the buffers of one rank."""

    def __init__(self, plan: Plan, offer: Offer):
        self._plan, self._turns = plan, Turns(offer.turns, offer.timeout_s)
        offer.turns.unlink()
        self._buffers = [_map(handle) for handle in pickle.loads(offer.handles)]
        self._number = 0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As BroadcastReceiver's."""
        for bucket in self._plan:
            self._turns.wait_filled(self._number + 1)
            ready = unpack(bucket, self._buffers[self._number % len(self._buffers)])
            device.synchronize()
            self._turns.take()
            self._number += 1
            yield from ready

    def close(self) -> None:
        self._buffers.clear()


@dataclass(frozen=True)
class Offer:
    """Buffers that a process on the same GPU may map."""

    device_id: str
    turns: Path
    timeout_s: float
    handles: bytes  # from this run's own rank, over its own channel


def make_buffers(plan: Plan, on: torch.device) -> list[torch.Tensor]:
    return [torch.empty(_buffer_bytes(plan), dtype=torch.uint8, device=on) for _ in range(NUM_BUFFERS)]


def offer_buffers(plan: Plan, timeout_s: float) -> tuple[Offer, list[torch.Tensor], Turns]:
    """Buffers of this process's device that one other process may map: on a GPU by CUDA IPC, else files in memory."""
    turns = shared_memory.create(Turns.BYTES)
    if device.has_cuda():
        buffers = make_buffers(plan, device.device())
        handles: list[Any] = [reduce_tensor(buffer)[1] for buffer in buffers]
    else:
        handles = [shared_memory.create(_buffer_bytes(plan)) for _ in range(NUM_BUFFERS)]
        buffers = [torch.from_numpy(shared_memory.attach(path)) for path in handles]
    return Offer(device.device_id(), turns, timeout_s, pickle.dumps(handles)), buffers, Turns(turns, timeout_s)


def _map(handle: Any) -> torch.Tensor:
    if isinstance(handle, Path):
        data = torch.from_numpy(shared_memory.attach(handle))
        handle.unlink()
        return data
    arguments = list(handle)
    arguments[6] = torch.cuda.current_device()  # the same GPU may have another number in this process
    return rebuild_cuda_tensor(*arguments)
