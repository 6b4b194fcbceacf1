"""Policy update of one training step: advantages, packing, old log-probs, N_SGD optimizer steps."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from or1_megatron.architecture import Architecture
from or1_megatron.cluster import Cluster
from or1_megatron.collect import Rollout
from or1_megatron.config import Config
from or1_megatron.parallel.packing import Plan, pack, plan, shared_prompts, unpack_response_values
from or1_megatron.profiling.flops import Tokens, training_flops
from or1_megatron.profiling.spans import Spans
from or1_megatron.rl.advantage import group_advantages
from or1_megatron.types import Group, MicroBatch, Sample, Sequence, TokenValues


class Updater:
    """Turns kept groups into optimizer steps on the cluster's actor. `config` is that of the running stage; `midway`
    says that steps were taken, or begun, which belong to no completed training step yet."""

    def __init__(self, config: Config, architecture: Architecture, cluster: Cluster, spans: Spans):
        self.config, self._architecture, self._cluster, self._spans = config, architecture, cluster, spans
        self._shares_prompts = cluster.shares_prompts()
        self.midway = False

    def vocabulary_entropy(self, rollout: Rollout) -> float:
        """Full-vocabulary entropy of the actor over all sampled tokens of the rollout buffer, nats per token."""
        values = self._score([_sequence(sample, 0.0) for sample in rollout.samples], "entropy_T")
        return float(np.concatenate(values).mean())

    def step(self, rollout: Rollout, *, alpha: float, learning_rate: float) -> dict[str, float]:
        """N_SGD optimizer steps over the kept groups; the metrics of the step. Nothing kept: nothing done."""
        if not rollout.kept:
            return {"sgd_steps": 0}
        samples = [sample for group in rollout.kept for sample in group.samples]
        engine = [sample.log_probs for sample in samples]
        with self._spans.span("prepare"):
            sequences = self.sequences(rollout.kept)
        metrics: list[dict[str, float]] = []
        current: list[np.ndarray] = []
        bounds = mini_batches([len(group.samples) for group in rollout.kept], self.config.mini_batch_size)
        for reuse in range(self.config.loss.num_reuse):
            for start, end in bounds:
                chosen = weighted(sequences[start:end], self.config.loss.mean_over)
                result, log_probs = self._optimizer_step(chosen, alpha, learning_rate)
                metrics.append(result)
                if reuse == 0 and start == 0:  # still the policy that the engines sampled from
                    current = log_probs
        with self._spans.span("metrics"):
            merged = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
            merged |= {name: sum(m[name] for m in metrics) for name in ("tokens", "flops", "packing/spared_tokens")}
            return {**merged, **mismatch_metrics(current, engine[: len(current)]), "sgd_steps": len(metrics)}

    def sequences(self, groups: list[Group]) -> list[Sequence]:
        """One per sample, with its advantage and the log-probs that the loss needs."""
        wanted = self.config.loss
        samples = [sample for group in groups for sample in group.samples]
        advantages = [
            advantage
            for group in groups
            for advantage in group_advantages(
                group.rewards, group.truncated, mask=wanted.advantage_mask, normalise_std=wanted.normalise_std
            )
        ]
        bare = [_sequence(sample, advantage) for sample, advantage in zip(samples, advantages, strict=True)]
        engine = [sample.log_probs for sample in samples]
        kinds: dict[str, list[np.ndarray]] = {}
        if wanted.old_log_probs == "engine":
            kinds["old_log_probs"] = engine
        elif wanted.old_log_probs == "recompute":
            with self._spans.span("old_log_probs"):
                kinds["old_log_probs"] = self._score(bare, "log_probs_T")
        if wanted.importance_cap > 0:
            kinds["engine_log_probs"] = engine
        if wanted.kl_coefficient > 0:
            with self._spans.span("reference_log_probs"):
                kinds["reference_log_probs"] = self._score(bare, "log_probs_T", reference=True)
        return [
            dataclasses.replace(sequence, **{name: rows[i] for name, rows in kinds.items()})
            for i, sequence in enumerate(bare)
        ]

    def _optimizer_step(
        self, sequences: list[Sequence], alpha: float, learning_rate: float
    ) -> tuple[dict[str, float], list[np.ndarray]]:
        num_tokens = sum(s.num_response_tokens for s in sequences)
        with self._spans.span("pack"):
            layout, batches = self.packed(sequences)
        self.midway = True
        with self._spans.span("update"):
            results = self._cluster.update(
                batches,
                entropy_coefficient=alpha,
                num_tokens=num_tokens,
                lr=learning_rate,
                temperature=self.config.rollout.temperature,
            )
        passed = Tokens.of(sequences, itertools.chain(*batches))
        names = results[0].sums
        totals = {name: sum(result.sums[name] for result in results) / num_tokens for name in names}
        log_probs = _in_order(sequences, batches, [result.values for result in results], "log_probs_T")
        return {
            "loss": sum(result.loss for result in results),
            "grad_norm": results[0].grad_norm,
            "entropy/vocabulary": totals.pop("entropy"),
            "clip_fraction": totals.pop("clipped"),
            **{f"loss/{name}": value for name, value in totals.items()},
            "tokens": sum(len(s.tokens) for s in sequences),
            "flops": training_flops(self._architecture, passed),
            "packing/imbalance": layout.imbalance,
            "packing/micro_batch_imbalance": layout.micro_batch_imbalance,
            "packing/spared_tokens": sum(passed.spared),
        }, log_probs

    def packed(self, sequences: list[Sequence]) -> tuple[Plan, list[list[MicroBatch]]]:
        """The balanced plan, and each replica's micro-batches."""
        alignment, share = self.config.alignment, self._shares_prompts
        layout = plan(
            [len(sequence.tokens) for sequence in sequences],
            num_ranks=self.config.dp,
            token_budget=self.config.token_budget,
            alignment=alignment,
            linear_work=self._architecture.linear_work,
            shared=shared_prompts(sequences) if share else (),
        )
        batches = [
            [pack(sequences, ids, alignment=alignment, share_prompts=share) for ids in rank]
            for rank in layout.micro_batches
        ]
        return layout, batches

    def _score(self, sequences: list[Sequence], quantity: str, *, reference: bool = False) -> list[np.ndarray]:
        _, batches = self.packed(sequences)
        score = self._cluster.reference_log_probs if reference else self._cluster.log_probs
        values = score(batches, temperature=self.config.rollout.temperature)
        return _in_order(sequences, batches, values, quantity)

    def probe(self, tokens: list[int]) -> tuple[float, float]:
        """(mean, max) |engine - actor| log-prob of tokens[1:] over all engines, at temperature 1."""
        sequence = Sequence(tuple(tokens), 1, 0.0, None)
        empty: list[int] = []
        batches = [
            [pack([sequence], ids, alignment=self.config.alignment)] for ids in [[0], *[empty] * (self.config.dp - 1)]
        ]
        values = self._cluster.log_probs(batches, temperature=1.0)
        actor = _in_order([sequence], batches, values, "log_probs_T")[0]
        gaps = [np.abs(np.array(engine) - actor) for engine in self._cluster.engine_log_probs(tokens)]
        return float(max(gap.mean() for gap in gaps)), float(max(gap.max() for gap in gaps))


