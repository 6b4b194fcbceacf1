"""A recipe on a tiny model and a Slurm for the tests of this folder; skipped where none can be started."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import SlurmCluster, missing

PROBLEMS = [("What is 3 + 4?", "7"), ("Name a prime.", "2"), ("2 + 2 =", "4"), ("Half of 18?", "9"), ("1 + 0 =", "1")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    long = os.environ.get("SLURM") != "full"
    for item in items:
        if reason and item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=reason))
        elif long and item.get_closest_marker("slurm_long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: `make test-slurm`, which sets SLURM=full, runs it"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all nodes see: a model, problems, a recipe."""
    from tests.tiny_models import write_tiny_model

    root = tmp_path_factory.mktemp("shared")
    write_tiny_model(root / "model", "llama", tied=True)
    rows = [{"data_source": "t", "prompt": text, "reward_model": {"ground_truth": gold}} for text, gold in PROBLEMS]
    (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "tiny",
        "steps": 3,
        "save_interval": 1,
        "model": {"path": str(root / "model"), "dtype": "fp32"},
        "data": {"train": [str(root / "problems.jsonl")]},
        "parallel": {"num_ranks": 2, "tp": 2},
        "rollout": {
            "rollout_batch_size": 4,
            "group_size": 2,
            "context_length": 64,
            "max_response_length": 12,
            "max_generated_factor": 1.0,
            "kv_cache_gb": 0.25,
            "max_batched_tokens": 512,
            "bucket_mb": 16,
        },
        "loss": {"rejection": False},
        "entropy": {"rule": "fixed", "initial": 0.1},
        "optimizer": {"lr": 1e-3},
        "reward": {"num_workers": 1},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="session")
def recipe(shared: Path) -> Path:
    return shared / "recipe.yaml"


@pytest.fixture(scope="module")
def slurm(shared: Path) -> Iterator[SlurmCluster]:
    """Four nodes with one GPU each."""
    with SlurmCluster(shared, nodes=4) as cluster:
        yield cluster
