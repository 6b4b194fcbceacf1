"""The bodies of the run's worker processes: what cluster/ turns into Ray actors. Plain classes, no ray.

A worker writes everything it prints to its own log file, so that its last lines can be shown when it dies, and
ignores Ctrl-C, which a terminal sends to the whole process group: the driver alone decides when a run stops.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from or1_megatron.config import Config
from or1_megatron.parallel import device
from or1_megatron.parallel.bucket import Bucket, TensorSlot
from or1_megatron.parallel.weight_exchange import LOOPBACK, Meeting, Offer, Plan, open_meeting
from or1_megatron.profiling.profilers import Profiler
from or1_megatron.profiling.spans import Record, Spans, clock
from or1_megatron.rollout.engine import EngineSpec
from or1_megatron.rollout.worker import RolloutWorker


def _spanned(method: Callable) -> Callable:
    """A call from the driver is a span of this process, under the method's name."""

    @functools.wraps(method)
    def timed(self: _Process, *args: Any, **kwargs: Any) -> Any:
        with self.spans.span(method.__name__):
            return method(self, *args, **kwargs)

    return timed


class _Process:
    def __init__(self, log: str, record: bool = True):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        faulthandler.enable()
        self.spans = Spans(enabled=record, idle=True)

    def clock(self) -> tuple[str, int]:
        return clock()

    def drain(self) -> Record:
        """What this process has recorded since the last call; see profiling/spans.py."""
        record = self.spans.drain()
        record.peak_bytes = device.take_peak_memory()
        return record

    def host(self) -> str:
        return socket.gethostname()

    def ping(self) -> int:
        """The process id: proof of life."""
        return os.getpid()


class ActorRank(_Process):
    """One Megatron rank."""

    def meeting_point(self, address: str | None) -> str:
        """Where all ranks meet, chosen by rank 0: a TCP port of this node at `address`, or a file on a single host.

        A launcher that keeps ports for its job names one in OR1_MEETING_PORT; else it is any that is free now.
        """
        if address is None:
            handle, name = tempfile.mkstemp(prefix="or1-ranks-")
            os.close(handle)
            os.unlink(name)
            return f"file://{name}"
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, int(os.environ.get("OR1_MEETING_PORT", "0"))))
            return f"tcp://{address}:{probe.getsockname()[1]}"

    def has_cuda(self) -> bool:
        return device.has_cuda()

    def start(self, config: Config, rank: int, meeting_point: str) -> None:
        """Joins the other ranks and builds the model; returns when this rank is ready."""
        # Megatron's overlap of tensor-parallel traffic needs kernels in the order in which they are launched.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if meeting_point.startswith("file:"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        device.install()
        if not device.has_cuda():
            device.set_num_threads(config.parallel.cpu_threads_per_rank)
        device.init_process_group(meeting_point, rank, config.parallel.num_ranks, config.parallel.timeout_s)
        from or1_megatron.actor.actor import MegatronActor  # megatron binds CUDA names at import: after install()

        self.spans.marks = device.range_marks() if config.profiling.tool == "nsys" else None
        self.actor = MegatronActor(config, rank, self.spans)

    @_spanned
    def release(self, parts: list[str]) -> None:
        self.actor.release(parts)

    @_spanned
    def restore(self, parts: list[str]) -> None:
        self.actor.restore(parts)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        with self.spans.span(method):
            return getattr(self.actor, method)(*args, **kwargs)

    def start_profiler(self, tool: str, file: Path) -> None:
        """See profiling/profilers.py."""
        self._profiler = Profiler(tool, file)
        self._profiler.start()

    def stop_profiler(self) -> None:
        self._profiler.stop()

    def weight_buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        with self.spans.span("weight_buckets"):
            yield from self.actor.weights.buckets(bucket_bytes)

    def attach_weights(self, path: Path, buckets: list[tuple[TensorSlot, ...]]) -> None:
        self.actor.weights.attach(path, buckets)

    @_spanned
    def write_weights(self, index: int, checksums: bool) -> dict[str, int]:
        return self.actor.weights.write(index, checksums=checksums)

    def device_id(self) -> str:
        return device.device_id()

    def open_meeting(self, address: str | None, timeout_s: float) -> Meeting:
        """Where senders and engines meet; `address` None: on this host alone."""
        meeting, self._store = open_meeting(address or LOOPBACK, timeout_s)
        return meeting

    def join_engines(self, plan: Plan, meeting: Meeting, size: int) -> None:
        self.actor.weights.join_engines(plan, meeting, size)

    def offer_buffers(self, plan: Plan, timeout_s: float, mapped: bool) -> Offer | None:
        return self.actor.weights.offer(plan, timeout_s, mapped=mapped)

    @_spanned
    def send_weights(self, checksums: bool) -> dict[str, int]:
        return self.actor.weights.send(checksums=checksums)


def visible(devices: Sequence[int], inherited: str) -> str:
    """CUDA_VISIBLE_DEVICES of a process that has these devices of its node's, which may itself show only some."""
    names = inherited.split(",")
    return ",".join(names[number] if inherited else str(number) for number in devices)


class EngineProcess(_Process):
    """One vLLM engine."""

    def start(self, spec: EngineSpec) -> None:
        if spec.devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible(spec.devices, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        self.worker = RolloutWorker(spec, self.spans)

    @_spanned
    def release(self, parts: list[str]) -> None:
        self.worker.release(parts)

    @_spanned
    def restore(self, parts: list[str]) -> None:
        self.worker.restore(parts)

    def generate(self, prompts: list, group_size: int, sampling: Any) -> Iterator[Any]:
        with self.spans.span("generate"):
            yield from self.worker.generate(prompts, group_size, sampling)

    def attach_weights(self, path: Path, buckets: list[tuple[TensorSlot, ...]]) -> None:
        self.worker.attach_weights(path, buckets)

    @_spanned
    def receive_written(self, index: int, checksums: dict[str, int]) -> None:
        self.worker.receive_written(index, checksums)

    @_spanned
    def begin_weights(self, version: int) -> None:
        self.worker.begin_weights(version)

    @_spanned
    def receive_bucket(self, bucket: Bucket) -> None:
        self.worker.receive_bucket(bucket)

    @_spanned
    def finish_weights(self) -> None:
        self.worker.finish_weights()

    def lacking(self) -> str | None:
        return self.worker.lacking()

    def device_ids(self) -> list[str]:
        return self.worker.device_ids()

    def join_ranks(self, plan: Plan, meeting: Meeting, first: int, size: int) -> None:
        self.worker.join_ranks(plan, meeting, first, size)

    def map_buffers(self, plan: Plan, offers: list[Offer]) -> None:
        self.worker.map_buffers(plan, offers)

    @_spanned
    def take_weights(self, version: int, checksums: bool) -> list[dict[str, int]]:
        return self.worker.take_weights(version, checksums)

    @_spanned
    def prompt_log_probs(self, tokens: list[int]) -> list[float]:
        return self.worker.prompt_log_probs(tokens)
