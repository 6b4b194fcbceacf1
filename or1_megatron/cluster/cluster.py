"""The processes of a run, what is asked of them, and what happens when one dies.

One Ray actor per Megatron rank and one per engine. The driver only ever waits in workers.py, so a death is noticed
within seconds. It ends the run with that process's last log lines, except that of an engine during a rollout while
others are left: they take over its prompts. Leaving the context ends every process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from or1_megatron.cluster import joining, transport
from or1_megatron.cluster.placement import Placement, place
from or1_megatron.cluster.workers import Workers
from or1_megatron.config import Config
from or1_megatron.errors import RunFailure, UserError, WorkerDied
from or1_megatron.handover import ACTOR_PARTS, ENGINE_PARTS, Handover, Part, Phase
from or1_megatron.parallel.device import num_devices
from or1_megatron.parallel.dims import Dims
from or1_megatron.parallel.file_sums import FileSums
from or1_megatron.processes import ActorRank, EngineProcess
from or1_megatron.rollout.engine import SamplingSpec, engine_spec
from or1_megatron.types import Group, MicroBatch, Prompt, TokenValues, UpdateResult


def placed(config: Config, gpus_per_node: list[int], *, with_actor: bool = True) -> Placement:
    """Where each process goes. Raises UserError when the run cannot be on such nodes: too few GPUs, or a transport or
    an overlap that they do not allow."""
    rollout = config.rollout
    where = place(
        gpus_per_node,
        ranks=config.parallel.num_ranks if with_actor else 0,
        engines=rollout.num_engines,
        wanted=rollout.placement,
        engine_tp=rollout.engine_tp,
    )
    if with_actor:
        transport.check(rollout.transport, num_gpus=sum(gpus_per_node), colocated=where.colocated)
    if where.colocated and rollout.overlap:
        raise UserError("rollout.overlap=true needs engines beside the actor, but they take turns; use more GPUs")
    return where


def check_host(config: Config) -> None:
    """As `placed`, before Ray is started on this host. What a cluster to be joined has is known when it is joined."""
    if not joining.address_to_join():
        placed(config, [num_devices()])


def check_cuda(have: list[bool], hosts: list[str]) -> None:
    """Of each rank, whether it has CUDA, and where it is. Raises RunFailure when some have and others have not: these
    would join by gloo, and the others' NCCL would wait for them until its timeout."""
    if any(have) and not all(have):
        rank = have.index(False)
        raise RunFailure(f"CUDA does not start in rank {rank} on {hosts[rank]}; see nvidia-smi on that node")


