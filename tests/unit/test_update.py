"""What an update hands to the actor: advantages, log-probs, weights, N and the settings of every optimizer step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from or1_megatron.architecture import parse_architecture
from or1_megatron.collect import Rollout
from or1_megatron.config import Config
from or1_megatron.profiling.spans import Spans
from or1_megatron.recipe import from_tree
from or1_megatron.rl.advantage import group_advantages
from or1_megatron.types import Group, MicroBatch, Prompt, Sample, TokenValues, UpdateResult
from or1_megatron.update import Updater

QWEN2 = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 999, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 99, "tie_word_embeddings": True,
}  # fmt: skip
GAP = 0.25  # of the first mini-batch's log-probs, engine above actor
Row = dict[str, Any]


class RecordingActor:
    """Stands in for the cluster: notes what it is given; all it says of a token follows from the token."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[list[MicroBatch]], Row]] = []

    def shares_prompts(self) -> bool:
        return False

    def log_probs(self, batches: list[list[MicroBatch]], **settings: Any) -> list[list[TokenValues]]:
        self.calls.append(("log_probs", batches, settings))
        return [[_values(batch, log_probs) for batch in rank] for rank in batches]

    def reference_log_probs(self, batches: list[list[MicroBatch]], **settings: Any) -> list[list[TokenValues]]:
        self.calls.append(("reference_log_probs", batches, settings))
        return [[_values(batch, reference) for batch in rank] for rank in batches]

    def update(self, batches: list[list[MicroBatch]], **settings: Any) -> list[UpdateResult]:
        self.calls.append(("update", batches, settings))
        number = sum(name == "update" for name, _, _ in self.calls)
        results = []
        for rank in batches:
            tokens = sum(int((batch.weights_T > 0).sum()) for batch in rank)
            sums = {"entropy": 0.5 * tokens, "clipped": float(tokens)}
            values = [_values(batch, log_probs) for batch in rank]
            results.append(UpdateResult(sums, loss=float(number), grad_norm=2.0, values=values))
        return results


def log_probs(tokens: Any) -> Any:
    return -tokens / 100


def reference(tokens: Any) -> Any:
    return -tokens / 50


def _values(batch: MicroBatch, of: Any) -> TokenValues:
    labels = batch.labels_T.numpy().astype(np.float32)
    return TokenValues(of(labels), labels / 10)


def received(batches: list[list[MicroBatch]]) -> dict[tuple[int, ...], Row]:
    """What stands at the response tokens, by these."""
    found: dict[tuple[int, ...], Row] = {}
    names = ("weights", "advantages", "old_log_probs", "engine_log_probs", "reference_log_probs")
    for batch in itertools.chain(*batches):
        for start, end in itertools.pairwise(batch.cu_seqlens):
            places = torch.arange(start, end)[batch.weights_T[start:end] > 0]
            if not len(places):
                continue  # a pack of padding
            tensors = {name: getattr(batch, f"{name}_T") for name in names}
            row = {name: None if tensor is None else tensor[places].tolist() for name, tensor in tensors.items()}
            found[tuple(batch.labels_T[places].tolist())] = row
    return found


def config(loss: Row) -> Config:
    tree = {
        "model": {"path": "/m"},
        "parallel": {"num_ranks": 2, "token_budget": 32},
        "rollout": {"context_length": 32, "rollout_batch_size": 4, "group_size": 3, "temperature": 0.7},
        "loss": {"mini_batch_size": 2, "old_log_probs": "recompute", **loss},
    }
    return from_tree([("t", tree)])


def make_groups() -> list[Group]:
    """Four of three responses, all of other tokens and lengths; one of the right ones and one of the others is cut."""
    counter = itertools.count(100)
    groups = []
    for g in range(4):
        prompt = Prompt(f"p{g}", "x", tuple(range(1, 3 + g)), ("1",))
        group = Group(prompt)
        for i in range(3):
            tokens = np.array([next(counter) for _ in range(1 + (2 * g + i) % 5)], np.int32)
            engine = log_probs(tokens) + (GAP if g < 2 else 7.0)
            cut = "length" if (g, i) in ((0, 1), (3, 0)) else "stop"
            group.samples.append(Sample(prompt, i, tokens, engine, "x", cut, 0, reward=float(i == g % 3)))
        groups.append(group)
    return groups


def run(loss: Row, groups: list[Group] | None = None) -> tuple[RecordingActor, dict[str, float], list[Group]]:
    groups, actor = groups or make_groups(), RecordingActor()
    cluster: Any = actor
    updater = Updater(config(loss), parse_architecture(QWEN2, "test"), cluster, Spans())
    metrics = updater.step(Rollout(generated=groups, kept=groups), alpha=0.03, learning_rate=2e-5)
    return actor, metrics, groups


def by_response(groups: list[Group]) -> dict[tuple[int, ...], Sample]:
    return {tuple(s.tokens.tolist()): s for group in groups for s in group.samples}


def advantages(groups: list[Group], **settings: Any) -> dict[tuple[int, ...], float]:
    return {
        tuple(sample.tokens.tolist()): advantage
        for group in groups
        for sample, advantage in zip(
            group.samples, group_advantages(group.rewards, group.truncated, **settings), strict=True
        )
    }


