"""The bodies of the run's worker processes: what cluster/ turns into Ray actors. Plain classes, no ray.

A worker writes everything it prints to its own log file, so that its last lines can be shown when it dies, and
ignores Ctrl-C, which a terminal sends to the whole process group: the driver alone decides when a run stops.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from or1_megatron.config import Config
from or1_megatron.parallel import device
from or1_megatron.parallel.bucket import Bucket, TensorSlot
from or1_megatron.rollout.engine import EngineSpec
from or1_megatron.rollout.worker import RolloutWorker


class _Process:
    def __init__(self, log: str):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        faulthandler.enable()

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

    def start(self, config: Config, rank: int, meeting_point: str) -> None:
        """Joins the other ranks and builds the model; returns when this rank is ready."""
        if meeting_point.startswith("file:"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        device.install()
        if not device.has_cuda():
            device.set_num_threads(config.parallel.cpu_threads_per_rank)
        device.init_process_group(meeting_point, rank, config.parallel.num_ranks, config.parallel.timeout_s)
        from or1_megatron.actor.actor import MegatronActor  # megatron binds CUDA names at import: after install()

        self.actor = MegatronActor(config, rank)

    def release(self, parts: list[str]) -> None:
        self.actor.release(parts)

    def restore(self, parts: list[str]) -> None:
        self.actor.restore(parts)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.actor, method)(*args, **kwargs)

    def weight_buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        yield from self.actor.weights.buckets(bucket_bytes)

    def attach_weights(self, path: Path, buckets: list[tuple[TensorSlot, ...]]) -> None:
        self.actor.weights.attach(path, buckets)

    def write_weights(self, index: int, checksums: bool) -> dict[str, int]:
        return self.actor.weights.write(index, checksums=checksums)


class EngineProcess(_Process):
    """One vLLM engine."""

    def start(self, spec: EngineSpec) -> None:
        self.worker = RolloutWorker(spec)

    def release(self, parts: list[str]) -> None:
        self.worker.release(parts)

    def restore(self, parts: list[str]) -> None:
        self.worker.restore(parts)

    def generate(self, prompts: list, group_size: int, sampling: Any) -> Iterator[Any]:
        yield from self.worker.generate(prompts, group_size, sampling)

    def attach_weights(self, path: Path, buckets: list[tuple[TensorSlot, ...]]) -> None:
        self.worker.attach_weights(path, buckets)

    def receive_written(self, index: int, checksums: dict[str, int]) -> None:
        self.worker.receive_written(index, checksums)

    def begin_weights(self, version: int) -> None:
        self.worker.begin_weights(version)

    def receive_bucket(self, bucket: Bucket) -> None:
        self.worker.receive_bucket(bucket)

    def finish_weights(self) -> None:
        self.worker.finish_weights()

    def prompt_log_probs(self, tokens: list[int]) -> list[float]:
        return self.worker.prompt_log_probs(tokens)
