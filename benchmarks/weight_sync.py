"""A weight push on one host: from the actor's ranks until the bytes lie in the engine's process.

    python benchmarks/weight_sync.py [--quick] [--json FILE]

Ours: every rank writes its boxes of every tensor into memory that the engine has mapped, bucket by bucket; the engine
is told of each bucket and looks at it. The peer is the common way: parameter by parameter, gathered over the tensor
ranks, converted, and handed over in shared memory of its own (torch.multiprocessing). The floor is one copy of the
same bytes between two resident buffers with as many threads as there are ranks. The engine's own time to load and
prepack what it was given is reported beside it, with a real vLLM engine.

One layout at a time: a rank holds bf16 weights and nothing else, and the largest model needs 12 GiB.
"""

from __future__ import annotations

import atexit
import itertools
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's own programs: launch/ is not installed

from benchmarks.harness import Benchmark, Case, main  # noqa: E402
from benchmarks.models.qwen2 import QWEN_1_5B  # noqa: E402
from launch.fetch_model import fetch_smollm2  # noqa: E402
from or1_megatron.architecture import read_architecture  # noqa: E402
from or1_megatron.parallel import device, shared_memory  # noqa: E402
from or1_megatron.parallel.bucket import plan_buckets, slot_view  # noqa: E402
from or1_megatron.parallel.hf_files import write_hf  # noqa: E402
from or1_megatron.parallel.layout import hf_shapes  # noqa: E402
from or1_megatron.recipe import from_tree  # noqa: E402

BUCKET_BYTES = 128 * 2**20
WAITING_TENSORS = 8  # of the peer; without a limit a fast sender would fill the memory


def _rank(
    rank: int, meeting: str, model: Path, degrees: dict[str, int], shared: Path, buckets: list, pipe: Any, queue: Any
) -> None:
    """One actor rank: weights only, no optimizer. Answers `ours` and `per_parameter`."""
    device.install()
    torch.set_num_threads(1)
    device.init_process_group(meeting, rank, degrees["num_ranks"], 600)
    from or1_megatron.actor.mesh import build_mesh
    from or1_megatron.actor.model import build_model
    from or1_megatron.actor.weights import WeightSource
    from or1_megatron.parallel.dims import Dims

    tree = {"model": {"path": str(model), "dtype": "bf16"}, "parallel": degrees, "rollout": {"context_length": 64}}
    config = from_tree([("benchmark", tree)])
    architecture = read_architecture(model)
    mesh = build_mesh(Dims.of(config), rank, 0, 600)
    source = WeightSource(build_model(config, architecture, mesh), architecture, mesh, fused_norms=False)
    source.attach(shared, buckets)
    pipe.send("ready")
    for command in iter(pipe.recv, None):
        if command == "ours":
            for index in range(len(buckets)):
                source.write(index, checksums=False)
                pipe.send(index)
        else:
            for name, tensor in itertools.chain.from_iterable(source._gathered()):
                if mesh.coordinates.tp == 0:
                    queue.put((name, tensor.contiguous()))
            queue.put(None)


class Push:
    """The ranks of one layout, and the engine's side in this process."""

    def __init__(self, model: Path, tp: int, pp: int):
        shapes = hf_shapes(read_architecture(model))
        self.buckets, self.size = plan_buckets(shapes, torch.bfloat16, BUCKET_BYTES)
        self.num_tensors, self._ranks = len(shapes), tp * pp
        path = shared_memory.create(self.size)
        self._data = shared_memory.attach(path)
        with tempfile.NamedTemporaryFile(prefix="or1-bench-") as name:
            meeting = f"file://{name.name}"
        context = multiprocessing.get_context("spawn")
        self._queue = torch.multiprocessing.get_context("spawn").Queue(WAITING_TENSORS)
        self._pipes, self._processes = [], []
        degrees = {"num_ranks": tp * pp, "tp": tp, "pp": pp}
        for rank in range(tp * pp):
            mine, theirs = context.Pipe()
            arguments = (rank, meeting, model, degrees, path, self.buckets, theirs, self._queue)
            self._processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()  # so that a rank's death ends a wait for it
            self._pipes.append(mine)
        assert [pipe.recv() for pipe in self._pipes] == ["ready"] * tp * pp
        path.unlink()

    def ours(self) -> None:
        for pipe in self._pipes:
            pipe.send("ours")
        for slots in self.buckets:
            for pipe in self._pipes:
                pipe.recv()
            for slot in slots:
                slot_view(self._data, slot)

    def per_parameter(self) -> None:
        for pipe in self._pipes:
            pipe.send("per_parameter")
        received, ended = 0, 0
        while ended < self._ranks:
            item = self._queue.get()
            ended, received = ended + (item is None), received + (item is not None)
        assert received == self.num_tensors, (received, self.num_tensors)

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join()