def test_every_optimizer_step_gets_its_mini_batch_whole():
    actor, metrics, groups = run({"num_reuse": 2})
    names = [name for name, _, _ in actor.calls]
    assert names == ["log_probs"] + ["update"] * 4, "pi_old is computed once, before the first step"
    assert actor.calls[0][2] == {"temperature": 0.7}
    halves = [by_response(groups[:2]), by_response(groups[2:])]
    for number, (_, batches, settings) in enumerate(actor.calls[1:]):
        rows, samples = received(batches), halves[number % 2]
        assert len(batches) == 2 and rows.keys() == samples.keys(), number
        num_tokens = sum(map(len, rows))
        wanted = {"entropy_coefficient": 0.03, "num_tokens": num_tokens, "lr": 2e-5, "temperature": 0.7}
        assert settings == wanted
        for tokens, row in rows.items():
            assert row["weights"] == [1.0] * len(tokens), "the mean is over all tokens"
            assert row["advantages"] == pytest.approx([advantages(groups)[tokens]] * len(tokens))
            assert row["old_log_probs"] == pytest.approx([log_probs(token) for token in tokens])
            assert row["engine_log_probs"] is None and row["reference_log_probs"] is None
    assert metrics["sgd_steps"] == 4 and metrics["loss"] == 2 * (1 + 2 + 3 + 4) / 4 and metrics["grad_norm"] == 2
    assert metrics["entropy/vocabulary"] == 0.5 and metrics["clip_fraction"] == 1
    assert metrics["tokens"] == 2 * sum(sample.num_tokens for group in groups for sample in group.samples)
    # Of the first step only: after it the actor is another policy than the engines'.
    assert metrics["mismatch/mean"] == pytest.approx(GAP) and metrics["mismatch/max"] == pytest.approx(GAP)


def test_the_mean_over_responses_weighs_each_the_same():
    actor, _, _ = run({"mean_over": "responses"})
    for _, batches, settings in actor.calls[1:]:
        rows = received(batches)
        sums = [sum(row["weights"]) for row in rows.values()]
        assert sums == pytest.approx([settings["num_tokens"] / len(rows)] * len(rows))
        assert len({row["weights"][0] for row in rows.values()}) > 1


@pytest.mark.parametrize("settings", [{"mask": "before"}, {"mask": "after"}, {"normalise_std": False}])
def test_advantages_are_those_of_the_configuration(settings: Row):
    key = {"mask": "advantage_mask"}
    actor, _, groups = run({key.get(name, name): value for name, value in settings.items()})
    wanted = advantages(groups, **settings)
    assert wanted != advantages(groups), "the setting would make no difference"
    rows = received(actor.calls[1][1]) | received(actor.calls[2][1])
    assert {tokens: row["advantages"] for tokens, row in rows.items()} == {
        tokens: pytest.approx([wanted[tokens]] * len(tokens)) for tokens in rows
    }


@pytest.mark.parametrize("old", ["engine", "current"])
def test_old_log_probs_of_the_engine_or_none(old: str):
    groups = make_groups()
    loss = {"old_log_probs": old} if old == "engine" else {"old_log_probs": old, "mini_batch_size": 4}
    actor, _, _ = run(loss, groups)
    assert {name for name, _, _ in actor.calls} == {"update"}
    rows: dict[tuple[int, ...], Row] = {}
    for _, batches, _ in actor.calls:
        rows |= received(batches)
    for tokens, sample in by_response(groups).items():
        wanted = pytest.approx(sample.log_probs.tolist()) if old == "engine" else None
        assert rows[tokens]["old_log_probs"] == wanted and rows[tokens]["engine_log_probs"] is None


def test_importance_weights_and_kl_get_what_they_compare_with():
    actor, _, groups = run({"importance_cap": 2.0, "kl_coefficient": 0.1})
    assert [name for name, _, _ in actor.calls] == ["log_probs", "reference_log_probs", "update", "update"]
    assert actor.calls[1][2] == {"temperature": 0.7}
    rows = received(actor.calls[2][1]) | received(actor.calls[3][1])
    for tokens, sample in by_response(groups).items():
        assert rows[tokens]["engine_log_probs"] == pytest.approx(sample.log_probs.tolist())
        assert rows[tokens]["reference_log_probs"] == pytest.approx([reference(token) for token in tokens])
        assert rows[tokens]["old_log_probs"] == pytest.approx([log_probs(token) for token in tokens])


def test_the_vocabulary_entropy_is_of_every_sampled_token():
    groups, actor = make_groups(), RecordingActor()
    cluster: Any = actor
    updater = Updater(config({}), parse_architecture(QWEN2, "test"), cluster, Spans())
    found = updater.vocabulary_entropy(Rollout(generated=groups, kept=groups[:1]))
    tokens = np.concatenate([sample.tokens for group in groups for sample in group.samples])
    assert found == pytest.approx(float(tokens.mean()) / 10) and actor.calls[0][2] == {"temperature": 0.7}


def test_without_a_group_there_is_no_step():
    actor = RecordingActor()
    cluster: Any = actor
    updater = Updater(config({}), parse_architecture(QWEN2, "test"), cluster, Spans())
    assert updater.step(Rollout(generated=make_groups()), alpha=0.0, learning_rate=1e-6) == {"sgd_steps": 0}
    assert not actor.calls
