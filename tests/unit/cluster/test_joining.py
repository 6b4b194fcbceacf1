"""An address that could be anybody's cluster is refused before Ray is asked; a run waits for all its nodes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from or1_megatron.cluster import joining
from or1_megatron.errors import RunFailure, UserError


@pytest.mark.parametrize("address", ["auto", "localhost"])
def test_an_address_without_a_port_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="set host:port"):
        joining.enter(0)


def test_a_count_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OR1_RAY_NODES", "two")
    with pytest.raises(UserError, match="OR1_RAY_NODES=two"):
        joining._number("OR1_RAY_NODES")


def test_addresses_sort_by_number() -> None:
    assert sorted(["10.0.0.10", "10.0.0.9"], key=joining._by_number) == ["10.0.0.9", "10.0.0.10"]


KEPT = """
import os, signal, time
from or1_megatron.cluster import joining
seen = []
signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
joining.enter(1 << 27)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
assert seen == [signal.SIGTERM]
joining.ray.shutdown()
"""


def test_the_handler_of_sigterm_stays() -> None:
    """A run saves what it has upon SIGTERM; ray.init puts a handler of its own in its place."""
    subprocess.run([sys.executable, "-c", KEPT], check=True, timeout=120)


class Clock:
    """Moves on when somebody sleeps; at each time the nodes that Ray tells of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *seen: list[str]):
        self.seconds, self._seen = 0.0, list(seen)
        monkeypatch.setattr(joining.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(joining.time, "sleep", self._sleep)
        monkeypatch.setattr(joining, "nodes", self._nodes)

    def _sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def _nodes(self) -> list[joining.Node]:
        hosts = self._seen.pop(0) if len(self._seen) > 1 else self._seen[0]
        return [joining.Node(str(place), host, host, 8) for place, host in enumerate(hosts)]


def test_anothers_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, ["a"], ["a", "b", "c"])
    with pytest.raises(RunFailure, match="3 nodes and 24 GPUs, of which 2 and 16"):
        joining.wait_until_whole(2, 16, deadline_s=600)
    assert clock.seconds == 0.5


def test_a_run_begins_when_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, ["a"], ["a"], ["a", "b"])
    joining.wait_until_whole(2, 16, deadline_s=60)
    assert clock.seconds == 1.0


def test_a_missing_node_is_told_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, ["a"])
    with pytest.raises(RunFailure, match=r"after 60 s Ray has 1 of 2 nodes .*: a \(8 GPUs\)"):
        joining.wait_until_whole(2, 16, deadline_s=60)
