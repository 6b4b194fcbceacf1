"""Counted operations against torch's own counter on Hugging Face models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from or1_megatron.architecture import read_architecture
from or1_megatron.parallel.packing import pack
from or1_megatron.profiling.flops import Tokens, forward_flops, training_flops
from or1_megatron.types import Sequence
from tests.tiny_models import write_tiny_model


@pytest.mark.parametrize("family,tied", [("llama", True), ("qwen2", False), ("qwen3", False)])
@pytest.mark.parametrize("length", [7, 96])
def test_equals_the_counter(tmp_path: Path, family: str, tied: bool, length: int) -> None:
    path = write_tiny_model(tmp_path, family, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    tokens = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    architecture = read_architecture(path)
    assert forward_flops(architecture, Tokens([length]), causal=False) == pytest.approx(forward, rel=0.01)
    assert training_flops(architecture, Tokens([length])) == 3 * forward_flops(architecture, Tokens([length]))
    assert 3 * forward_flops(architecture, Tokens([length]), causal=False) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def test_causal_pairs_are_half_and_lengths_add_up(tmp_path: Path) -> None:
    architecture = read_architecture(write_tiny_model(tmp_path, "llama", tied=True))
    long = 100_000
    ratio = forward_flops(architecture, Tokens([long])) / forward_flops(architecture, Tokens([long]), causal=False)
    assert ratio == pytest.approx(0.5, abs=0.02)
    both = forward_flops(architecture, Tokens([3, 40]))
    assert both == forward_flops(architecture, Tokens([3])) + forward_flops(architecture, Tokens([40]))


def test_the_head_at_predicted_positions_and_a_shared_prompt_once(tmp_path: Path) -> None:
    """Prompts of 10 tokens, the first 9 shared by responses of 3 and 5: 22 positions in the layers, 8 in the head."""
    a = read_architecture(write_tiny_model(tmp_path, "llama", tied=True))
    head = 2 * a.hidden_size * a.vocab_size
    all_positions = forward_flops(a, Tokens([13, 15]))
    assert forward_flops(a, Tokens([13, 15], 8)) == all_positions - 20 * head
    shared = Tokens([13, 15], 8, [9])
    assert shared.in_layers == 9 + (1 + 3) + (1 + 5)
    prompt_alone = forward_flops(a, Tokens([9], 0))
    assert forward_flops(a, shared) == forward_flops(a, Tokens([13, 15], 8)) - prompt_alone


def test_a_token_sees_itself(tmp_path: Path) -> None:
    a = read_architecture(write_tiny_model(tmp_path, "llama", tied=True))
    assert forward_flops(a, Tokens([1])) == forward_flops(a, Tokens([1]), causal=False)


def test_tokens_of_packs_are_those_that_are_computed() -> None:
    sequences = [Sequence((1, 2, 3, 4), 3, 1.0, None), Sequence((1, 2, 3, 5, 6), 3, 1.0, None)]
    batch = pack(sequences, [0, 1], alignment=8, share_prompts=True)
    assert Tokens.of(sequences, [batch]) == Tokens([4, 5], 3, [2])
