"""The same batch in every layout of up to four ranks gives the same two optimizer steps as one process.

Every (tp, pp, cp, dp) with a product of 1, 2 or 4, with every recompute setting, token budget, packing and head.
Compared in float32: loss and gradient norm of both steps, log-probs and entropy of every response token under the
policy before each step, and the weights after both. The optimizer's eps is of the gradients' size; see
ranks_invariance.py.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from or1_megatron.types import Sequence
from tests.dense_reference import dense_step, token_quantities
from tests.parallel import ranks_invariance as ranks
from tests.parallel.gloo import run_ranks
from tests.parallel.ranks_invariance import Compared, Layout, Outcome, Packing
from tests.tiny_models import PAD, write_tiny_model

TOLERANCE = 1e-5
VOCAB = 301  # the last tensor rank's columns are partly padding
DEGREES = [degrees for degrees in itertools.product((1, 2, 4), repeat=4) if math.prod(degrees) <= 4]
PACKINGS = [Packing(name, budget) for name in ("planned", "dealt") for budget in (80, 200)]
SHARED = Packing("shared", 150)
QUANTITIES = ("loss", "log-probs", "entropy", "grad norm", "weights")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tied embeddings, which pipeline stages share; biases; grouped heads; a layer for each of four stages."""
    path = tmp_path_factory.mktemp("models") / "qwen2"
    sizes = {"layers": 4, "hidden": 64, "heads": 8, "kv_heads": 4, "vocab": VOCAB}
    return str(write_tiny_model(path, "qwen2", tied=True, **sizes))


@pytest.fixture(scope="module")
def sequences(model: str) -> list[Sequence]:
    """13 of mixed lengths, five with the prompt of the one before, with old log-probs near the policy's, so that some
    ratios are clipped."""
    draw = random.Random(0)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = []
    for length in (9, 31, 17, 6, ranks.LONGEST, 23, 12, 50, 41, 3, 28, 37, 2):
        tokens = tuple(draw.choice([t for t in range(VOCAB) if t != PAD]) for _ in range(length))
        prompt = draw.randint(1, length - 1)
        if len(made) in (2, 5, 7, 8, 10):
            prompt = made[-1].num_prompt_tokens
            tokens = (*made[-1].tokens[:prompt], *tokens[min(prompt, length - 1) :])
        sequence = Sequence(tokens, prompt, draw.choice([-1.3, 0.4, 0.0, 2.0]), None)
        with torch.no_grad():
            now = token_quantities(network, sequence, ranks.TEMPERATURE)[0]
        old = tuple(float(value) + draw.uniform(-0.4, 0.4) for value in now)
        made.append(Sequence(tokens, sequence.num_prompt_tokens, sequence.advantage, old))
    return made


@pytest.fixture(scope="module")
def one_process(model: str, sequences: list[Sequence]) -> Outcome:
    return run_ranks(1, ranks.reference, model, sequences)[0]


@pytest.fixture(scope="module")
def largest(request: pytest.FixtureRequest) -> Iterator[list[dict[str, float]]]:
    """Deviations of all comparisons; their count and largest are printed at the end."""
    found: list[dict[str, float]] = []
    yield found
    if found:
        worst = ", ".join(f"{name} {max(row[name] for row in found):.1e}" for name in QUANTITIES)
        capture: Any = request.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\ninvariance: {len(found)} combinations equal one process; largest deviation: {worst}")


def deviations(parts: list[Compared], expected: Outcome) -> dict[str, float]:
    """Largest relative deviation of each quantity over all ranks. Asserts that nothing is missing or there twice."""
    assert Counter(key for part in parts for key in part.seen) == Counter(list(expected.log_probs))
    assert Counter(name for part in parts for name in part.names) == Counter(list(expected.weights))
    reporting = [part for part in parts if part.losses]
    losses = [sum(shares) for shares in zip(*(part.losses for part in reporting), strict=True)]
    norms = [norm for part in reporting for norm in zip(part.grad_norms, expected.grad_norms, strict=True)]
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(losses, expected.losses, strict=True)),
        "grad norm": max(abs(a - b) / b for a, b in norms),
        **{name: max(part.deviations[name] for part in parts) for name in ("log-probs", "entropy", "weights")},
    }