class Cluster:
    """Context manager over the run's processes. Methods raise RunFailure, UserError or StopRequested."""

    def __init__(self, config: Config, run_dir: Path, *, with_actor: bool = True):
        self.config = config
        self.dims = Dims.of(config)
        self.stop_requested: Callable[[], bool] = lambda: False
        self.message: Callable[[str], None] = lambda text: None  # where the user is told of what the run survives
        self.answered: Callable[[float], None] = lambda share: None  # and of the share of a rollout that has ended
        self._run_dir = run_dir.absolute()  # of a folder that all nodes see
        self._with_actor = with_actor
        self._ranks: list[Any] = []
        self._engines: list[Any] = []
        self._workers = Workers(60 * config.deadline_minutes)
        self._handover: Handover | None = None
        self._transport: transport.Transport | None = None
        self._notice = ""  # for the user, once there is somewhere to tell it

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._ranks, *self._engines]:
            ray.kill(worker)
        ray.shutdown()

    def _start(self) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall the other processes of a host
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._joined = joining.enter(max(256, 4 * self.config.rollout.bucket_mb) * 2**20)
        self._nodes = joining.nodes()
        gpus = [node.gpus for node in self._nodes]
        where, num_gpus = placed(self.config, gpus, with_actor=self._with_actor), sum(gpus)
        self._launch_all(where)
        colocated = where.colocated
        devices = where.engine_devices or ((),) * len(self._engines)
        started = [
            engine.start.remote(engine_spec(self.config, i, colocated, devices[i]))
            for i, engine in enumerate(self._engines)
        ]
        if colocated:
            self._workers.wait(started)
            self._release(ENGINE_PARTS)
            self._handover = Handover(self._release, self._restore)
        address = self._nodes[where.nodes("rank")[0]].address if self._joined and self._ranks else None
        if self._with_actor:
            meeting = self._workers.wait([self._ranks[0].meeting_point.remote(address)])[0]
            have = self._workers.wait([rank.has_cuda.remote() for rank in self._ranks])
            check_cuda(have, [self._nodes[node].host for node in where.nodes("rank")])
            started += [rank.start.remote(self.config, i, meeting) for i, rank in enumerate(self._ranks)]
        self._workers.wait(started)
        if self._with_actor:
            sides = self.config, self._workers, self._ranks, self._engines
            self._transport, self._notice = transport.start(
                *sides, num_gpus=num_gpus, colocated=colocated, address=address
            )

    def _launch_all(self, where: Placement) -> None:
        """The kind with the larger share first: see placement.py."""
        for kind in sorted(("rank", "engine"), key=where.share, reverse=True):
            workers = [self._launch(kind, i, node, where.share(kind)) for i, node in enumerate(where.nodes(kind))]
            if kind == "rank":
                self._ranks = workers
            else:
                self._engines = workers
            self._workers.wait([worker.ping.remote() for worker in workers])

    def _launch(self, name: str, index: int, node: int, num_gpus: float) -> Any:
        log = self._run_dir / "logs" / f"{name}{index}.log"
        process = ray.remote({"rank": ActorRank, "engine": EngineProcess}[name])
        place = NodeAffinitySchedulingStrategy(self._nodes[node].id, soft=False)
        options = {"num_cpus": 0, "num_gpus": num_gpus, "max_restarts": 0, "scheduling_strategy": place}
        worker = process.options(**options).remote(str(log), self.config.profiling.trace_steps > 0)
        self._workers.add(worker, log)
        return worker

    def _enter(self, phase: Phase) -> None:
        if self._handover is not None:
            self._handover.enter(phase)

    def _release(self, parts: frozenset[Part]) -> None:
        self._move("release", parts)

    def _restore(self, parts: frozenset[Part]) -> None:
        self._move("restore", parts)

    def _move(self, method: str, parts: frozenset[Part]) -> None:
        sides = (self._ranks, sorted(parts & ACTOR_PARTS)), (self._engines, sorted(parts & ENGINE_PARTS))
        self._workers.wait(
            [getattr(worker, method).remote(mine) for workers, mine in sides if mine for worker in workers]
        )

    @property
    def num_engines(self) -> int:
        """Those that are left."""
        return len(self._engines)

    def generate(self, shares: list[list[Prompt]], group_size: int, sampling: SamplingSpec) -> Iterator[Group]:
        """Groups in the order they finish; `shares` are each engine's prompts. Those of an engine that has died or dies
        now go to the others."""
        self._enter(Phase.ROLLOUT)
        left: dict[Any, list[Prompt]] = {engine: [] for engine in self._engines}
        total = sum(map(len, shares))

        def ask(shares: list[list[Prompt]]) -> dict[Any, Any]:
            n, streams = len(self._engines), {}
            for i, engine in enumerate(self._engines):
                if mine := [prompt for share in shares[i::n] for prompt in share]:  # one call: two would queue up
                    left[engine] += mine
                    stream = engine.generate.options(num_returns="streaming").remote(mine, group_size, sampling)
                    streams[stream] = engine
            return streams

        def ask_others(died: WorkerDied) -> dict[Any, Any]:
            if not set(died.workers) < set(self._engines):
                raise died  # a rank, or the last engine
            orphans = [prompt for engine in died.workers for prompt in left.pop(engine)]
            self._engines = [engine for engine in self._engines if engine not in died.workers]
            n = len(self._engines)
            for engine in died.workers:
                self._workers.forget(engine)
                ray.kill(engine)  # it may only have been silent
            self.message(f"{died}; {len(orphans)} prompts go to the {n} engines left")
            return ask([orphans[i::n] for i in range(n)])

        streams = ask(shares)
        with self._workers.tending(self._engines):
            for engine, group in self._workers.drain(streams, stopped=self._stopped, replace=ask_others):
                uids = [prompt.uid for prompt in left[engine]]
                del left[engine][uids.index(group.prompt.uid)]
                self.answered(1 - sum(map(len, left.values())) / total)
                yield group

    def _stopped(self) -> bool:
        return self.stop_requested()  # which may be another one by then

    def push_weights(self, version: int) -> None:
        """Actor weights -> every engine, bucket by bucket; the engines' next samples carry `version`."""
        assert self._transport is not None, "a cluster without an actor has no weights to push"
        if self._notice:
            self.message(self._notice)
            self._notice = ""
        self._enter(Phase.PUSH)
        self._transport.push(self._engines, version)

    def engine_log_probs(self, tokens: list[int]) -> list[list[float]]:
        """Per engine, log-probs of tokens[1:] at temperature 1."""
        self._enter(Phase.ROLLOUT)
        return self._workers.wait([engine.prompt_log_probs.remote(tokens) for engine in self._engines])

    def log_probs(self, batches: list[list[MicroBatch]], temperature: float | None = None) -> list[list[TokenValues]]:
        """Per replica and micro-batch; `batches[dp]` are replica dp's micro-batches."""
        self._enter(Phase.SCORE)
        return self._reports("log_probs", batches, temperature=temperature)

    def reference_log_probs(self, batches: list[list[MicroBatch]], temperature: float) -> list[list[TokenValues]]:
        """As `log_probs`, of the model at model.path."""
        self._enter(Phase.SCORE)
        return self._reports("reference_log_probs", batches, temperature=temperature)

    def update(self, batches: list[list[MicroBatch]], **settings: Any) -> list[UpdateResult]:
        """One optimizer step; per replica its result. See MegatronActor.update."""
        self._enter(Phase.UPDATE)
        return self._reports("update", batches, **settings)

    def _reports(self, method: str, batches: list[list[MicroBatch]], **settings: Any) -> list[Any]:
        stored = [ray.put(mine) for mine in batches]
        mine = [stored[self.dims.coordinates(i).dp] for i in range(len(self._ranks))]
        results = self._workers.wait([r.call.remote(method, mine[i], **settings) for i, r in enumerate(self._ranks)])
        return [results[i] for i in self.dims.reporting_ranks()]

    def ask(self, method: str, *args: Any, ranks: Sequence[int] | None = None, engines: bool = True) -> dict[str, Any]:
        """The answers of these ranks (None: of every one), and of every engine, by name (rank0, engine0)."""
        asked = self._ranks if ranks is None else [self._ranks[rank] for rank in ranks]
        workers = [*asked, *(self._engines if engines else [])]
        answers = self._workers.wait([getattr(worker, method).remote(*args) for worker in workers])
        return {self._workers.name(worker): answer for worker, answer in zip(workers, answers, strict=True)}

    def peak_flops(self) -> float:
        """Of one actor rank's device; see parallel/device.py."""
        return self._workers.wait([self._ranks[0].call.remote("peak_flops")])[0]

    def shares_prompts(self) -> bool:
        """Whether the actor's packs may share prompts. Its ranks know: a driver may be where there is no GPU."""
        return self._workers.wait([self._ranks[0].call.remote("shares_prompts")])[0]

    def begin_save(self, directory: Path) -> None:
        """Returns when the actor may change again; its ranks' files are written in the background."""
        self._enter(Phase.CHECKPOINT)
        self._on_ranks("begin_save", directory)

    def save_written(self) -> float | None:
        """Seconds that the slowest rank's files took; None while there are some to be written."""
        took = self._on_ranks("save_written")
        return None if None in took else max(took)

    def finish_save(self) -> FileSums:
        """Waits for the files; bytes and CRC-32 of each. Raises UserError when the disk does not take them."""
        return {name: sums for files in self._on_ranks("finish_save") for name, sums in files.items()}

    def load(self, directory: Path) -> None:
        self._enter(Phase.CHECKPOINT)
        self._on_ranks("load", directory)

    def _on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        return self._workers.wait([rank.call.remote(method, *arguments) for rank in self._ranks])
