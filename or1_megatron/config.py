"""The configuration of a run: typed, documented, validated once, never changed afterwards.

recipe.py fills these dataclasses from YAML and `key=value` overrides; `or1 train --help` prints the fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from or1_megatron.sections import (
    DataConfig,
    EntropyConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfilingConfig,
    RewardConfig,
    RolloutConfig,
    StageConfig,
    key,
)


@dataclass
class Config:
    name: str = key("run", "name of the run: first word of its last line, part of the run folder's name")
    runs_dir: str = key("runs", "where run folders are made")
    run_dir: str = key("", "the run folder itself; no other run may be in it; empty: runs_dir/name-YYYYmmdd-HHMMSS")
    steps: int = key(100, "training steps")
    seed: int = key(0, "seed of sampling and of every rank's generator")
    save_interval: int = key(0, "checkpoint every k steps; 0: only at the end")
    background_save: bool = key(True, "write checkpoints while the run goes on; false: each save waits for the disk")
    keep_checkpoints: int = key(2, "newest checkpoints kept")
    keep_every: int = key(0, "checkpoints after every k-th step are kept for good; 0: none")
    stages: list[StageConfig] = key(
        [],
        "stage table: rows of until (last step), context_length, rollout_batch_size, mini_batch_size, group_size, "
        "token_budget, max_response_length, temperature, patience (steps without gain that end it); what a row leaves "
        "out is as elsewhere",
    )
    drop_solved: bool = key(
        False, "at each stage start, drop the problems that the stage before answered correctly every time (3.1)"
    )
    max_restarts: int = key(
        0,
        "how often in a row, without a new checkpoint, all start anew from the newest one after a process died",
    )
    deadline_minutes: float = key(60.0, "a rank or an engine that brings nothing for so long counts as dead")
    wandb: str = key("", "Weights & Biases project that also gets the metrics (extra `wandb`); empty: none")
    mlflow: str = key(
        "", "MLflow experiment that also gets them (extra `mlflow`), where MLFLOW_TRACKING_URI says; empty: none"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    def in_stage(self, index: int) -> Config:
        """The configuration of one stage, without a table of its own; index 0 of no stages is the whole run."""
        if not self.stages:
            return self
        stage = self.stages[index]
        return dataclasses.replace(
            self,
            stages=[],
            rollout=_with(self.rollout, stage, _ROLLOUT_KEYS_OF_A_STAGE),
            loss=_with(self.loss, stage, ("mini_batch_size",)),
            parallel=_with(self.parallel, stage, ("token_budget",)),
        )

    def all_stages(self) -> list[Config]:
        return [self.in_stage(index) for index in range(max(1, len(self.stages)))]

    def widest(self) -> Config:
        """What engines and actor are built for: the largest context and token budget of all stages."""
        stages = self.all_stages()
        return dataclasses.replace(
            self,
            stages=[],
            rollout=dataclasses.replace(
                self.rollout, context_length=max(stage.rollout.context_length for stage in stages)
            ),
            parallel=dataclasses.replace(self.parallel, token_budget=max(stage.token_budget for stage in stages)),
        )

    @property
    def mini_batch_size(self) -> int:
        return self.loss.mini_batch_size or self.rollout.rollout_batch_size

    @property
    def num_sgd_steps(self) -> int:
        """N_SGD = D_R / D_T * N_reuse: optimizer steps per training step; 1 is on-policy."""
        return self.rollout.rollout_batch_size // self.mini_batch_size * self.loss.num_reuse

    @property
    def may_train_stale(self) -> bool:
        """Whether the loss knows what groups of earlier weights were sampled from."""
        return self.loss.old_log_probs == "engine" or self.loss.importance_cap > 0

    @property
    def alignment(self) -> int:
        """Training sequences are padded to a multiple of this, tokens.

        tp: sequence parallel cuts a pack into tp equal parts. Context parallel cuts each sequence into 2 * cp chunks
        first, each of which is then such a multiple of tp.
        """
        tp, cp = self.parallel.tp, self.parallel.cp
        return tp if cp == 1 else 2 * cp * tp

    @property
    def longest_sequence(self) -> int:
        """The context length when padded to the alignment, tokens."""
        return -(-self.rollout.context_length // self.alignment) * self.alignment

    @property
    def token_budget(self) -> int:
        """Most tokens in one packed micro-batch, the alignment's padding included."""
        return self.parallel.token_budget or self.longest_sequence

    @property
    def can_share_prompts(self) -> bool:
        """Whether packs may hold a prompt once for several responses: context parallel cuts whole sequences."""
        return self.parallel.share_prompts and self.parallel.cp == 1

    @property
    def dp(self) -> int:
        parallel = self.parallel
        return parallel.num_ranks // (parallel.tp * parallel.pp * parallel.cp)

    @property
    def engine_dtype(self) -> str:
        return self.model.dtype if self.rollout.engine_dtype == "auto" else self.rollout.engine_dtype

    @property
    def probe_tolerance(self) -> float:
        exact = self.model.dtype == "fp32" and self.engine_dtype == "fp32"
        return self.rollout.probe_tolerance or (1e-3 if exact else 0.1)


_ROLLOUT_KEYS_OF_A_STAGE = (
    "context_length", "rollout_batch_size", "group_size", "max_response_length", "temperature",
)  # fmt: skip


def _with(section: Any, stage: StageConfig, names: tuple[str, ...]) -> Any:
    return dataclasses.replace(section, **{name: getattr(stage, name) for name in names if getattr(stage, name)})


@dataclass(frozen=True)
class Key:
    """One configuration key, for `--help` and for suggestions."""

    name: str  # dotted
    type: str
    default: Any
    meaning: str
    choices: tuple[str, ...]


def all_keys(section: type = Config, prefix: str = "") -> list[Key]:
    """Every key of the configuration, depth first, in the order of declaration."""
    keys: list[Key] = []
    for item in dataclasses.fields(section):
        factory = item.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            keys += all_keys(factory, f"{prefix}{item.name}.")
            continue
        default = item.default if factory is dataclasses.MISSING else factory()
        keys.append(
            Key(prefix + item.name, str(item.type), default, item.metadata["meaning"], item.metadata["choices"])
        )
    return keys
