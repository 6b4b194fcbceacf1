"""Log-probability, entropy and gradient of a vocabulary of 152,064: ours, the RL systems' functions and naive torch;
and the fused LM head against its three matrix products alone.

    python benchmarks/vocab_loss.py [--quick] [--json FILE]

Every method gets the same logits, labels and weights, in one process of two threads, or with the vocabulary on two
ranks of one thread. Each is measured under both regimes of glibc's malloc: `default`, where large tensors are mapped
and faulted in anew each time, and `kept`, where freed memory is kept for the next. Extra memory is the growth of the
resident set over the logits, gradient included; the entropy's error is against float64.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Benchmark, Case, main  # noqa: E402
from benchmarks.peers.vocabulary import NAIVE, OURS, RL_SYSTEMS, methods  # noqa: E402
from or1_megatron.parallel import device, vocab_head  # noqa: E402
from or1_megatron.parallel.vocab import Shard  # noqa: E402
from or1_megatron.reward.isolation import die_with_parent  # noqa: E402

VOCAB, HEAD_VOCAB, HIDDEN = 152_064, 151_936, 896
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REGIMES = {
    "default": {},
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 60), "MALLOC_ARENA_MAX": "1"},
}


@dataclass(frozen=True)
class Column:
    """One column of the table: T tokens, V logits of a rank, on `tp` ranks."""

    tokens: int
    vocab: int
    dtype: str
    tp: int = 1

    def __str__(self) -> str:
        return f"{self.dtype} T={self.tokens} V={self.vocab}" + (f" x{self.tp} ranks" if self.tp > 1 else "")


QUICK = [Column(128, VOCAB, "bf16")]
FULL = [
    *(
        Column(tokens, vocab, dtype)
        for dtype in DTYPES
        for tokens, vocab in ((128, VOCAB), (512, VOCAB), (512, 38_016))
    ),
    Column(128, VOCAB // 2, "fp32", tp=2),
    Column(128, VOCAB // 2, "bf16", tp=2),
]


class Logits:
    """One column's tensors, and every method on them."""

    def __init__(self, column: Column, group: Any, rank: int):
        generator = torch.Generator().manual_seed(rank)
        self._master = (torch.randn(column.tokens, column.vocab, generator=generator) * 4).to(DTYPES[column.dtype])
        self._logits = self._master.clone()
        same = torch.Generator().manual_seed(7)
        self._labels = torch.randint(0, column.vocab * column.tp, (column.tokens,), generator=same)
        self._a, self._b = (torch.randn(column.tokens, generator=same) for _ in range(2))
        self._group = group
        self._methods = methods(column.tp)

    def names(self) -> list[str]:
        return list(self._methods)

    def run(self, name: str) -> float:
        """Seconds."""
        return self._measure(name)[0]

    def entropy_error(self, name: str) -> float:
        """Largest, in nats, against float64; of one rank's columns when it has all."""
        exact = torch.log_softmax(self._master.double(), -1)
        exact = -(exact.exp() * exact).sum(-1)
        return float((self._measure(name)[1].double() - exact).abs().max())

    def extra_memory(self, name: str) -> float:
        """Growth of the resident set at its peak, as a share of the logits' bytes."""
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        self._measure(name)
        return (_resident("VmHWM") - before) / self._master.nbytes

    def _measure(self, name: str) -> tuple[float, torch.Tensor]:
        leaf = self._logits.copy_(self._master).requires_grad_()
        if self._group is not None:
            dist.barrier(self._group)
        started = time.perf_counter()
        entropy, _ = self._methods[name](leaf, self._labels, self._a, self._b, self._group)
        seconds = time.perf_counter() - started
        leaf.grad = None
        self._logits = leaf.detach()
        return seconds, entropy


class Head:
    """The fused head of a batch, and its three products alone, chunk by chunk like it."""

    def __init__(self, tokens: int, dtype: str):
        generator = torch.Generator().manual_seed(0)
        kind = DTYPES[dtype]
        self._hidden = torch.randn(tokens, HIDDEN, generator=generator).to(kind).requires_grad_()
        self._weight = (torch.randn(HEAD_VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5 * 3).to(kind)
        self._weight_grad = torch.zeros(HEAD_VOCAB, HIDDEN)
        self._product = torch.empty_like(self._weight)
        self._square, self._square_product = (torch.randn(2048, 2048, generator=generator).to(kind) for _ in range(2))
        self._hidden_grad = torch.empty_like(self._hidden)
        self._labels = torch.randint(0, HEAD_VOCAB, (tokens,), generator=generator)
        self._advantages = torch.randn(tokens, generator=generator)

    def head(self) -> float:
        def token_loss(log_probs: torch.Tensor, entropy: torch.Tensor, rows: slice) -> torch.Tensor:
            return -(log_probs * self._advantages[rows] + 0.01 * entropy).sum()

        started = time.perf_counter()
        shard = Shard(HEAD_VOCAB)
        loss = vocab_head.head_loss(self._hidden, self._weight, self._weight_grad, self._labels, shard, token_loss)[0]
        loss.backward()
        seconds = time.perf_counter() - started
        self._hidden.grad = None
        return seconds

    def products(self) -> float:
        hidden, buffer = self._hidden.detach(), vocab_head.logits_buffer
        started = time.perf_counter()
        for rows in vocab_head.chunks(len(hidden), self._weight):
            logits = torch.mm(hidden[rows], self._weight.t(), out=buffer(len(hidden[rows]), self._weight))
            torch.mm(logits, self._weight, out=self._hidden_grad[rows])
            torch.mm(logits.t(), hidden[rows], out=self._product)
        return time.perf_counter() - started

    def extra_memory(self) -> float:
        """As a share of the bytes of the batch's logits, with the buffer for a chunk counted; the compiler that the
        first call loads is not."""
        self.head()
        vocab_head.forget_buffers()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        self.head()
        return (_resident("VmHWM") - before) / (len(self._hidden) * HEAD_VOCAB * self._weight.element_size())

    def large_product(self) -> float:
        """Seconds of 2 * 2048^3 operations."""
        started = time.perf_counter()
        torch.mm(self._square, self._square, out=self._square_product)
        return time.perf_counter() - started


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _serve(pipe: Connection, rank: int, tp: int, meeting: str, subject: type, arguments: tuple[Any, ...]) -> None:
    """Body of a process: answers (method, arguments)."""
    die_with_parent()
    torch.set_num_threads(2 // tp)
    group = None
    if subject is Logits:
        device.install()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=tp)
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tp)  # for the peers that ask it for the ranks
        group = dist.group.WORLD if tp > 1 else None
        arguments = (*arguments, group, rank)
    served = subject(*arguments)
    for method, *values in iter(pipe.recv, None):
        pipe.send(getattr(served, method)(*values))


