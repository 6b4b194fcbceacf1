"""The rules a configuration has to keep, as far as no file is needed to check them."""

from __future__ import annotations

import math
from typing import Any

from or1_megatron.config import Config, all_keys
from or1_megatron.errors import UserError, either


def divisors(number: int) -> str:
    return either([d for d in range(1, number + 1) if number % d == 0])


def validate(config: Config) -> None:
    """Every rule that needs no file. Raises UserError naming the key, the value and the fix."""
    _validate_finite(config)
    if not config.model.path:
        raise UserError("model.path is empty; give a model directory")
    if config.stages:
        _validate_stages(config)
        return
    for item in all_keys():
        value = _value(config, item.name)
        if item.choices and value not in item.choices:
            raise UserError(f"{item.name}={value!r} is not one of {', '.join(item.choices)}")
    _validate_ranges(config)
    rollout, loss = config.rollout, config.loss
    if rollout.group_size < 2:
        raise UserError(f"rollout.group_size={rollout.group_size}: a group of one has no advantage; use 2 or more")
    if rollout.rollout_batch_size % config.mini_batch_size:
        raise UserError(
            f"loss.mini_batch_size={config.mini_batch_size} does not divide rollout.rollout_batch_size="
            f"{rollout.rollout_batch_size}; use {divisors(rollout.rollout_batch_size)}"
        )
    if loss.old_log_probs == "current" and config.num_sgd_steps > 1:
        raise UserError(
            f"loss.old_log_probs=current needs one optimizer step per rollout, but N_SGD={config.num_sgd_steps}; "
            "use recompute or engine"
        )
    if loss.old_log_probs == "engine" and loss.importance_cap > 0:
        raise UserError(
            f"loss.importance_cap={loss.importance_cap} weighs by pi_old / pi_engine, which is 1 with "
            "loss.old_log_probs=engine; use current or recompute, or importance_cap=0"
        )
    weights = config.data.weights
    if weights and (len(weights) != len(config.data.train) or min(weights) <= 0):
        raise UserError(
            f"data.weights={weights} must hold one number above 0 for each of the {len(config.data.train)} files of "
            "data.train"
        )
    _validate_temperatures(config)
    stale = "rollout.overlap=true" if rollout.overlap else "rollout.refill=expected"
    if (rollout.overlap or rollout.refill == "expected") and not config.may_train_stale:
        raise UserError(
            f"{stale} trains on groups that earlier weights have sampled, so the loss has to know what they were "
            "sampled from; use loss.old_log_probs=engine, or loss.importance_cap above 0"
        )
    if rollout.transport == "ray" and rollout.verify_weights:
        raise UserError("rollout.verify_weights=true compares nothing with rollout.transport=ray; drop one of them")
    bounds = config.data.difficulty_range
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise UserError(f"data.difficulty_range={bounds} must be [least, largest]")
    _validate_parallel(config)
    _validate_profiling(config)
    entropy = config.entropy
    if entropy.rule in ("paper", "released") and not entropy.min <= entropy.initial <= entropy.max:
        raise UserError(
            f"entropy.initial={entropy.initial} is outside [entropy.min, entropy.max]=[{entropy.min}, {entropy.max}]"
        )
    if rollout.max_generated_factor < 1:
        raise UserError(f"rollout.max_generated_factor={rollout.max_generated_factor} must be at least 1")
    if "" in rollout.stop:
        raise UserError(f"rollout.stop={rollout.stop} holds an empty string, which would end every response; drop it")


def _validate_temperatures(config: Config) -> None:
    temperatures = config.evaluation.temperatures
    if not temperatures or min(temperatures) < 0 or len(set(temperatures)) < len(temperatures):
        raise UserError(f"evaluation.temperatures={temperatures} must hold different numbers, 0 or more, at least one")
    if 0 in temperatures and config.evaluation.num_samples > 1:
        raise UserError(
            f"evaluation.temperatures={temperatures}: at 0 every response is the same; use "
            f"evaluation.num_samples=1 instead of {config.evaluation.num_samples}, or a temperature above 0"
        )


