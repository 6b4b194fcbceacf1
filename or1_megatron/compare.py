"""Whether two model directories, Hugging Face or Megatron, hold the same model: tensors bit for bit, and logits."""

from __future__ import annotations

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from or1_megatron.architecture import Architecture, read_architecture
from or1_megatron.data.prompts import load_tokenizer
from or1_megatron.errors import RunFailure
from or1_megatron.parallel import device
from or1_megatron.parallel.megatron_files import all_tensors, is_megatron, open_weights

PROMPT = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many"
TOLERANCE = 1e-4  # of the largest logit: both sides compute in float32, in different orders
_MOST_NAMED = 5


def verify(a: Path, b: Path, *, prompt: str = PROMPT, logits: bool = True) -> None:
    """Compares config, names and shapes, bits, and the logits of `prompt` in float32, each with its own code.

    A Megatron directory runs through Megatron, a Hugging Face one through transformers, one after the other: 4 bytes
    a parameter. Prints one line per comparison; raises RunFailure when any differs, UserError when one is unreadable.
    """
    architecture = read_architecture(a, "")
    differing = _differing_fields(architecture, read_architecture(b, ""))
    if differing:
        raise RunFailure(f"{a} and {b} are different architectures: {', '.join(differing)}")
    failures = _compare_bits(a, b, architecture)
    if logits:
        failures += _compare_logits(a, b, architecture, prompt)
    if failures:
        raise RunFailure(f"{a} and {b} differ: {'; '.join(failures)}")
    print("verify: the same model")


def _differing_fields(a: Architecture, b: Architecture) -> list[str]:
    others = asdict(b)
    return [f"{name} {value} and {others[name]}" for name, value in asdict(a).items() if value != others[name]]


def _compare_bits(a: Path, b: Path, architecture: Architecture) -> list[str]:
    with open_weights(a, architecture) as left, open_weights(b, architecture) as right:
        print(f"names and shapes: {len(left.dtypes)} tensors, equal")
        pairs = zip(all_tensors(left, architecture), all_tensors(right, architecture), strict=True)
        differing = [_difference(name, x, y) for (name, x), (_, y) in pairs if not _same_bits(x, y)]
    if not differing:
        print("bits: equal")
        return []
    print(f"bits: {len(differing)} tensors differ")
    more = f" and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
    return [f"tensors {', '.join(differing[:_MOST_NAMED])}{more}"]


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.dtype != y.dtype:
        return False
    integer = torch.int32 if x.dtype.itemsize == 4 else torch.int16  # equal NaNs are equal
    return torch.equal(x.view(integer), y.view(integer))


def _difference(name: str, x: torch.Tensor, y: torch.Tensor) -> str:
    if x.dtype != y.dtype:
        return f"{name} ({x.dtype} and {y.dtype})".replace("torch.", "")
    return f"{name} (max |difference| {(x.float() - y.float()).abs().max():.2g})"


def _compare_logits(a: Path, b: Path, architecture: Architecture, prompt: str) -> list[str]:
    tokens = load_tokenizer(str(a), architecture).encode(prompt, add_special_tokens=False)
    if load_tokenizer(str(b), architecture).encode(prompt, add_special_tokens=False) != tokens:
        print("tokenizer: the prompt's tokens differ")
        return ["the prompt's tokens"]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        try:
            x_TV, y_TV = (pool.submit(_logits, path, tokens).result() for path in (a, b))
        except BrokenProcessPool:
            raise RunFailure(
                "the process that computes logits was killed, for memory most likely (4 bytes a parameter); with "
                "--no-logits only the bits are compared"
            ) from None
    scale, error = float(np.abs(x_TV).max()), float(np.abs(x_TV - y_TV).max())
    same = error <= TOLERANCE * scale
    told = f"max |difference| {error:.2g} of max |logit| {scale:.3g}"
    print(f"logits of {len(tokens)} tokens: {told}{', equal' if same else ', differ'}")
    return [] if same else [f"logits, {told}"]


def _logits(path: Path, tokens: list[int]) -> np.ndarray:
    """In a process of its own."""
    warnings.simplefilter("ignore")
    if is_megatron(path):
        device.install()  # before megatron is imported
        from or1_megatron.actor.logits import prompt_logits

        return prompt_logits(path, tokens).numpy()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits.squeeze(0).numpy()
