"""A GRPO step of ours beside TRL's GRPOTrainer: SmolLM2-135M, the same problems, batch, group and lengths.

    python benchmarks/end_to_end.py [--quick] [--json FILE]

Ours: one Megatron rank with fp32 main weights, one vLLM engine, Math-Verify in its service, weights pushed before each
rollout; MAGIC's loss with all groups kept. TRL: generation by transformers, its default loss, AdamW on the model's own
weights. Both are in bf16, or in fp32 on a CPU that emulates bf16; both have two threads, neither uses KL, both take one
optimizer step per rollout. No stop string: responses end at the limit, or with the end-of-sequence token. Memory is the
peak of what a side's processes hold (proportional set size).
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's own programs: launch/ is not installed

from benchmarks.harness import Benchmark, main, model_dtype  # noqa: E402
from launch.fetch_model import fetch_smollm2  # noqa: E402
from or1_megatron.architecture import read_architecture  # noqa: E402
from or1_megatron.data.prompts import load_prompts, load_tokenizer  # noqa: E402
from or1_megatron.data.tasks import write_addition_problems  # noqa: E402
from or1_megatron.recipe import from_tree  # noqa: E402
from or1_megatron.reward.isolation import die_with_parent  # noqa: E402

THREADS, GROUP, MICRO_BATCH = 2, 8, 16


def config_of(model: Path, problems: Path, dtype: str, batch: int, longest: int) -> Any:
    return from_tree([("benchmark", {
        "model": {"path": str(model), "dtype": dtype},
        "data": {"train": [str(problems)]},
        "parallel": {"token_budget": 1024, "cpu_threads_per_rank": THREADS},
        "loss": {"rejection": False},
        "entropy": {"rule": "off"},
        "reward": {"num_workers": 1},
        "rollout": {
            "rollout_batch_size": batch, "group_size": GROUP, "context_length": 128, "max_response_length": longest,
            "max_generated_factor": 1.0, "kv_cache_gb": 0.25, "max_batched_tokens": 2048, "probe_interval": 0,
        },
    })])  # fmt: skip


class Ours:
    """The parts of a run, as train.py uses them."""

    def __init__(self, model: Path, problems: Path, dtype: str, batch: int, longest: int, stack: contextlib.ExitStack):
        from or1_megatron.cluster import Cluster
        from or1_megatron.data.mixture import PromptMixture
        from or1_megatron.profiling.spans import Spans
        from or1_megatron.reward.service import RewardService
        from or1_megatron.rollout.schedule import LengthHistory
        from or1_megatron.update import Updater

        self.config = config_of(model, problems, dtype, batch, longest)
        architecture = read_architecture(model)
        prompts = load_prompts([str(problems)], load_tokenizer(str(model), architecture), context_length=128)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="or1-bench-")))
        self.rewards = stack.enter_context(RewardService(self.config.reward, scratch))
        self.cluster = stack.enter_context(Cluster(self.config, scratch))
        self.stream, self.spans = PromptMixture([prompts], [1.0], 0), Spans()
        self.updater, self.lengths, self.steps = (
            Updater(self.config, architecture, self.cluster, self.spans),
            LengthHistory(),
            0,
        )

    def step(self) -> dict[str, float]:
        from or1_megatron.collect import collect

        with self.spans.span("step"):
            with self.spans.span("sync"):
                self.cluster.push_weights(version=self.steps)
            rollout = collect(self.config, self.cluster, self.rewards, self.stream, self.spans, [], self.lengths)
            self.updater.step(rollout, alpha=0.0, learning_rate=1e-6)
        self.steps += 1
        seconds = {name.removeprefix("seconds/"): value for name, value in self.spans.take().items()}
        return {**seconds, "tokens": float(sum(len(sample.tokens) for sample in rollout.samples))}


def _serve_ours(pipe: Connection, model: Path, problems: Path, dtype: str, batch: int, longest: int) -> None:
    die_with_parent()
    with contextlib.ExitStack() as stack:
        subject = Ours(model, problems, dtype, batch, longest, stack)
        pipe.send("ready")
        while pipe.recv():
            pipe.send(subject.step())


def _serve_trl(pipe: Connection, model: Path, problems: Path, dtype: str, batch: int, longest: int) -> None:
    die_with_parent()
    from benchmarks.peers.grpo import Trl

    torch.set_num_threads(THREADS)
    tokenizer = load_tokenizer(str(model), read_architecture(model))
    prompts = load_prompts([str(problems)], tokenizer, context_length=128)
    subject = Trl(model, prompts, dtype, batch, GROUP, longest, MICRO_BATCH)
    pipe.send("ready")
    subject.next_step, subject.done = pipe.recv, pipe.send
    subject.serve()


class Side:
    """A process that takes one step when asked, and the memory of its whole tree meanwhile."""

    def __init__(self, serve: Any, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *arguments))
        self._process.start()
        theirs.close()
        self.steps: list[dict[str, float]] = []
        self.peak_bytes = 0
        self._closing = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        assert self._pipe.recv() == "ready"

    def _watch(self) -> None:
        mine = psutil.Process(self._process.pid)
        while not self._closing.wait(2.0):
            with contextlib.suppress(psutil.Error):
                tree = [mine, *mine.children(recursive=True)]
                self.peak_bytes = max(self.peak_bytes, sum(_held(process) for process in tree))

    def step(self) -> float:
        self._pipe.send(True)
        self.steps.append(self._pipe.recv())
        return self.steps[-1]["step"]

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._pipe.send(False)
        self._process.join(20)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def told(self, samples: int) -> str:
        """Phases of the median step, after the first."""
        steps = self.steps[1:]
        rollout = statistics.median(step["rollout"] for step in steps)
        tokens = statistics.median(step["tokens"] for step in steps)
        rest = statistics.median(step.get("update", step["step"] - step["rollout"]) for step in steps)
        return (
            f"rollout {rollout:.2f} s, {tokens / rollout:.0f} tokens/s; update {rest:.2f} s, {tokens / rest:.0f} "
            f"response tokens/s; {tokens / samples:.1f} tokens a response; peak {self.peak_bytes / 2**30:.1f} GiB"
        )


def _held(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.memory_full_info().pss
    return 0


def build(bench: Benchmark, quick: bool) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    model = fetch_smollm2(Path(__file__).parents[1] / ".cache" / "models")
    bench.part(partial(_compare, bench, model, 4 if quick else 8, 16 if quick else 32))


def _compare(bench: Benchmark, model: Path, batch: int, longest: int) -> None:
    folder = Path(bench.stack.enter_context(tempfile.TemporaryDirectory(prefix="or1-bench-")))
    problems = folder / "train.jsonl"
    write_addition_problems(problems, folder / "held_out.jsonl", seed=0)
    samples = batch * GROUP
    dtype = model_dtype()
    mine = Side(_serve_ours, model, problems, dtype, batch, longest)
    bench.stack.callback(mine.close)
    amount = {"amount": samples, "unit": "samples"}
    ours = bench.case("or1_megatron", mine.step, **amount)
    bench.note(
        f"{batch} prompts x {GROUP} responses of at most {longest} tokens a step in {dtype}, {THREADS} threads each"
    )
    bench.note(lambda: f"or1_megatron: {mine.told(samples)}")
    if importlib.util.find_spec("trl") is None:
        bench.note("peer TRL is not installed: make bench installs it, into .venv-bench")
        return
    theirs = Side(_serve_trl, model, problems, dtype, batch, longest)
    bench.stack.callback(theirs.close)
    peer = bench.case("TRL GRPOTrainer", theirs.step, kind="peer", **amount)
    bench.note(lambda: f"TRL: {theirs.told(samples)}")
    bench.mark("samples_over_trl", lambda: ours.median_rate / peer.median_rate, target=2.0)


if __name__ == "__main__":
    main("end_to_end", "One GRPO step, rollout to update, of SmolLM2-135M", build)