def _validate_stages(config: Config) -> None:
    """The table's own rules, then those of every stage's configuration."""
    ends = [stage.until for stage in config.stages]
    for number, (before, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
        if end <= before:
            raise UserError(
                f"stages: stage {number} ends with until={end}, not after step {before}; steps must increase"
            )
    negative = [stage.patience for stage in config.stages if stage.patience < 0]
    if negative:
        raise UserError(f"stages: patience={negative[0]} must be 0 or more steps")
    if config.steps > ends[-1]:
        raise UserError(
            f"steps={config.steps} is above until={ends[-1]} of the last stage; use at most that, or a later until"
        )
    if config.rollout.overlap and any(stage.patience for stage in config.stages):
        raise UserError(
            "rollout.overlap=true samples a step before it is known whether a stage's patience ends; leave one out"
        )
    if config.stages[-1].patience:
        raise UserError("stages: the last stage has patience but no stage follows it; leave it out there")
    for number in range(1, len(ends) + 1):
        try:
            validate(config.in_stage(number - 1))
        except UserError as error:
            raise UserError(f"stage {number}: {error}") from None


def _validate_parallel(config: Config) -> None:
    parallel, longest = config.parallel, config.longest_sequence
    if parallel.num_ranks % (parallel.tp * parallel.pp * parallel.cp):
        raise UserError(
            f"parallel.tp={parallel.tp} x parallel.pp={parallel.pp} x parallel.cp={parallel.cp} does not divide "
            f"parallel.num_ranks={parallel.num_ranks}; tp * pp * cp may be {divisors(parallel.num_ranks)}"
        )
    if parallel.cp > 1 and longest >= 2 * config.rollout.context_length:
        raise UserError(
            f"parallel.cp={parallel.cp} with parallel.tp={parallel.tp} pads every sequence to a multiple of "
            f"{config.alignment} tokens, {longest} for rollout.context_length={config.rollout.context_length}: "
            "more padding than tokens; use a smaller parallel.cp"
        )
    if config.token_budget < longest:
        padded = "" if config.alignment == 1 else f", {longest} tokens when padded to a multiple of {config.alignment}"
        raise UserError(
            f"parallel.token_budget={parallel.token_budget} is below rollout.context_length="
            f"{config.rollout.context_length}{padded}: the longest sequence would fit no micro-batch; "
            f"use at least {longest}"
        )


def _validate_profiling(config: Config) -> None:
    profiling = config.profiling
    if profiling.tool == "none":
        return
    if not profiling.steps:
        raise UserError(f"profiling.tool={profiling.tool} needs profiling.steps, the training steps to record")
    outside = [rank for rank in profiling.ranks if not 0 <= rank < config.parallel.num_ranks]
    if outside or not profiling.ranks:
        raise UserError(
            f"profiling.ranks={profiling.ranks} must be ranks from 0 to {config.parallel.num_ranks - 1}, at least one"
        )


_POSITIVE = (
    "steps keep_checkpoints deadline_minutes parallel.num_ranks parallel.tp parallel.pp parallel.cp "
    "parallel.cpu_threads_per_rank parallel.timeout_s rollout.rollout_batch_size rollout.context_length "
    "rollout.temperature rollout.num_engines rollout.engine_tp rollout.kv_cache_gb rollout.bucket_mb "
    "rollout.max_batched_tokens loss.num_reuse "
    "reward.num_workers reward.timeout_s reward.memory_mb reward.max_queued reward.recycle_tasks reward.recycle_mb "
    "reward.code_timeout_s reward.code_total_s reward.code_memory_mb evaluation.num_samples"
).split()
_NOT_NEGATIVE = (
    "save_interval keep_every max_restarts parallel.token_budget rollout.max_response_length rollout.probe_interval "
    "rollout.probe_tolerance loss.mini_batch_size loss.clip_low loss.clip_high loss.importance_cap "
    "loss.kl_coefficient optimizer.lr optimizer.warmup_steps optimizer.eps optimizer.weight_decay "
    "optimizer.clip_grad reward.max_failure_rate evaluation.interval profiling.trace_steps "
).split()


_SHARES = "rollout.top_p rollout.gpu_memory_utilization evaluation.top_p".split()
_MOST_SEED = 2**31 - 1  # engines and ranks add their numbers to it, and numpy takes 32 bits


def _validate_finite(config: Config) -> None:
    """NaN and infinity pass most comparisons, and no key has a use for them."""
    for item in all_keys():
        value = _value(config, item.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{item.name}={value} must be finite; give a number")


def _validate_ranges(config: Config) -> None:
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = _value(config, name)
        if value < 0 or (value == 0 and name in _POSITIVE):
            raise UserError(f"{name}={value} must be {'above 0' if name in _POSITIVE else '0 or more'}")
    for name in _SHARES:
        if not 0 < _value(config, name) <= 1:
            raise UserError(f"{name}={_value(config, name)} must be in (0, 1]")
    for name in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= _value(config, name) < 1:
            raise UserError(f"{name}={_value(config, name)} must be in [0, 1)")
    if config.reward.max_failure_rate > 1:
        raise UserError(f"reward.max_failure_rate={config.reward.max_failure_rate} is a share; use 0 to 1")
    if not 0 <= config.seed <= _MOST_SEED:
        raise UserError(f"seed={config.seed} must be from 0 to {_MOST_SEED}")


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