class Ranks:
    """One process, or one per rank of the vocabulary, under a regime of malloc."""

    def __init__(self, bench: Benchmark, regime: str, tp: int, subject: type, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        directory = bench.stack.enter_context(tempfile.TemporaryDirectory(prefix="or1-bench-"))
        self._pipes = []
        with _environment(REGIMES[regime]):
            for rank in range(tp):
                mine, theirs = context.Pipe()
                body = (theirs, rank, tp, f"file://{directory}/meeting", subject, arguments)
                process = context.Process(target=_serve, args=body, daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(mine)
        bench.stack.callback(self.close)

    def ask(self, *request: Any) -> Any:
        """The slowest rank's number; names are the same on all."""
        for pipe in self._pipes:
            pipe.send(request)
        return max(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)


@contextmanager
def _environment(values: dict[str, str]) -> Any:
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def build(bench: Benchmark, quick: bool) -> None:
    for column in QUICK if quick else FULL:
        for regime in REGIMES:
            bench.part(partial(_compare, bench, column, regime))
    slow = device.slow_in_bf16()
    if slow and quick:
        bench.note("head in bf16 left out: this CPU emulates bf16 products")
    elif slow:
        bench.note("head in bf16 with 32 tokens, three times, without its memory: this CPU emulates bf16 products")
        bench.part(partial(_compare_head, bench, 32, "bf16", None), rounds=3)
    else:
        bench.part(partial(_compare_head, bench, 512 if quick else 8192, "bf16", None if quick else 8192))
    if not quick:
        bench.part(partial(_compare_head, bench, 1024, "fp32", 4096))


def _compare(bench: Benchmark, column: Column, regime: str) -> None:
    ranks = Ranks(bench, regime, column.tp, Logits, column)
    cases: dict[str, Case] = {}
    for name in ranks.ask("names"):
        kind = "ours" if name.startswith("or1") else "peer"
        label = f"{column} {regime}: {name}"
        cases[name] = bench.case(label, lambda name=name: ranks.ask("run", name), kind, column.tokens, "tokens")
        ranks.ask("run", name)  # compiles
        if regime == "default" and column.tp == 1:
            error, extra = (ranks.ask(fact, name) for fact in ("entropy_error", "extra_memory"))
            cases[name].remark = f"entropy off by {error:.1e}, extra memory {100 * extra:.0f} %"
            assert name != NAIVE or extra > 1, f"{name} shows {extra} of extra memory: malloc keeps what it frees"
            if name == OURS:
                bench.mark(_mark(column, regime, "entropy_error"), lambda error=error: error, 1e-5, "lower")
                bench.mark(_mark(column, regime, "extra_memory"), lambda extra=extra: extra, 0.1, "lower")
    rivals = [cases[name] for name in RL_SYSTEMS if name in cases]
    if rivals:
        best: Callable[[], float] = lambda: min(case.best for case in rivals)  # noqa: E731
        bench.mark(_mark(column, regime, "over_rl_systems"), lambda: best() / cases[OURS].best, 2.0)
    if NAIVE in cases:
        bench.mark(_mark(column, regime, "over_naive"), lambda: cases[NAIVE].best / cases[OURS].best, 1.0)


def _mark(column: Column, regime: str, what: str) -> str:
    return f"{column}_{regime}_{what}".replace(" ", "_").replace("=", "")


def _compare_head(bench: Benchmark, tokens: int, dtype: str, memory_tokens: int | None) -> None:
    ranks = Ranks(bench, "default", 1, Head, tokens, dtype)
    label = f"head {dtype} T={tokens} H={HIDDEN} V={HEAD_VOCAB}"
    head = bench.case(f"{label}: or1_megatron fused", lambda: ranks.ask("head"), "ours", tokens, "tokens")
    floor = bench.case(f"{label}: three products", lambda: ranks.ask("products"), "floor", tokens, "tokens")
    flops = 6 * tokens * HIDDEN * HEAD_VOCAB
    floor.remark = lambda: f"{flops / floor.best / 1e9:.0f} GFLOP/s"
    bench.case(f"{dtype} product of 2048^3", lambda: ranks.ask("large_product"), "floor", 2 * 2048**3 / 1e9, "GFLOP")
    bench.mark(f"head_{dtype}_over_products", lambda: head.best / floor.best, 1.15, "lower")
    if memory_tokens:
        extra = Ranks(bench, "default", 1, Head, memory_tokens, dtype).ask("extra_memory")
        bench.mark(f"head_{dtype}_T{memory_tokens}_extra_memory", lambda: extra, 0.1, "lower")


if __name__ == "__main__":
    main("vocab_loss", "Log-probs, entropy and gradient from logits, and the fused LM head", build)
