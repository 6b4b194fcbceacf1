"""An engine that dies or hangs during a rollout costs nothing but time, as long as another one is left."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray

from or1_megatron.cluster import Cluster, workers
from or1_megatron.config import Config
from or1_megatron.errors import RunFailure
from or1_megatron.recipe import from_tree
from or1_megatron.rollout.engine import SamplingSpec
from or1_megatron.types import Group, Prompt
from tests.tiny_models import write_tiny_model

SAMPLING = SamplingSpec(temperature=1.0, top_p=1.0, max_response_length=200)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_of(tmp_path, engine_tp=1)


def config_of(tmp_path: Path, engine_tp: int) -> Config:
    model = write_tiny_model(tmp_path / "model", "llama", tied=True)
    rollout = {"num_engines": 2, "context_length": 256, "kv_cache_gb": 0.1, "max_batched_tokens": 256}
    rollout["engine_tp"] = engine_tp
    return from_tree([("test", {"model": {"path": str(model), "dtype": "fp32"}, "rollout": rollout})])


def test_the_others_take_over_and_the_last_ones_death_is_the_end(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_PING_INTERVAL_S", 0.0)  # whoever looks after the engines sees a death at once
    texts = [f"What is {i} + 4?" for i in range(24)]
    prompts = [Prompt(uid=text, text=text, tokens=tuple(text.encode()), ground_truth=("",)) for text in texts]
    said: list[str] = []
    with Cluster(config, tmp_path, with_actor=False) as cluster:
        cluster.message = said.append
        pids = cluster._workers.wait([engine.ping.remote() for engine in cluster._engines])

        def rollout() -> list[Group]:
            groups = []
            for group in cluster.generate([prompts[::2], prompts[1::2]], 8, SAMPLING):
                if not groups:
                    os.kill(pids[1], signal.SIGKILL)
                groups.append(group)
            return groups

        with ThreadPoolExecutor(1) as ahead:
            under_way = ahead.submit(rollout)
            while not under_way.done():  # as the driver does while the ranks train; it must not mistake the death
                cluster._workers.wait([ray.put("a rank's answer")])
                time.sleep(0.01)
            groups = under_way.result()
        assert sorted(group.prompt.uid for group in groups) == sorted(texts), "each prompt once"
        assert all(len(group.samples) == 8 for group in groups)
        (line,) = said
        assert line.startswith("engine1 died;") and line.endswith("prompts go to the 1 engines left")
        assert cluster.num_engines == 1
        cluster._workers._deadline_s = 6.0
        with pytest.raises(RunFailure, match="engine0 brought nothing for 0.1 minutes"):
            for _ in cluster.generate([prompts[::2], prompts[1::2]], 8, SAMPLING):
                os.kill(pids[0], signal.SIGSTOP)  # as a collective hangs
    gone = time.monotonic() + 20
    while psutil.pid_exists(pids[0]) and time.monotonic() < gone:
        time.sleep(0.2)
    assert not psutil.pid_exists(pids[0]), "it outlives the run"


def test_an_engine_is_lost_with_one_of_its_processes(tmp_path: Path) -> None:
    """Of an engine with several, the Ray actor lives on: the death is an exception there."""
    texts = [f"What is {i} + 4?" for i in range(16)]
    prompts = [Prompt(uid=text, text=text, tokens=tuple(text.encode()), ground_truth=("",)) for text in texts]
    said: list[str] = []
    with Cluster(config_of(tmp_path, engine_tp=2), tmp_path, with_actor=False) as cluster:
        cluster.message = said.append
        pids = cluster._workers.wait([engine.ping.remote() for engine in cluster._engines])
        groups = []
        for group in cluster.generate([prompts[::2], prompts[1::2]], 4, SAMPLING):
            if not groups:
                worker = next(c for c in psutil.Process(pids[1]).children() if "Worker_TP1" in " ".join(c.cmdline()))
                worker.kill()
            groups.append(group)
    assert sorted(group.prompt.uid for group in groups) == sorted(texts), "each prompt once"
    (line,) = said
    assert line.startswith("engine1 failed: RuntimeError(") and line.endswith("prompts go to the 1 engines left")