def test_one_process_equals_the_dense_reference(model: str, sequences: list[Sequence], one_process: Outcome) -> None:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings: dict[str, Any] = {"alpha": ranks.ALPHA, "lr": ranks.LR, "eps": ranks.EPS}
    first = dense_step(network, sequences, temperature=ranks.TEMPERATURE, **settings)
    second = dense_step(network, sequences, temperature=ranks.TEMPERATURE, **settings, optimizer=first.optimizer)
    for step, dense in enumerate((first, second)):
        assert one_process.losses[step] == pytest.approx(dense.loss, rel=1e-4)
        assert one_process.grad_norms[step] == pytest.approx(dense.grad_norm, rel=1e-4)
        for i in range(len(sequences)):
            torch.testing.assert_close(one_process.log_probs[step, i], dense.log_probs[i], atol=1e-4, rtol=0)
            torch.testing.assert_close(one_process.entropies[step, i], dense.entropies[i], atol=1e-4, rtol=0)
    for name, weight in network.named_parameters():
        torch.testing.assert_close(one_process.weights[name], weight.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_layout_equals_one_process(
    num_ranks: int,
    recompute: str,
    model: str,
    sequences: list[Sequence],
    one_process: Outcome,
    largest: list[dict[str, float]],
) -> None:
    # Each layout takes both heads in turn over the recompute settings.
    heads = itertools.cycle(("plain", "fused") if recompute == "selective" else ("fused", "plain"))
    degrees = [degrees for degrees in DEGREES if math.prod(degrees) == num_ranks]
    layouts = [Layout(*four, recompute=recompute, head=head) for four, head in zip(degrees, heads, strict=False)]
    arguments = (model, layouts, [*PACKINGS, SHARED], sequences, one_process)
    found = run_ranks(num_ranks, ranks.all_layouts, *arguments, timeout_s=500)
    assert (num_ranks, len(layouts)) in [(1, 1), (2, 4), (4, 10)]
    for i, layout in enumerate(layouts):
        for j, packing in enumerate(filter(lambda packing: packing.possible(layout), [*PACKINGS, SHARED])):
            deviation = deviations([rows[i][j] for rows in found], one_process)
            largest.append(deviation)
            assert max(deviation.values()) < TOLERANCE, f"{layout}, {packing}: {deviation}"
    shapes = [(part.num_batches, part.num_empty) for rows in found for row in rows for part in row]
    assert max(batches for batches, _ in shapes) > 2
    assert all(found[0][i][-1].num_spared > 0 for i, layout in enumerate(layouts) if SHARED.possible(layout))
    assert num_ranks < 4 or any(empty for _, empty in shapes), "no rank had a micro-batch of padding"


@pytest.mark.parametrize(
    ("fault", "layout", "packing"),
    [
        ("none", Layout(cp=2), PACKINGS[0]),
        ("local denominator", Layout(dp=2), PACKINGS[0]),
        ("labels shifted after the cut", Layout(cp=2), PACKINGS[0]),
        ("key and value gradients not reduced", Layout(cp=2), PACKINGS[0]),
        ("weight gradients not reduced over cp", Layout(cp=2), PACKINGS[0]),
        ("shared prompts not seen", Layout(dp=2), SHARED),
    ],
)
def test_the_comparison_finds_each_fault(
    fault: str, layout: Layout, packing: Packing, model: str, sequences: list[Sequence], one_process: Outcome
) -> None:
    arguments = (model, layout, packing, sequences, one_process, fault)
    deviation = deviations(run_ranks(2, ranks.with_fault, *arguments), one_process)
    if fault == "none":
        assert max(deviation.values()) < TOLERANCE
    else:
        assert max(deviation.values()) > 100 * TOLERANCE, deviation
