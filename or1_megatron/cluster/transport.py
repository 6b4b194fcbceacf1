"""How a push goes from the ranks to the engines: chosen when they have started, then the calls of each push.

shm         memory that ranks and engines of one host map; every rank writes its boxes of it
ray         gathered by the ranks, carried by the object store: between hosts, whatever they are
gloo, nccl  broadcast by the ranks to the engines' processes: without GPUs, or to engines on GPUs of their own
ipc         mapped by an engine on the GPU of the rank: where they take turns on it
"""

from __future__ import annotations

from typing import Any

import ray
import torch

from or1_megatron.architecture import read_architecture
from or1_megatron.cluster.workers import Workers
from or1_megatron.config import Config
from or1_megatron.errors import UserError
from or1_megatron.parallel import shared_memory
from or1_megatron.parallel.bucket import compare_checksums, plan_buckets
from or1_megatron.parallel.dims import Dims
from or1_megatron.parallel.layout import hf_shapes
from or1_megatron.parallel.packed_weights import plan_packed

DIRECT = ("gloo", "nccl", "ipc")  # an engine's processes receive themselves
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BUCKETS_IN_FLIGHT = 2


def check(wanted: str, *, num_gpus: int, colocated: bool) -> None:
    """Raises UserError when `wanted` (rollout.transport) cannot be on these machines."""
    if wanted in ("nccl", "ipc") and not num_gpus:
        raise UserError(f"rollout.transport={wanted} needs GPUs, and there are none; use auto, shm, gloo or ray")
    if wanted == "gloo" and num_gpus:
        raise UserError("rollout.transport=gloo is for machines without a GPU; use auto, nccl or ipc")
    if wanted == "nccl" and colocated:
        raise UserError(
            "rollout.transport=nccl needs engines on GPUs of their own, here they take turns with the actor; use ipc, "
            "or rollout.placement=separate"
        )
    if wanted == "ipc" and not colocated:
        raise UserError(
            "rollout.transport=ipc needs engines on the actor's GPUs, here they have their own; use nccl, or "
            "rollout.placement=colocated"
        )


def choose(
    wanted: str,
    *,
    num_gpus: int,
    colocated: bool,
    num_hosts: int,
    lacking: str | None,
    paired: bool,
    engine_tp: int = 1,
    verify: bool = False,
) -> tuple[str, str]:
    """The transport, and a line for the user where it is not the best one (else empty). Raises UserError when `wanted`
    cannot be.

    lacking: what the installed vLLM lacks for a direct one. paired: every engine process has its GPU with one rank.
    """
    plain = "shm" if num_hosts == 1 else "ray"
    best = plain if not num_gpus else "ipc" if colocated else "nccl"
    one = wanted if wanted != "auto" else best
    if one == "shm" and num_hosts > 1:
        raise UserError(f"rollout.transport=shm needs ranks and engines on one host, they are on {num_hosts}; use ray")
    if one == "gloo" and num_hosts > 1 and engine_tp > 1:  # they meet on the loopback: see rollout/engine.py
        raise UserError(
            f"rollout.transport=gloo between hosts needs rollout.engine_tp=1, not {engine_tp}: the processes of such "
            "an engine see their own host only; use ray"
        )
    problem = lacking if one in DIRECT else None
    if one == "ipc" and not paired:
        problem = problem or "an engine's GPU has no rank whose weights it could map"
    if problem and wanted != "auto":
        raise UserError(f"rollout.transport={wanted}: {problem}; use {plain}")
    chosen, line = (plain, f"{problem}: weights go by {plain} instead of {one}") if problem else (one, "")
    if chosen == "ray" and verify:
        line = f"{line}; " * bool(line) + "rollout.verify_weights compares nothing: weights go by ray"
    return chosen, line


class Transport:
    """Of one run. `workers` waits; `ranks` and `engines` are their Ray actors."""

    def __init__(self, config: Config, workers: Workers, ranks: list[Any]):
        self._config, self._workers, self._ranks = config, workers, ranks
        self._architecture = read_architecture(config.model.path)
        self._dtype = _DTYPES[config.model.dtype]
        self._bucket_bytes = config.rollout.bucket_mb * 2**20
        self._checksums = config.rollout.verify_weights

    def push(self, engines: list[Any], version: int) -> None:
        """The actor's weights now -> every one of `engines`; their next samples carry `version`."""
        self._workers.wait([engine.begin_weights.remote(version) for engine in engines])
        self._send(engines)
        self._workers.wait([engine.finish_weights.remote() for engine in engines])

    def _send(self, engines: list[Any]) -> None:
        raise NotImplementedError


class SharedMemory(Transport):
    def __init__(self, config: Config, workers: Workers, ranks: list[Any], engines: list[Any]):
        super().__init__(config, workers, ranks)
        buckets, size = plan_buckets(hf_shapes(self._architecture), self._dtype, self._bucket_bytes)
        path = shared_memory.create(size)
        try:
            workers.wait([worker.attach_weights.remote(path, buckets) for worker in [*ranks, *engines]])
        finally:
            path.unlink()
        self._num_buckets = len(buckets)

    def _send(self, engines: list[Any]) -> None:
        written = [
            [rank.write_weights.remote(index, self._checksums) for rank in self._ranks]
            for index in range(self._num_buckets)
        ]
        received = []
        for index, refs in enumerate(written):
            sums = _added(self._workers.wait(refs))
            received += [engine.receive_written.remote(index, sums) for engine in engines]
        self._workers.wait(received)


