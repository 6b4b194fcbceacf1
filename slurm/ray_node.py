"""`ray start` for one node among many, with as much time for it as one says.

    python ray_node.py SECONDS start --block ...      (SECONDS, then the words of `ray`)

Ray 2.60 gives up a node where starting is slow, many nodes on a shared file system say, for two reasons that no setting
reaches. Its raylet waits 15 s for the dashboard agent to write down a port, though the port is given: nobody tells the
raylet (Ray's issue 65983); here it is told. And `ray start` waits 30 s for the head to know the node, asking without a
pause, which takes a core; here it asks twice a second, for SECONDS, while the raylet lives.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

PAUSE_S = 0.5


def patient(ask: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """`ask`, asked again until it answers, the time is over or this node's raylet has ended."""
    end = time.monotonic() + seconds

    def ask_again(*words: Any) -> Any:
        while True:
            try:
                return ask(*words)
            except RuntimeError:
                time.sleep(PAUSE_S)
                if time.monotonic() > end or not _raylet_lives():
                    raise

    return ask_again


def _raylet_lives() -> bool:
    children = psutil.Process().children()
    return any(child.name().startswith("raylet") and child.status() != psutil.STATUS_ZOMBIE for child in children)


def told_its_port(start: Callable[..., Any], words: list[str]) -> Callable[..., Any]:
    """`start` of a process of Ray's; a raylet learns the agent's port that is among the words of `ray start`."""
    given = [word.partition("=")[2] for word in words if word.startswith("--dashboard-agent-listen-port=")]

    def start_told(command: list[str], process_type: str, *others: Any, **named: Any) -> Any:
        more = [f"--dashboard_agent_listen_port={port}" for port in given] if process_type == "raylet" else []
        return start([*command, *more], process_type, *others, **named)

    return start_told


if __name__ == "__main__":
    from ray._private import services
    from ray.scripts.scripts import main

    services.get_node = patient(services.get_node, float(sys.argv.pop(1)))
    services.start_ray_process = told_its_port(services.start_ray_process, sys.argv)
    sys.argv[0] = "ray"
    sys.exit(main())
