"""From logits to log-probs, entropy and gradient, against 6 bytes an element; and the fused head against its three
matrix products. Shape letters: T tokens, V columns, H hidden size.

Logits are drawn anew before each run, outside of the time: the gradient overwrites them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.clock import Part, attempt, extra_bytes, seconds
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness import Benchmark, Case
from benchmarks.peers.vocabulary import NAIVE, OURS, RL_SYSTEMS, methods
from or1_megatron.parallel import vocab_head
from or1_megatron.parallel.device import device
from or1_megatron.parallel.vocab import Shard, combine, write_gradient
from or1_megatron.parallel.weight_gradients import add_product

SCALE = 4.0  # standard deviation of the logits
HEAD_EXTRA_BYTES = 200e6


def logits_parts(sizes: Sizes, ceilings: Ceilings, facts: dict[str, Any]) -> list[Part]:
    """One per shape."""
    _find_peers()
    return [partial(_logits, tokens, columns, ceilings) for tokens, columns in sizes.logits]


def head_parts(sizes: Sizes, ceilings: Ceilings, facts: dict[str, Any]) -> list[Part]:
    _find_peers()
    return [partial(_head, sizes, ceilings)]


def _find_peers() -> None:
    """Where the Makefile puts them; not for whoever only imports this: a `tests` is among them."""
    if (folder := f"{sys.prefix}/peers") not in sys.path:
        sys.path.append(folder)


def _logits(tokens: int, columns: int, ceilings: Ceilings, bench: Benchmark) -> None:
    """Statistics, gradient in place, both; the peers; the entropy's error."""
    here, shape = device(), f"T={tokens} V={columns}"
    logits = torch.empty(tokens, columns, dtype=torch.bfloat16, device=here)
    labels = torch.randint(0, columns, (tokens,), device=here)
    a, b = (torch.randn(tokens, device=here) for _ in range(2))
    shard = Shard(columns)

    def fresh() -> torch.Tensor:
        with torch.no_grad():
            return logits.normal_(std=SCALE)

    def floor_share(num_bytes: int, median: float) -> float:
        return num_bytes * logits.numel() / ceilings.bytes_per_s / median

    def statistics() -> float:
        fresh()
        return seconds(lambda: combine(logits, labels, shard))

    def gradient() -> float:
        found = combine(fresh(), labels, shard)
        rest = (found.top_T, found.total_T, found.centred_T, a, b)
        return seconds(lambda: write_gradient(logits, labels, shard, *rest, out_TV=logits))

    for label, run, num_bytes in (("statistics", statistics, 2), ("gradient in place", gradient, 4)):
        case = attempt(bench, f"{shape} {label}", run, "ours", tokens, "tokens")
        if case:
            case.remark = lambda case=case, num_bytes=num_bytes: (
                f"{floor_share(num_bytes, case.median):.0%} of {num_bytes} B/element"
            )
    ways = {name: way for name, way in methods(1).items() if name in (OURS, NAIVE, *RL_SYSTEMS)}
    for name, way in ways.items():
        run = partial(_whole, way, fresh, labels, a, b)
        kind = "ours" if name == OURS else "peer"
        case = attempt(bench, f"{shape} {name}", run, kind, tokens, "tokens")
        if case:
            extra = extra_bytes(run) / logits.nbytes
            error = _entropy_error(way, fresh()[:64].clone(), labels[:64], a[:64], b[:64])
            case.remark = lambda case=case, extra=extra, error=error: (
                f"{floor_share(6, case.median):.0%} of 6 B/element; {extra:.2f} x the logits extra; "
                f"entropy off by {error:.0e}"
            )
        if case and name == OURS:
            mark = f"logits_T{tokens}_V{columns}_share_of_floor"
            bench.mark(mark, lambda case=case: floor_share(6, case.median), 0.75)
    for name in RL_SYSTEMS:
        if name not in ways:
            bench.note(f"{shape} {name}: not installed")


def _whole(way: Callable[..., Any], fresh: Callable[[], torch.Tensor], *rest: torch.Tensor) -> float:
    leaf = fresh().detach().requires_grad_()
    return seconds(lambda: way(leaf, *rest, None))


def _entropy_error(way: Callable[..., Any], logits_TV: torch.Tensor, *rest: torch.Tensor) -> float:
    """Largest, in nats, against float64."""
    scores = torch.log_softmax(logits_TV.double(), -1)
    exact = -(scores.exp() * scores).sum(-1)
    entropy, _ = way(logits_TV.requires_grad_(), *rest, None)
    return float((entropy.double() - exact).abs().max())