class Gathered(Transport):
    def _send(self, engines: list[Any]) -> None:
        settings = {"num_returns": "streaming", "_generator_backpressure_num_objects": 2}
        streams = {rank.weight_buckets.options(**settings).remote(self._bucket_bytes): rank for rank in self._ranks}
        received: list[list[Any]] = []
        for _, bucket in self._workers.drain(streams, fetch=False):
            received.append([engine.receive_bucket.remote(bucket) for engine in engines])
            if len(received) >= _BUCKETS_IN_FLIGHT:
                self._workers.wait(received.pop(0))
        self._workers.wait([ref for refs in received for ref in refs])


class Direct(Transport):
    """gloo, nccl and ipc. address: of the first rank's node; None: all on this host."""

    def __init__(
        self,
        config: Config,
        workers: Workers,
        ranks: list[Any],
        *,
        address: str | None,
        mapped: bool,
    ):
        super().__init__(config, workers, ranks)
        dims = Dims.of(config)
        self._dims, self._address, self._mapped = dims, address, mapped
        # The ranks of the first replica, in the order of the plan's senders: they have all weights.
        self._replica = [ranks[dims.rank(tp=tp, pp=pp)] for pp in range(dims.pp) for tp in range(dims.tp)]
        self._receivers: list[Any] = []

    def push(self, engines: list[Any], version: int) -> None:
        if engines != self._receivers:  # at first, and when one has died
            self._map(engines) if self._mapped else self._join(engines)
            self._receivers = list(engines)
        senders = self._ranks if self._mapped else self._replica
        sent = [rank.send_weights.remote(self._checksums) for rank in senders]
        taken = [engine.take_weights.remote(version, self._checksums) for engine in engines]
        answers = self._workers.wait([*sent, *taken])
        if self._checksums:
            compare([answers[senders.index(rank)] for rank in self._replica], answers[len(sent) :])

    def _plan(self) -> Any:
        plan = plan_packed(
            self._architecture, tp=self._dims.tp, pp=self._dims.pp, dtype=self._dtype, bucket_bytes=self._bucket_bytes
        )
        return ray.put(plan)

    def _join(self, engines: list[Any]) -> None:
        """One group: the senders, then the processes of each engine."""
        timeout, per_engine = self._config.parallel.timeout_s, self._config.rollout.engine_tp
        meeting = self._workers.wait([self._replica[0].open_meeting.remote(self._address, timeout)])[0]
        plan, first = self._plan(), len(self._replica)
        size = first + len(engines) * per_engine
        self._workers.wait(
            [rank.join_engines.remote(plan, meeting, size) for rank in self._replica]
            + [
                engine.join_ranks.remote(plan, meeting, first + i * per_engine, size)
                for i, engine in enumerate(engines)
            ]
        )

    def _map(self, engines: list[Any]) -> None:
        """Each engine process maps the buffers of the rank on its GPU."""
        timeout, plan = self._config.parallel.timeout_s, self._plan()
        used = {one for ids in self._workers.wait([engine.device_ids.remote() for engine in engines]) for one in ids}
        ids = self._workers.wait([rank.device_id.remote() for rank in self._ranks])
        offers = self._workers.wait(
            [rank.offer_buffers.remote(plan, timeout, own in used) for rank, own in zip(self._ranks, ids, strict=True)]
        )
        offered = [offer for offer in offers if offer is not None]
        self._workers.wait([engine.map_buffers.remote(plan, offered) for engine in engines])


def compare(sent: list[dict[str, int]], taken: list[list[dict[str, int]]]) -> None:
    """Raises RunFailure for the first tensor whose checksum, added up over the senders, is not the one of each process
    of each engine."""
    expected = _added(sent)
    for arrived in (sums for engine in taken for sums in engine):
        compare_checksums(expected, arrived)


def _added(parts: list[dict[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def start(
    config: Config,
    workers: Workers,
    ranks: list[Any],
    engines: list[Any],
    *,
    num_gpus: int,
    colocated: bool,
    address: Any,
) -> tuple[Transport, str]:
    """The transport that config.rollout.transport asks for, ready for pushes; and `choose`'s line for the user."""
    wanted = config.rollout.transport
    num_hosts = len(set(workers.wait([worker.host.remote() for worker in [*ranks, *engines]])))
    lacking, paired = None, False
    if wanted in DIRECT or (wanted == "auto" and num_gpus):
        lacking = workers.wait([engines[0].lacking.remote()])[0]
        used = [one for ids in workers.wait([engine.device_ids.remote() for engine in engines]) for one in ids]
        there = workers.wait([rank.device_id.remote() for rank in ranks])
        paired = len(set(used)) == len(used) and set(used) <= set(there)
    chosen, line = choose(
        wanted,
        num_gpus=num_gpus,
        colocated=colocated,
        num_hosts=num_hosts,
        lacking=lacking,
        paired=paired,
        engine_tp=config.rollout.engine_tp,
        verify=config.rollout.verify_weights,
    )
    if chosen == "ray":
        return Gathered(config, workers, ranks), line
    if chosen == "shm":
        return SharedMemory(config, workers, ranks, engines), line
    return Direct(config, workers, ranks, address=address, mapped=chosen == "ipc"), line
