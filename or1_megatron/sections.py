"""The sections of a run's configuration: every key with its default and the sentence that `--help` prints.

Names of the paper's symbols: rollout_batch_size D_R, mini_batch_size D_T, num_reuse N_reuse, group_size gs,
context_length T, temperature tau.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def key(default: Any, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with the sentence that `--help` prints."""
    metadata = {"meaning": meaning, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    path: str = key(MISSING, "HF checkpoint directory (Llama, Qwen2, Qwen3), or what `or1 convert` made of it")
    dtype: str = key("bf16", "actor compute type; main weights and optimizer state are fp32 in both", ("fp32", "bf16"))
    transformer_impl: str = key(
        "auto", "layers of the actor; auto takes TransformerEngine where it is installed with a GPU, in bf16",
        ("auto", "transformer_engine", "torch"),
    )  # fmt: skip
    recompute: str = key("none", "activation recomputation in the actor", ("none", "selective", "full"))
    deterministic: bool = key(
        False, "kernels that give the same bits in every run of the same layout on GPUs, also where others are faster"
    )


@dataclass
class ParallelConfig:
    num_ranks: int = key(
        1, "actor ranks: one GPU, or one CPU process, each; data parallel is num_ranks / (tp * pp * cp)"
    )
    tp: int = key(1, "tensor-parallel degree; sequence parallel is on when tp > 1")
    pp: int = key(1, "pipeline-parallel degree")
    cp: int = key(1, "context-parallel degree: ranks that share each sequence; for long contexts")
    token_budget: int = key(
        0,
        "most tokens in one packed micro-batch, over its cp ranks; at least, and with 0 exactly, the context length, "
        "rounded up to a multiple of tp (of 2 * cp * tp when cp > 1)",
    )
    share_prompts: bool = key(
        True, "compute a prompt once for responses of its group that share a micro-batch; only with cp=1 and without "
        "TransformerEngine, whose attention does not know how",
    )  # fmt: skip
    cpu_threads_per_rank: int = key(1, "OpenMP threads of one actor rank on a machine without a GPU")
    timeout_s: int = key(600, "longest a collective may wait for a rank, seconds")


@dataclass
class DataConfig:
    train: list[str] = key(
        [], "problem files, .jsonl, .json (also .gz) or .parquet: data_source, prompt, reward_model.ground_truth"
    )
    weights: list[float] = key([], "share of each train file in the prompts; empty: all problems equally often")
    difficulty_model: str = key(
        "", "keep train problems by extra_info.model_difficulty of this name (Skywork-OR1-RL-Data); empty: keep all"
    )
    difficulty_range: list[int] = key([1, 15], "least and largest difficulty kept, failures out of 16 attempts")
    instruction_suffix: str = key("", "appended to the last user message of a chat prompt")
    seed: int = key(0, "order of the prompt stream")


@dataclass
class RolloutConfig:
    rollout_batch_size: int = key(64, "D_R: informative prompts per training step")
    group_size: int = key(16, "gs: responses per prompt, at least 2")
    context_length: int = key(8192, "T: prompt + response limit, tokens")
    max_response_length: int = key(0, "response limit, tokens; 0: whatever the context leaves")
    temperature: float = key(1.0, "tau: sampling temperature; the actor's log-probs use the same")
    top_p: float = key(1.0, "nucleus sampling; anything but 1 biases the policy gradient")
    stop: list[str] = key([], "strings that end a response; the token that completes one is part of the response")
    max_generated_factor: float = key(
        2.0, "refill bound: at most this many times rollout_batch_size prompts are rolled out per step"
    )
    refill: str = key(
        "exact",
        "prompts rolled out again: exact (as many as were rejected, nothing is left over) or expected (as many as it "
        "takes at the share kept so far: fewer rounds; the surplus goes into the next step, one version off-policy)",
        ("exact", "expected"),
    )
    overlap: bool = key(
        False,
        "one step off: roll out the next step while this one is trained; needs engines that do not share the actor's "
        "devices; a resume samples the rollout that was under way anew",
    )
    num_engines: int = key(1, "vLLM engines")
    engine_tp: int = key(1, "tensor-parallel degree of one engine: GPUs, or CPU processes, that share its model")
    schedule: str = key(
        "longest_first",
        "how prompts are dealt to the engines: round_robin; pending_tokens (each to the engine with the fewest tokens "
        "to expect, by how long the responses to a prompt were before); longest_first (so, the longest first)",
        ("round_robin", "pending_tokens", "longest_first"),
    )
    pack_while_decoding: bool = key(
        True, "arrays of tokens and log-probs are made by the engines, of each group that has finished; false: by the "
        "driver, when the rollout has ended",
    )  # fmt: skip
    engine_dtype: str = key("auto", "engine compute type; auto is the actor's", ("auto", "fp32", "bf16"))
    kv_cache_gb: float = key(1.0, "KV cache of one engine on a machine without a GPU, GiB")
    gpu_memory_utilization: float = key(0.5, "share of the GPU's memory one engine may take")
    max_batched_tokens: int = key(16384, "most tokens in one engine step")
    enforce_eager: bool = key(False, "no CUDA graphs; always so on a machine without a GPU")
    cpu_threads_per_engine: int = key(
        0, "OpenMP threads of each process of an engine without a GPU; 0: all cores / (num_engines * engine_tp)"
    )
    probe_interval: int = key(1, "compare engine and actor log-probs after every k-th weight push; 0: never")
    probe_tolerance: float = key(
        0.0, "largest mean |engine - actor| log-prob of the probe text; 0: 1e-3 where both are fp32, else 0.1"
    )
    transport: str = key(
        "auto",
        "how weights reach the engines: shm (memory shared by ranks and engines of one host), ray (gathered, through "
        "the object store), gloo (broadcast; without GPUs), nccl (broadcast to engines on GPUs of their own), ipc "
        "(mapped by engines on the actor's GPUs); auto takes ipc or nccl on GPUs, else shm on one host and ray on more",
        ("auto", "shm", "ray", "gloo", "nccl", "ipc"),
    )
    verify_weights: bool = key(
        False, "compare the checksum of every tensor after every weight push (any transport but ray)"
    )
    placement: str = key(
        "auto",
        "engines and actor: colocated (they take turns on the same devices and release what the other needs), "
        "separate (both stay) or auto (colocated where there are not GPUs for both)",
        ("auto", "colocated", "separate"),
    )
    bucket_mb: int = key(128, "size of one weight bucket on its way to the engines, MiB")


@dataclass
class LossConfig:
    mini_batch_size: int = key(0, "D_T: prompts per optimizer step; 0: rollout_batch_size (on-policy)")
    num_reuse: int = key(1, "N_reuse: passes over the rollout buffer")
    clip_low: float = key(0.2, "eps: the ratio is clipped below at 1 - clip_low")
    clip_high: float = key(0.2, "eps_high: the ratio is clipped above at 1 + clip_high")
    head: str = key(
        "fused",
        "LM head: fused (log-probs, entropy and gradients chunk by chunk) or plain (all logits of a micro-batch exist)",
        ("fused", "plain"),
    )
    old_log_probs: str = key(
        "current",
        "pi_old: current (needs one optimizer step per rollout), recompute (actor pass), engine (as sampled)",
        ("current", "recompute", "engine"),
    )
    rejection: bool = key(True, "drop groups whose advantages are all zero: all rewards equal")
    surrogate: str = key(
        "clip", "policy term: clip (PPO's, of MAGIC and GRPO) or gradient (A log pi, vanilla policy gradient)",
        ("clip", "gradient"),
    )  # fmt: skip
    mean_over: str = key(
        "tokens", "the loss is the mean over all tokens (MAGIC, 3.1) or over responses of their own means (GRPO, 2.4)",
        ("tokens", "responses"),
    )  # fmt: skip
    normalise_std: bool = key(True, "divide advantages by the group's standard deviation; false: Dr. GRPO")
    advantage_mask: str = key(
        "none", "truncated responses (3.2.3): none, before (not in mean and std, advantage 0), after (advantage 0)",
        ("none", "before", "after"),
    )  # fmt: skip
    importance_cap: float = key(
        0.0, "truncated importance sampling: cap of the weight pi_old / pi_engine of each token; 0: no weights"
    )
    kl_coefficient: float = key(0.0, "beta: weight of the k3 estimate of the KL divergence from the initial model")


@dataclass
class EntropyConfig:
    rule: str = key(
        "paper",
        "controller of alpha_k: paper (3.2), released (the published code's, one step late), fixed (alpha = initial), "
        "off",
        ("paper", "released", "fixed", "off"),
    )
    target: float = key(0.2, "tgt_ent, nats per token")
    delta: float = key(0.005, "step of c_k")
    initial: float = key(0.0, "c_0")
    at_stage: str = key("carry", "the controller's state at a stage start: carry or reset", ("carry", "reset"))
    min: float = key(0.0, "lower clamp of c_k")
    max: float = key(1.0, "upper clamp of c_k")
    signal: str = key(
        "sampled",
        "e_k: sampled (mean -log pi of the rollout's tokens, free) or vocabulary (full entropy; one more actor pass)",
        ("sampled", "vocabulary"),
    )


@dataclass
class OptimizerConfig:
    lr: float = key(1e-6, "learning rate, constant after warm-up")
    warmup_steps: int = key(0, "training steps of linear warm-up")
    beta1: float = key(0.9, "AdamW beta1")
    beta2: float = key(0.999, "AdamW beta2")
    eps: float = key(1e-8, "AdamW epsilon")
    weight_decay: float = key(0.01, "AdamW weight decay")
    clip_grad: float = key(1.0, "global gradient norm limit; 0: no clipping")


@dataclass
class RewardConfig:
    num_workers: int = key(2, "verifier processes")
    during_rollout: bool = key(True, "check responses while others are decoded; false: when the rollout has ended")
    timeout_s: float = key(10.0, "deadline of a math check, kept by the parent; the stuck worker is killed, seconds")
    memory_mb: int = key(4096, "address space of one verifier process, MiB")
    unclosed_reasoning: str = key(
        "zero", "a response whose <think> never closes: zero (no answer, as when cut) or whole (all of it is read)",
        ("zero", "whole"),
    )  # fmt: skip
    truncated: str = key(
        "checked", "a response cut at the length limit: checked as any other, or zero (3.2.3: it has no outcome)",
        ("checked", "zero"),
    )  # fmt: skip
    max_queued: int = key(8192, "responses that may wait for a verifier; more make the rollout wait")
    recycle_tasks: int = key(10000, "a worker is replaced after so many checks")
    recycle_mb: int = key(1024, "a worker is replaced when its resident memory is above this, MiB")
    max_failure_rate: float = key(
        0.02, "share of a step's checks that may fail for no fault of the response before the run is stopped"
    )
    code_timeout_s: float = key(6.0, "wall time of one test of a code answer, seconds")
    code_total_s: float = key(60.0, "wall time of all tests of a code answer, seconds")
    code_memory_mb: int = key(4096, "address space of tested code, MiB; the paper gives 50 GB")
    require_isolation: str = key(
        "full", "least isolation under which code answers are run; `namespaces` uses bubblewrap",
        ("rlimits", "partial", "full", "namespaces"),
    )  # fmt: skip


@dataclass
class EvalConfig:
    files: list[str] = key([], "held-out problem files; empty: no evaluation")
    interval: int = key(0, "evaluate every k steps; 0: only before the first and after the last step")
    num_samples: int = key(4, "n: responses per problem, for avg@n and pass@k")
    temperatures: list[float] = key([1.0], "sampling temperatures in evaluation; the problems are answered at each")
    top_p: float = key(1.0, "nucleus sampling in evaluation")


@dataclass
class ProfilingConfig:
    trace_steps: int = key(
        20, "newest steps whose spans of every process are kept in the run's trace.json; 0: the driver's seconds only"
    )
    tool: str = key(
        "none",
        "profiler around chosen steps of chosen ranks: torch (RUN/profile/*.json) or nsys (opens the range that "
        "`nsys profile --capture-range=cudaProfilerApi` records, with NVTX ranges; needs a GPU)",
        ("none", "torch", "nsys"),
    )
    steps: list[int] = key([], "training steps that the profiler records")
    ranks: list[int] = key([0], "actor ranks that the profiler records")


@dataclass
class StageConfig:
    """One row of a stage table (Tables 10 to 12). 0: as in the rest of the configuration."""

    until: int = MISSING  # last training step of the stage
    context_length: int = 0  # T
    rollout_batch_size: int = 0  # D_R
    mini_batch_size: int = 0  # D_T
    group_size: int = 0  # gs
    token_budget: int = 0  # of a packed micro-batch
    max_response_length: int = 0
    temperature: float = 0.0  # tau
    patience: int = 0  # ends earlier when the mean reward of so many steps is not above that of as many before them
