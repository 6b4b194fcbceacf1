"""Ray's start on a slow node: asked about as long as its raylet lives, and the raylet is told the port it waits for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import ray_node


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A child with the name of Ray's."""
    program = shutil.copy(str(shutil.which("sleep")), tmp_path / "raylet")
    with subprocess.Popen([program, "60"]) as process:
        yield process
        process.kill()


class Head:
    """Knows the node after so many questions."""

    def __init__(self, unknown: int):
        self.unknown, self.asked = unknown, 0

    def get_node(self, node: str) -> str:
        self.asked += 1
        if self.asked <= self.unknown:
            raise RuntimeError(f"{node} is not known")
        return node


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_node, "PAUSE_S", 0.01)


def test_asks_until_the_node_is_known(raylet: subprocess.Popen) -> None:
    head = Head(unknown=5)
    assert ray_node.patient(head.get_node, 60)("node") == "node"
    assert head.asked == 6


def test_ends_when_the_time_is_over(raylet: subprocess.Popen) -> None:
    head = Head(unknown=10**9)
    with pytest.raises(RuntimeError, match="not known"):
        ray_node.patient(head.get_node, 0.1)("node")
    assert head.asked > 1


def test_ends_with_the_raylet(raylet: subprocess.Popen) -> None:
    raylet.kill()
    head = Head(unknown=10**9)
    with pytest.raises(RuntimeError, match="not known"):
        ray_node.patient(head.get_node, 60)("node")


def test_only_the_raylet_is_told_the_port() -> None:
    def start(command: list[str], process_type: str, fate_share: bool) -> list[str]:
        return command

    told = ray_node.told_its_port(start, ["start", "--dashboard-agent-listen-port=12005", "--block"])
    assert told(["raylet"], "raylet", True) == ["raylet", "--dashboard_agent_listen_port=12005"]
    assert told(["gcs_server"], "gcs_server", fate_share=True) == ["gcs_server"]
    assert ray_node.told_its_port(start, ["start"])(["raylet"], "raylet", True) == ["raylet"]
