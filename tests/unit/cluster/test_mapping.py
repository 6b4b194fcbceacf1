"""A real local Ray: rows dealt through it come out as from processes of this machine, deaths included."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from or1_megatron.cluster.mapping import RayPool
from or1_megatron.errors import UserError
from or1_megatron.prepare.catalog import CATALOG
from or1_megatron.prepare.pool import LOST
from or1_megatron.prepare.recipe import load
from or1_megatron.prepare.runner import prepare
from tests.unit.prepare import odd_steps


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("local_ray")
def test_the_same_rows_and_drops_as_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(CATALOG, "deadly", next(step for step in odd_steps.STEPS if step.name == "deadly"))
    odd_steps.write_rows(tmp_path / "rows.jsonl", 400)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[300] = json.dumps(json.loads(lines[300]) | {"problem": "die"})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"steps:\n  all: {{do: rows, files: [{tmp_path}/rows.jsonl]}}\n  short: {{do: keep_length, most: 80}}\n"
        "  live: {do: deadly}\nwrite: {path: x}\n".replace("path: x", f"path: {tmp_path / 'ray.parquet'}")
    )
    over_ray = prepare(load(recipe, ["ray=local", "workers=2", f"cache={tmp_path / 'cache'}"]))
    drops = over_ray[2].outcome.drops
    assert drops == {LOST: 1} and over_ray[2].outcome.rows_in == over_ray[1].outcome.rows_out < 400
    here = [f"cache={tmp_path / 'cache2'}", f"write.path={tmp_path / 'here.parquet'}", "workers=1"]
    prepare(load(recipe, here))
    assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()


def test_local_and_an_address_contradict_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with (
        pytest.raises(UserError, match=r"ray=local, but RAY_ADDRESS=10.0.0.1:6379"),
        RayPool("local", object, lambda: bytes, 1),
    ):
        pass


class Where:
    """The body of a process that says on which node it is."""

    def __init__(self, opener: Callable[[], Callable[[bytes], bytes]]):
        self._opener = opener

    def ready(self) -> None:
        pass

    def apply(self, batch: bytes) -> bytes:
        return ray.get_runtime_context().get_node_id().encode()


def test_two_nodes_share_the_rows_and_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two nodes of a real cluster, each with its own scheduler and object store, on this machine."""
    odd_steps.write_rows(tmp_path / "rows.jsonl", 600)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"steps:\n  all: {{do: rows, files: [{tmp_path}/rows.jsonl]}}\n"
        f"  short: {{do: keep_length, most: 80}}\nwrite: {{path: {tmp_path / 'here.parquet'}}}\n"
    )
    prepare(load(recipe, [f"cache={tmp_path / 'here'}", "workers=1"]))
    monkeypatch.setenv("RAY_ADDRESS", "")
    nodes = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=nodes)
    try:
        cluster.add_node(**nodes)
        cluster.wait_for_nodes()
        assert cluster.address
        over_ray = [f"ray={cluster.address}", f"cache={tmp_path / 'ray'}", f"write.path={tmp_path / 'ray.parquet'}"]
        prepare(load(recipe, over_ray))
        assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()
        for table in ("rows.parquet", "drops.parquet"):
            found = {folder: next((tmp_path / folder).glob(f"keep_length-*/{table}")) for folder in ("here", "ray")}
            assert found["here"].read_bytes() == found["ray"].read_bytes()
        places: set[object] = set()
        for _ in range(10):  # a scheduler that has not heard of the other node for a while keeps a process
            if len(places) == 2:
                break
            with RayPool(cluster.address, Where, lambda: bytes, 0) as pool:
                places |= {place for _, place in pool.map((number, b"") for number in range(20))}
        assert len(places) == 2, "one process on each node, as Ray counts its CPUs"
    finally:
        ray.shutdown()
        cluster.shutdown()
