"""`or1 train RECIPE --dry-run`: what a run would do, worked out without starting anything.

Memory of one rank, bytes, by Megatron's distributed optimizer in bf16: weights 2 and gradients 4 a parameter of this
rank's shard, optimizer 12 (main weight and two moments, fp32) spread over its data- and context-parallel peers.
Activations of a micro-batch of t tokens, H hidden, 2-byte numbers: about 34 t H a layer, all over tp (sequence
parallel) and t over cp; with full recomputation 2 t H a layer kept and one layer whole. Estimates, within some 20 %,
without the allocator's slack and what an engine on the same device takes.
"""

from __future__ import annotations

from pathlib import Path

from or1_megatron.architecture import Architecture, check_degrees, read_architecture
from or1_megatron.config import Config

_LOGITS_CHUNK = 192 << 20  # parallel/vocab_head.py on a GPU


def memory_per_rank(config: Config, architecture: Architecture) -> dict[str, float]:
    """Bytes by part; see above."""
    parallel, a = config.parallel, architecture
    shard = a.num_parameters / (parallel.tp * parallel.pp)
    weight_bytes = 4 if config.model.dtype == "fp32" else 2
    layer_input = config.token_budget / (parallel.cp * parallel.tp) * a.hidden_size * weight_bytes
    layers = a.num_layers / parallel.pp
    kept = layers * layer_input + 17 * layer_input if config.model.recompute == "full" else layers * 17 * layer_input
    return {
        "weights": weight_bytes * shard,
        "gradients": 4 * shard,
        "optimizer": 12 * shard / (config.dp * parallel.cp),
        "activations": kept + _LOGITS_CHUNK,
    }


def plan_lines(config: Config) -> list[str]:
    """The resolved plan, line by line. Raises UserError for degrees that do not fit the model."""
    parallel, widest = config.parallel, config.widest()
    lines = [
        f"{config.name}: {config.steps} steps, seed {config.seed}",
        f"layout: {parallel.num_ranks} ranks = tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {config.dp}"
        f"; {config.rollout.num_engines} engines of context {widest.rollout.context_length}",
        f"entropy: rule {config.entropy.rule}, signal {config.entropy.signal}, target {config.entropy.target}, "
        f"delta {config.entropy.delta}, clamp [{config.entropy.min}, {config.entropy.max}], at a stage start "
        f"{config.entropy.at_stage}",
        "",
        f"{'stage':>5} {'steps':>11} {'context':>8} {'D_R':>5} {'D_T':>5} {'gs':>4} {'N_SGD':>6} {'tau':>5} "
        f"{'budget':>8} {'samples/step':>13} {'tokens at most':>15}",
    ]
    first, total = 0, 0
    ends = [min(stage.until, config.steps) for stage in config.stages] or [config.steps]
    for number, (stage, end) in enumerate(zip(config.all_stages(), ends, strict=True), 1):
        rollout = stage.rollout
        samples = rollout.rollout_batch_size * rollout.group_size
        tokens = (end - first) * samples * rollout.context_length
        lines.append(
            f"{number:>5} {f'{first}-{end}':>11} {rollout.context_length:>8} {rollout.rollout_batch_size:>5} "
            f"{stage.mini_batch_size:>5} {rollout.group_size:>4} {stage.num_sgd_steps:>6} {rollout.temperature:>5} "
            f"{stage.token_budget:>8} {samples:>13} {tokens:>15.3e}"
        )
        first, total = end, total + tokens
    lines += [f"kept tokens at most {total:.3e}: every response as long as its context", ""]
    if not (Path(config.model.path) / "config.json").is_file():
        return [*lines, f"memory: not known, {config.model.path} holds no config.json here"]
    architecture = read_architecture(config.model.path)
    check_degrees(architecture, tp=parallel.tp, pp=parallel.pp)
    parts = memory_per_rank(widest, architecture)
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return [*lines, f"memory per actor rank, estimated: {sum(parts.values()) / 2**30:.2f} GiB ({listed})"]
