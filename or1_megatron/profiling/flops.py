"""Floating-point operations of a dense decoder, exact in every matrix product; additions and norms do not count.

A product of [m, k] with [k, n] is 2 m k n. Training is three times the forward pass: the backward pass has one product
for the input's and one for the weight's gradient for each of the forward pass. Recomputation is not useful work and
is not counted, so it lowers the MFU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from or1_megatron.architecture import Architecture
from or1_megatron.types import MicroBatch
from or1_megatron.types import Sequence as TrainingSequence


class Tokens(NamedTuple):
    """What a pass over training sequences computes."""

    lengths: Sequence[int]  # of the sequences, prompt and response
    predicted: int | None = None  # response tokens: at so many positions the LM head is computed; None: at all
    spared: Sequence[int] = ()  # lengths of prompts that `lengths` counts once more than they are computed

    @classmethod
    def of(cls, sequences: Sequence[TrainingSequence], batches: Iterable[MicroBatch]) -> Tokens:
        """Of these sequences, packed into these micro-batches; padding aside."""
        spared = [length for batch in batches for length in batch.spared_prompts]
        return cls([len(s.tokens) for s in sequences], sum(s.num_response_tokens for s in sequences), spared)

    @property
    def in_layers(self) -> int:
        return sum(self.lengths) - sum(self.spared)


def forward_flops(architecture: Architecture, tokens: Tokens, *, causal: bool = True) -> float:
    """causal False counts every pair of query and key of a sequence, as kernels do that mask afterwards."""
    a = architecture

    def of_layers(length: int) -> int:
        pairs = length * (length + 1) // 2 if causal else length**2
        # q.k, and the weight times v
        return a.num_layers * (2 * length * a.matrix_parameters_per_layer + 4 * pairs * a.num_heads * a.head_dim)

    layers = sum(map(of_layers, tokens.lengths)) - sum(map(of_layers, tokens.spared))
    predicted = sum(tokens.lengths) if tokens.predicted is None else tokens.predicted
    return float(layers + 2 * predicted * a.hidden_size * a.vocab_size)


def training_flops(architecture: Architecture, tokens: Tokens) -> float:
    """Forward and backward."""
    return 3 * forward_flops(architecture, tokens)