class Head:
    """Hidden states, weight and labels of one batch, and ways to log-probs, entropy and all gradients."""

    def __init__(self, tokens: int, hidden_size: int, vocab: int):
        here = device()
        self.hidden = torch.empty(tokens, hidden_size, dtype=torch.bfloat16, device=here)
        self.weight = (torch.randn(vocab, hidden_size, device=here) * (3 / hidden_size**0.5)).bfloat16()
        self.weight_grad = torch.zeros(vocab, hidden_size, device=here)
        self.labels = torch.randint(0, vocab, (tokens,), device=here)
        self.advantages = torch.randn(tokens, device=here)

    def run(self, way: Callable[[], Any]) -> float:
        with torch.no_grad():
            self.hidden.normal_()
        spent = seconds(way)
        self.hidden.grad = self.weight.grad = None
        return spent

    def fused(self) -> None:
        def token_loss(log_probs: torch.Tensor, entropy: torch.Tensor, rows: slice) -> torch.Tensor:
            return -(log_probs * self.advantages[rows] + 0.01 * entropy).sum()

        leaf = self.hidden.detach().requires_grad_()
        shard = Shard(len(self.weight))
        vocab_head.head_loss(leaf, self.weight, self.weight_grad, self.labels, shard, token_loss)[0].backward()

    def products_of_all(self, weight_grad: torch.Tensor) -> None:
        """The three products alone, of all tokens at once."""
        logits = self.hidden @ self.weight.t()
        torch.mm(logits, self.weight)
        torch.mm(logits.t(), self.hidden, out=weight_grad)

    def products(self, add: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        """The same, chunk by chunk like `fused`; `add` makes the weight's."""
        hidden_grad = torch.empty_like(self.hidden)
        for rows in vocab_head.chunks(len(self.hidden), self.weight):
            hidden = self.hidden[rows]
            logits = torch.mm(hidden, self.weight.t(), out=vocab_head.logits_buffer(len(hidden), self.weight))
            torch.mm(logits, self.weight, out=hidden_grad[rows])
            add(logits.t(), hidden)

    def by_autograd(self, pair: Callable[..., Any]) -> None:
        """pair(hidden, weight, labels) -> log-probs and entropy, or None in the place of an entropy."""
        hidden, weight = (x.detach().requires_grad_() for x in (self.hidden, self.weight))
        log_probs, entropy = pair(hidden, weight, self.labels)
        loss = -(log_probs.float() * self.advantages).sum()
        (loss if entropy is None else loss - 0.01 * entropy.sum()).backward()


def _head(sizes: Sizes, ceilings: Ceilings, bench: Benchmark) -> None:
    """The fused head, its products without and with the sum of the weight's gradient, and the peers."""
    tokens, hidden_size, vocab = sizes.head
    batch = Head(tokens, hidden_size, vocab)
    flops = 6 * tokens * hidden_size * vocab
    amount = (tokens, "tokens")
    head = attempt(bench, "fused head", partial(batch.run, batch.fused), "ours", *amount)
    product = torch.empty_like(batch.weight)
    ways = {
        "three products": partial(batch.products_of_all, product),
        "three products, in chunks": partial(batch.products, lambda grad, hidden: torch.mm(grad, hidden, out=product)),
        "three products, in chunks, the weight's added up in float32": partial(
            batch.products, partial(add_product, batch.weight_grad)
        ),
    }
    floors = []
    for label, way in ways.items():
        case = attempt(bench, label, partial(batch.run, way), "floor", *amount)
        if case:
            floors.append(case)
            case.remark = lambda case=case: f"{flops / case.median / ceilings.flops:.0%} of the bf16 product's rate"
    peers = _head_peers(bench, batch, amount)
    if not head:
        return
    vocab_head.forget_buffers()
    extra = extra_bytes(batch.fused) - batch.hidden.nbytes  # the hidden states' gradient is a result
    head.remark = f"{extra / 1e6:.0f} MB extra"
    bench.mark("head_extra_MB", lambda: extra / 1e6, HEAD_EXTRA_BYTES / 1e6, "lower")
    if floors:
        bench.mark("head_over_products", lambda: head.median / min(case.median for case in floors), 1.10, "lower")
    if peers:
        fastest = lambda: min(peers, key=lambda pair: pair[0].median)  # noqa: E731
        bench.mark("head_over_fastest_peer", lambda: fastest()[0].median / head.median, 1.3)
        # Where it is no faster, it should need a tenth of the memory.
        bench.mark("head_extra_of_fastest_peers", lambda: extra / max(1, fastest()[1]), 0.1, "lower")


def _head_peers(bench: Benchmark, batch: Head, amount: tuple[int, str]) -> list[tuple[Case, int]]:
    """Those that run, and the bytes that each needs beside inputs and gradients."""
    found = []
    results = batch.hidden.nbytes + batch.weight.nbytes
    for label, find in HEAD_PEERS.items():
        try:
            pair = find()
        except Exception as error:  # whatever a peer can lack here
            bench.note(f"{label}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        way = partial(batch.by_autograd, pair)
        case = attempt(bench, label, partial(batch.run, way), "peer", *amount)
        if case:
            extra = max(0, extra_bytes(way) - results)
            case.remark = f"{extra / 1e6:.0f} MB extra"
            found.append((case, extra))
    return found


def _naive() -> Callable[..., Any]:
    def pair(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.log_softmax(hidden @ weight.t(), -1)
        return scores.gather(-1, labels[:, None]).squeeze(-1), -(scores.exp() * scores).sum(-1)

    return pair


def _verl() -> Callable[..., Any]:
    """Its kernel alone, without the package's own imports: those want Ray."""
    if "verl" not in sys.modules and (spec := importlib.util.find_spec("verl")):
        sys.modules["verl"] = importlib.util.module_from_spec(spec)
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    return lambda hidden, weight, labels: module.linear_cross_entropy(hidden, weight, labels, 1.0, "none")


def _liger() -> Callable[..., Any]:
    """Cross-entropy alone: it has no entropy, and makes its gradients in the forward pass too."""
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    # A mean of equal weights: its gradients are made before the weights of the tokens could reach it.
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="mean")
    return lambda hidden, weight, labels: (-loss(weight, hidden, labels), None)


def _trl() -> Callable[..., Any]:
    module = importlib.import_module("trl.trainer.utils")
    return lambda hidden, weight, labels: module.selective_log_softmax_and_entropy(hidden @ weight.t(), labels)


HEAD_PEERS: dict[str, Callable[[], Callable[..., Any]]] = {
    "torch, naive": _naive,
    "verl linear_cross_entropy": _verl,
    "Liger FusedLinearCrossEntropy, no entropy": _liger,
    "TRL": _trl,
}