def mini_batches(sizes: list[int], mini_batch_size: int) -> list[tuple[int, int]]:
    """[start, end) of the samples of each mini-batch: equal runs of whole groups, as near to mini_batch_size groups as
    such runs come. Where groups are missing, a rest of a few would make a step as long as any other."""
    ends = [0, *itertools.accumulate(sizes)]
    count = max(1, round(len(sizes) / mini_batch_size))
    cuts = [len(sizes) * i // count for i in range(count + 1)]
    return [(ends[i], ends[j]) for i, j in itertools.pairwise(cuts)]


def weighted(sequences: list[Sequence], mean_over: str) -> list[Sequence]:
    """The sequences of one mini-batch with the weight of their tokens, see rl/loss.py: token weights add up to N."""
    if mean_over == "tokens":
        return sequences
    share = sum(s.num_response_tokens for s in sequences) / len(sequences)
    return [dataclasses.replace(s, weight=share / s.num_response_tokens) for s in sequences]


def _sequence(sample: Sample, advantage: float) -> Sequence:
    tokens = np.concatenate((sample.prompt.tokens, sample.tokens))
    return Sequence(tokens, len(sample.prompt.tokens), advantage, None)


def _in_order(
    sequences: list[Sequence], batches: list[list[MicroBatch]], values: list[list[TokenValues]], quantity: str
) -> list[np.ndarray]:
    """Values of the response tokens, per sequence, in the order of `sequences`."""
    rows: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    for batch, value in zip(itertools.chain(*batches), itertools.chain(*values), strict=True):
        pieces = unpack_response_values(getattr(value, quantity), batch, sequences)
        for place, piece in zip(batch.sequence_ids, pieces, strict=True):
            rows[place] = np.asarray(piece)
    return rows


def mismatch_metrics(actor: list[np.ndarray], engine: list[np.ndarray]) -> dict[str, float]:
    """Between log-probs of the same sampled tokens, per sequence.

    kl: k3 estimate of KL(engine || actor), exp(d) - d - 1 with d = actor - engine. ess: effective share of the tokens
    under the weights exp(d), (sum w)^2 / (n sum w^2), 1 when the two agree.
    """
    gap = np.concatenate(actor).astype(np.float64) - np.concatenate(engine)
    weight = np.exp(gap)
    return {
        "mismatch/mean": float(np.abs(gap).mean()),
        "mismatch/max": float(np.abs(gap).max()),
        "mismatch/kl": float((weight - gap - 1).mean()),
        "mismatch/ess": float(weight.sum() ** 2 / (len(weight) * (weight**2).sum())),
    }
