"""What is refused before there is a run folder or a Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from or1_megatron import cli, inputs
from or1_megatron.cluster import cluster, joining
from or1_megatron.inputs import check_inputs
from or1_megatron.recipe import load
from tests.tiny_models import write_tiny_model
from tests.tiny_recipe import write_tiny_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a host without a GPU, with 8 GB of memory, where Ray is not to be started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "num_devices", lambda: 0)
    monkeypatch.setattr(inputs, "has_cuda", lambda: False)
    monkeypatch.setattr(inputs.psutil, "virtual_memory", lambda: SimpleNamespace(total=8e9))
    monkeypatch.setattr(inputs.psutil, "swap_memory", lambda: SimpleNamespace(total=0))
    monkeypatch.setattr(joining, "enter", lambda size: pytest.fail("Ray is started"))
    model = write_tiny_model(tmp_path / "model", "llama", tied=True, vocab=301, hidden=64)
    return write_tiny_recipe(tmp_path, model)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rollout.transport=nccl"], "rollout.transport=nccl needs GPUs, and there are none"),
        (
            ["rollout.overlap=true", "rollout.placement=colocated", "loss.old_log_probs=engine"],
            "rollout.overlap=true needs engines beside the actor",
        ),
        (["rollout.num_engines=1000"], "rollout.num_engines=1000 needs 20"),
        (["parallel.num_ranks=1000"], "parallel.num_ranks=1000 needs 20"),
    ],
)
def test_refused_before_the_folder(words: list[str], said: str, recipe: Path, capsys: pytest.CaptureFixture[str]):
    run = recipe.parent / "run"
    capsys.readouterr()
    assert cli.main(["train", str(recipe), *words, f"run_dir={run}"]) == 2
    assert f"or1: error: {said}" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert not run.exists()


def test_an_address_of_no_cluster_is_refused_before_the_folder(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cli.main(["train", str(recipe), f"run_dir={recipe.parent / 'run'}"]) == 2
    assert "RAY_ADDRESS=auto names no cluster" in capsys.readouterr().err and not (recipe.parent / "run").exists()


def test_what_other_hosts_have_is_asked_when_they_are_joined(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "node1:6379")
    check_inputs(load(recipe, ["rollout.transport=nccl", "rollout.num_engines=1000"]))


def test_the_memory_of_a_gpu_is_not_that_of_its_host(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inputs, "has_cuda", lambda: True)
    monkeypatch.setattr(cluster, "num_devices", lambda: 1000)
    check_inputs(load(recipe, ["rollout.num_engines=900"]))
