"""`or1 train RECIPE --dry-run`: what a run would do, worked out without starting anything.

Memory of one rank, bytes, by Megatron's distributed optimizer in bf16: weights 2 and gradients 4 a parameter of this
rank's shard, optimizer 12 (main weight and two moments, fp32) spread over its data- and context-parallel peers.
Activations of a micro-batch, numbers kept of each token in a layer of H hidden, F feed-forward, A and K attention and
KV columns: input and output of both norms 4 H, queries, keys, values and attention's output 2 A + 2 K, gate, up and
their product 3 F; 22 H for Qwen2.5-7B. All over tp (sequence parallel) and cp; with full recomputation the input of
each layer is kept and one layer whole. Estimates, within some 20 %, without the allocator's slack.

Memory of one engine, on each of its rollout.engine_tp GPUs: its share of the weights, RESERVE for graphs and
activations, and the KV cache in what is left of rollout.gpu_memory_utilization: 2 (keys, values) x layers x KV heads of
the GPU x head size numbers a token. When
actor and engines are colocated only one of them is there in full, except that both have their weights during a push.
A rank of a colocated actor always has the push's two buffers, each of rollout.bucket_mb or of the largest tensor.
"""

from __future__ import annotations

from pathlib import Path

from or1_megatron.architecture import Architecture, check_degrees, read_architecture
from or1_megatron.config import Config

_LOGITS_CHUNK = 195_000_000  # parallel/vocab_head.py on a GPU
GPU_BYTES = 80e9  # H800
RESERVE = 2.5e9


def memory_per_rank(config: Config, architecture: Architecture) -> dict[str, float]:
    """Bytes by part; see above."""
    parallel, a = config.parallel, architecture
    shard = a.num_parameters / (parallel.tp * parallel.pp)
    weight_bytes = 4 if config.model.dtype == "fp32" else 2
    columns = 4 * a.hidden_size + 2 * a.head_dim * (a.num_heads + a.num_kv_heads) + 3 * a.ffn_hidden_size
    tokens, layers = config.token_budget / (parallel.cp * parallel.tp), a.num_layers / parallel.pp
    kept = layers * a.hidden_size + columns if config.model.recompute == "full" else layers * columns
    return {
        "weights": weight_bytes * shard,
        "gradients": 4 * shard,
        "optimizer": 12 * shard / (config.dp * parallel.cp),
        "activations": weight_bytes * tokens * kept + _LOGITS_CHUNK,
    }


def memory_per_engine(config: Config, architecture: Architecture, gpu_bytes: float = GPU_BYTES) -> dict[str, float]:
    """Bytes by part on a GPU of `gpu_bytes`, and bytes of the keys and values of one token; see above."""
    a = architecture
    number = 4 if config.engine_dtype == "fp32" else 2
    tp = config.rollout.engine_tp
    weights = number * a.num_parameters / tp
    return {
        "weights": weights,
        "kv cache": config.rollout.gpu_memory_utilization * gpu_bytes - weights - RESERVE,
        "kv of a token": 2 * a.num_layers * max(1, a.num_kv_heads / tp) * a.head_dim * 2,
    }


def gpu_peaks(config: Config, architecture: Architecture, gpu_bytes: float = GPU_BYTES) -> dict[str, float]:
    """What is done -> bytes on the GPU that does it. placement=auto counts as colocated, which needs more."""
    actor, engine = memory_per_rank(config, architecture), memory_per_engine(config, architecture, gpu_bytes)
    peaks = {"update": sum(actor.values()), "rollout": config.rollout.gpu_memory_utilization * gpu_bytes}
    if config.rollout.placement != "separate":
        peaks["push"] = actor["weights"] + engine["weights"] + RESERVE
        largest = architecture.hidden_size * max(architecture.vocab_size, architecture.ffn_hidden_size)
        buffers = 2 * max(config.rollout.bucket_mb << 20, 2 * largest)
        peaks = {phase: size + buffers for phase, size in peaks.items()}
    return peaks


def unfit(config: Config, architecture: Architecture, gpu_bytes: float = GPU_BYTES) -> str:
    """What does not fit a GPU of `gpu_bytes`, and what to change; empty when all does."""
    peaks, engine = gpu_peaks(config, architecture, gpu_bytes), memory_per_engine(config, architecture, gpu_bytes)
    cure = {
        "update": "raise parallel.tp, pp or cp, or model.recompute=full",
        "push": "set rollout.placement=separate, or raise parallel.tp or rollout.engine_tp",
        "rollout": "lower rollout.gpu_memory_utilization",
    }
    for phase, size in peaks.items():
        if size > 0.96 * gpu_bytes:
            return f"{phase} needs {size / 1e9:.1f} of {gpu_bytes / 1e9:.0f} GB: {cure[phase]}"
    longest = config.rollout.context_length * engine["kv of a token"]
    if engine["kv cache"] < longest:
        return (
            f"an engine has {max(0.0, engine['kv cache']) / 1e9:.1f} GB for its KV cache, one response of "
            f"{config.rollout.context_length} tokens needs {longest / 1e9:.1f}: raise rollout.gpu_memory_utilization "
            "or rollout.engine_tp, or lower rollout.context_length"
        )
    return ""


def _gpu_lines(config: Config, architecture: Architecture) -> list[str]:
    """The same for a GPU of 80 GB, engine and actor together."""
    engine, peaks = memory_per_engine(config, architecture), gpu_peaks(config, architecture)
    held = engine["kv cache"] / engine["kv of a token"] / config.rollout.context_length
    phases = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in peaks.items())
    return [
        f"memory of an engine on a GPU of 80 GB: weights {engine['weights'] / 1e9:.1f} GB, KV cache "
        f"{max(0.0, engine['kv cache']) / 1e9:.1f} GB = {max(0.0, held):.1f} responses of full length at once",
        f"a GPU of 80 GB by phase, GB: {phases}; {unfit(config, architecture) or 'fits'}",
    ]


def plan_lines(config: Config) -> list[str]:
    """The resolved plan, line by line. Raises UserError for degrees that do not fit the model."""
    parallel, widest = config.parallel, config.widest()
    lines = [
        f"{config.name}: {config.steps} steps, seed {config.seed}",
        f"layout: {parallel.num_ranks} ranks = tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {config.dp}"
        f"; {config.rollout.num_engines} engines of tp {config.rollout.engine_tp}, context "
        f"{widest.rollout.context_length}",
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
    lines.append(f"memory per actor rank, estimated: {sum(parts.values()) / 2**30:.2f} GiB ({listed})")
    return lines + _gpu_lines(widest, architecture)
