"""One optimizer step of the actor of one rank on random weights: MFU, memory, and the kernels of a step.

Each step trains the same number of tokens, in packs of several sizes, with each way to recompute. The MFU counts no
recomputed operations and is of the data sheet's peak; beside it stands the share of the measured matrix product.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.clock import Part, attempt, seconds
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness import Benchmark, Case
from or1_megatron.architecture import parse_architecture
from or1_megatron.parallel import device
from or1_megatron.parallel.layout import hf_shapes
from or1_megatron.parallel.packing import pack
from or1_megatron.profiling.flops import Tokens, training_flops
from or1_megatron.recipe import from_tree
from or1_megatron.types import MicroBatch, Sequence

RECOMPUTE = ("none", "selective", "full")
LR, ALPHA, NUM_KERNELS = 1e-6, 0.01, 40


def parts(sizes: Sizes, ceilings: Ceilings, facts: dict[str, Any], *, model: str) -> list[Part]:
    """One per way to recompute, and one with TransformerEngine's layers where they are installed."""
    scratch = tempfile.TemporaryDirectory(prefix="or1-gpu-check-")
    facts["scratch"] = scratch  # lives as long as the process
    path = write_random_model(Path(scratch.name), sizes.models[model])
    found = [
        partial(_steps, sizes, ceilings, facts, model, path, recompute, transformer_engine=False)
        for recompute in RECOMPUTE
    ]
    return [*found, partial(_steps, sizes, ceilings, facts, model, path, "none", transformer_engine=True)]


def write_random_model(directory: Path, config: dict[str, Any]) -> Path:
    """A Hugging Face directory in bf16."""
    from safetensors.torch import save_file

    (directory / "config.json").write_text(json.dumps(config))
    here = device.device()
    tensors = {
        name: (torch.ones(shape) if "norm" in name else torch.randn(shape, device=here) * 0.02).bfloat16().cpu()
        for name, shape in hf_shapes(parse_architecture(config, "random model")).items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


def lengths_of(pack_tokens: int) -> list[int]:
    """A long sequence and shorter ones: a half, a quarter and two eighths of the pack."""
    return [pack_tokens // part for part in (2, 4, 8, 8)]


def prompt_of(length: int) -> int:
    """Tokens of it that are prompt: at their positions, but for the last, the head is not computed."""
    return max(1, length // 8)


def micro_batches(pack_tokens: int, step_tokens: int, vocab: int, seed: int) -> list[MicroBatch]:
    random = np.random.default_rng(seed)
    lengths = lengths_of(pack_tokens) * (step_tokens // pack_tokens)
    sequences = [
        Sequence(tuple(random.integers(0, vocab, n).tolist()), prompt_of(n), float(random.normal()), None)
        for n in lengths
    ]
    return [pack(sequences, range(first, first + 4), alignment=1) for first in range(0, len(sequences), 4)]


def _steps(
    sizes: Sizes,
    ceilings: Ceilings,
    facts: dict[str, Any],
    model: str,
    path: Path,
    recompute: str,
    bench: Benchmark,
    *,
    transformer_engine: bool,
) -> None:
    if transformer_engine and not device.use_transformer_engine("auto", "bf16"):
        bench.note(f"{model}, TransformerEngine: not installed")
        return
    from or1_megatron.actor.actor import MegatronActor

    layers = "transformer_engine" if transformer_engine else "torch"
    longest = max(sizes.packs)
    tree = {
        "model": {"path": str(path), "dtype": "bf16", "recompute": recompute, "transformer_impl": layers},
        "parallel": {"token_budget": longest},
        "rollout": {"context_length": longest},
    }
    actor = MegatronActor(from_tree([("gpu-check", tree)]), 0)
    a = actor.architecture
    for pack_tokens in sizes.packs:
        draws = iter(range(10**6))

        def step(pack_tokens: int = pack_tokens, draws: Any = draws) -> float:
            batches = micro_batches(pack_tokens, sizes.step_tokens, a.vocab_size, next(draws))
            work = partial(actor.update, batches, entropy_coefficient=ALPHA, num_tokens=sizes.step_tokens, lr=LR)
            return seconds(work)

        label = f"{model}, packs of {pack_tokens}, recompute {recompute}, {layers} layers"
        case = attempt(bench, label, step, "ours", sizes.step_tokens, "tokens")
        if case is None:
            continue
        device.take_peak_memory()
        step()
        peak_gib = device.take_peak_memory() / 2**30
        lengths = lengths_of(pack_tokens) * (sizes.step_tokens // pack_tokens)
        flops = training_flops(a, Tokens(lengths, sum(n - prompt_of(n) for n in lengths)))
        mfu = partial(_of_peak, case, flops, ceilings.peak_flops)
        case.remark = lambda case=case, flops=flops, mfu=mfu, peak_gib=peak_gib: (
            f"MFU {mfu():.1%}, {_of_peak(case, flops, ceilings.flops):.0%} of the product's rate, {peak_gib:.1f} GiB"
        )
        # What is recomputed is not useful work, so only a step that recomputes nothing has a mark.
        if recompute == "none":
            bench.mark(f"MFU_{model}_packs_{pack_tokens}_{layers}".replace(" ", "_"), mfu, 0.45)
            bench.note(partial(_list_kernels, facts, label, step))


def _list_kernels(facts: dict[str, Any], label: str, step: Any) -> str:
    """After the step was timed: the profiler may fail, and may slow down what follows."""
    try:
        facts.setdefault("kernels", {})[label] = kernels(step)
    except Exception as error:
        return f"{label}: no list of kernels, {type(error).__name__}: {error}"
    return f"{label}: its kernels are listed below"


def _of_peak(case: Case, flops: float, peak: float) -> float:
    return flops / case.median / peak


def kernels(step: Any) -> list[dict[str, Any]]:
    """Those that took longest in one step: name, calls, milliseconds, share of the time of all."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.has_cuda():
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    kind = "self_device_time_total" if device.has_cuda() else "self_cpu_time_total"
    found = [(getattr(event, kind), event) for event in profile.key_averages()]
    total = sum(spent for spent, _ in found)
    return [
        {"kernel": event.key, "calls": event.count, "ms": spent / 1e3, "share": spent / total}
        for spent, event in sorted(found, key=lambda pair: -pair[0])[:NUM_KERNELS]
        if spent > 0
    ]