def one_copy(size: int, threads: int) -> Callable[[], float]:
    source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))

    def run() -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - started

    return run


@contextmanager
def random_model(description: dict[str, Any], tokenizer: Path) -> Iterator[Path]:
    """A Hugging Face directory of random bf16 weights, written tensor by tensor; the tokenizer is another model's."""
    with tempfile.TemporaryDirectory(prefix="or1-bench-") as directory:
        path = Path(directory)
        (path / "config.json").write_text(json.dumps(description))
        for file in tokenizer.glob("tokenizer*"):
            shutil.copy(file, path)
        architecture = read_architecture(path)
        shapes = hf_shapes(architecture)
        write_hf(
            path,
            architecture,
            dict.fromkeys(shapes, torch.bfloat16),
            lambda entry: ((n, torch.empty(shapes[n], dtype=torch.bfloat16).normal_(std=0.02)) for n in entry.hf),
            max_shard_bytes=2**40,
            num_threads=1,
            advance=lambda written: None,
        )
        yield path


def _engine_process(model: Path, pipe: Any) -> None:
    """Answers each message with the seconds of one push whose weights already lie in this process."""
    from or1_megatron.rollout.engine import EngineSpec
    from or1_megatron.rollout.worker import RolloutWorker

    worker = RolloutWorker(EngineSpec(str(model), "bf16", 64, 0, 0.1, 0.3, 512, True, 2))
    buckets, size = plan_buckets(hf_shapes(read_architecture(model)), torch.bfloat16, BUCKET_BYTES)
    path = shared_memory.create(size)
    worker.attach_weights(path, buckets)
    path.unlink()
    while pipe.recv():
        started = time.perf_counter()
        worker.begin_weights(1)
        for index in range(len(buckets)):
            worker.receive_written(index, {})
        worker.finish_weights()
        pipe.send(time.perf_counter() - started)


@contextmanager
def engine_load(model: Path) -> Iterator[Callable[[], float]]:
    """A real engine in a process of its own; the call gives the seconds in which it loads and prepacks a push."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_engine_process, args=(model, theirs))
    process.start()
    theirs.close()  # so that the engine's death ends a wait for it

    def run() -> float:
        mine.send(True)
        return mine.recv()

    yield run
    mine.send(False)
    process.join()


def build(bench: Benchmark, quick: bool) -> None:
    smollm2 = fetch_smollm2(Path(__file__).parents[1] / ".cache" / "models")
    folder = ExitStack()
    atexit.register(folder.close)

    @cache
    def qwen() -> Path:
        return folder.enter_context(random_model(QWEN_1_5B, smollm2))

    for tp, pp in [(1, 1)] if quick else [(1, 1), (3, 1), (1, 2)]:
        bench.part(partial(_push, bench, "SmolLM2-135M", lambda: smollm2, tp, pp))
    if not quick:
        for tp, pp in [(1, 1), (2, 1), (1, 2)]:
            bench.part(partial(_push, bench, "Qwen2.5-1.5B", qwen, tp, pp), rounds=3)
        bench.part(partial(_engine, bench, "SmolLM2-135M", lambda: smollm2))
        bench.part(partial(_engine, bench, "Qwen2.5-1.5B", qwen), rounds=3)


def _engine(bench: Benchmark, name: str, model: Callable[[], Path]) -> None:
    run = bench.stack.enter_context(engine_load(model()))
    bench.case(f"engine: load and prepack {name}", run, amount=1, unit="pushes")


def _push(bench: Benchmark, name: str, model: Callable[[], Path], tp: int, pp: int) -> None:
    push = Push(model(), tp, pp)
    bench.stack.callback(push.close)
    amount = {"amount": push.size / 2**30, "unit": "GiB"}
    label = f"{name} tp={tp} pp={pp}"
    ours = bench.case(f"or1_megatron, {label}", push.ours, **amount)
    peer = bench.case(f"per parameter, {label}", push.per_parameter, kind="peer", **amount)
    copied = min(push.size, 2**30)
    copy = bench.case(f"one copy, {label}", one_copy(copied, tp * pp), "floor", copied / 2**30, "GiB")
    key = f"{name.partition('-')[0].lower()}_tp{tp}_pp{pp}"
    bench.mark(f"{key}_share_of_copy", _share(ours, copy), target=0.5)
    bench.mark(f"{key}_over_per_parameter", _share(ours, peer), target=5)
    bench.note(f"{label}: {push.num_tensors} tensors, {push.size / 2**20:.0f} MiB, {len(push.buckets)} buckets")


def _share(ours: Case, other: Case) -> Callable[[], float]:
    return lambda: ours.rate / other.rate


if __name__ == "__main__":
    main("weight_sync", "Weight push of bf16 weights from the actor's ranks into the engine's process", build)
