"""Weight pushes proven by generation: the engines of a run say what fresh engines of the exported weights say.

A run has one transport; here it changes between pushes, so that no other run has to be started for the second.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from or1_megatron.cluster import Cluster
from or1_megatron.cluster.transport import start
from or1_megatron.config import Config
from or1_megatron.convert import megatron_to_hf
from or1_megatron.parallel import device
from or1_megatron.parallel.packing import pack
from or1_megatron.recipe import from_tree
from or1_megatron.rollout.engine import SamplingSpec
from or1_megatron.types import Prompt, Sequence
from tests.tiny_models import write_tiny_model

TEXTS = ["What is 3 + 4?", "Name a prime.", "Half of 18?", "One, two,"]
PROBE = list(b"The same weights tell the same log-probs.")
GREEDY = SamplingSpec(temperature=0.0, top_p=1.0, max_response_length=16)


def config_of(model: Path, *, num_engines: int = 1, pp: int = 1, dtype: str = "fp32", **more: Any) -> Config:
    rollout = {
        "num_engines": num_engines,
        "context_length": 64,
        "kv_cache_gb": 0.1,
        "max_batched_tokens": 256,
        "placement": "colocated",
        **more,
    }
    tree: dict[str, Any] = {
        "model": {"path": str(model), "dtype": dtype},
        "rollout": rollout,
        "parallel": {"num_ranks": pp, "pp": pp},
    }
    return from_tree([("test", tree)])


def greedy(cluster: Cluster) -> dict[str, tuple[list[int], str, list[float]]]:
    prompts = [
        Prompt(uid=text, text=text, tokens=tuple(text.encode()), ground_truth=("",), data_source="t") for text in TEXTS
    ]
    engines = cluster.config.rollout.num_engines
    groups = cluster.generate([prompts[i::engines] for i in range(engines)], 1, GREEDY)
    only = {group.prompt.uid: group.samples[0] for group in groups}
    return {uid: (sample.tokens.tolist(), sample.text, sample.log_probs.tolist()) for uid, sample in only.items()}


def update(cluster: Cluster, config: Config, seed: int, lr: float) -> None:
    draw = np.random.default_rng(seed)
    sequences = [Sequence(tuple(map(int, draw.integers(3, 250, n))), n // 3, 1.0, None) for n in (20, 30, 12)]
    num_tokens = sum(len(s.tokens) - s.num_prompt_tokens for s in sequences)
    batches = [[pack(sequences, [0, 1, 2], alignment=config.alignment)]]
    cluster.update(batches, entropy_coefficient=0.0, num_tokens=num_tokens, lr=lr)


def push_by(cluster: Cluster, transport: str) -> None:
    """The next pushes of the run go by it, with checksums compared."""
    config = cluster.config
    rollout = dataclasses.replace(config.rollout, transport=transport, verify_weights=True)
    sides = dataclasses.replace(config, rollout=rollout), cluster._workers, cluster._ranks, cluster._engines
    cluster._transport, line = start(*sides, num_gpus=0, colocated=True, address=None)
    assert not line


def test_engines_equal_a_fresh_one_of_the_export_and_do_not_drift(tmp_path: Path) -> None:
    """Tied weights on two stages, two engines: what is easily left stale. Then one of the two dies."""
    model = write_tiny_model(tmp_path / "model", "llama", tied=True)
    config = config_of(model, num_engines=2, pp=2)
    with Cluster(config, tmp_path / "run") as cluster:
        cluster.push_weights(0)
        at_first = greedy(cluster)
        for step in range(3):
            update(cluster, config, step, lr=1e-2)
        cluster.push_weights(1)
        said, told = greedy(cluster), cluster.engine_log_probs(PROBE)
        assert {uid: row[:2] for uid, row in said.items()} != {uid: row[:2] for uid, row in at_first.items()}
        for version in range(2, 22):
            if version == 12:
                push_by(cluster, "gloo")
            update(cluster, config, version, lr=0.0)
            cluster.push_weights(version)
            assert cluster.engine_log_probs(PROBE) == told, f"drifted at push {version} with a learning rate of 0"
        os.kill(cluster.ask("ping")["engine1"], signal.SIGKILL)
        assert greedy(cluster) == said
        cluster.push_weights(22)
        assert cluster.engine_log_probs(PROBE) == told[:1], "the engine that is left"
        (tmp_path / "actor").mkdir()
        cluster.begin_save(tmp_path / "actor")
        cluster.finish_save()
    megatron_to_hf(tmp_path / "actor", model, tmp_path / "exported")
    with Cluster(config_of(tmp_path / "exported"), tmp_path / "fresh", with_actor=False) as cluster:
        fresh = greedy(cluster)
        assert {uid: row[:2] for uid, row in fresh.items()} == {uid: row[:2] for uid, row in said.items()}
        for uid, (_, _, log_probs) in fresh.items():
            np.testing.assert_allclose(log_probs, said[uid][2], atol=1e-5)
        expected = cluster.engine_log_probs(PROBE)[0]
    assert len(told) == 2
    for engine in told:
        np.testing.assert_allclose(engine, expected, atol=1e-5)


def test_an_engine_of_two_processes_takes_pushes(tmp_path: Path) -> None:
    """Biases, an untied head and a vocabulary that two processes cannot share evenly; its log-probs are the actor's."""
    model = write_tiny_model(tmp_path / "model", "qwen2", tied=False, vocab=301)
    config = config_of(model, engine_tp=2, placement="separate")
    batch = [[pack([Sequence(tuple(PROBE), 1, 0.0, None)], [0], alignment=1)]]
    with Cluster(config, tmp_path / "run") as cluster:
        before = cluster.engine_log_probs(PROBE)[0]
        for version, transport in ((1, "shm"), (2, "gloo")):
            push_by(cluster, transport)
            update(cluster, config, seed=version, lr=1e-2)
            cluster.push_weights(version)
            told = cluster.engine_log_probs(PROBE)[0]
            actor = cluster.log_probs(batch, temperature=1.0)[0][0].log_probs_T[: len(PROBE) - 1]
            np.testing.assert_allclose(told, actor, atol=1e-3)
        assert np.abs(np.array(told) - before).max() > 0.1, "the updates changed nothing that the probe can see"
        assert all(tokens for tokens, _, _ in greedy(cluster).values())


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_engines_on_gpus_take_pushes(transport: str, smollm2: Path, tmp_path: Path) -> None:
    """The engine on the actor's GPU maps its buffers; on one of its own it is a member of the ranks' group."""
    if device.num_devices() < (needed := {"ipc": 1, "nccl": 2}[transport]):
        pytest.skip(f"needs {needed} CUDA devices")
    placement = "colocated" if transport == "ipc" else "separate"
    more = {"transport": transport, "placement": placement, "verify_weights": True, "gpu_memory_utilization": 0.2}
    config = config_of(smollm2, dtype="bf16", **more)
    batch = [[pack([Sequence(tuple(PROBE), 1, 0.0, None)], [0], alignment=1)]]
    with Cluster(config, tmp_path / "run") as cluster:
        for version in range(3):
            cluster.push_weights(version)
            told = cluster.engine_log_probs(PROBE)[0]
            actor = cluster.log_probs(batch, temperature=1.0)[0][0].log_probs_T[: len(PROBE) - 1]
            assert np.abs(np.array(told) - actor).mean() < 0.1, "the probe's tolerance in bf16"
            update(cluster, config, seed=version, lr=1e-4)
