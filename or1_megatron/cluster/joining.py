"""Ray itself: started on this host, or joined at RAY_ADDRESS, with every node and GPU there before work begins.

A launcher sets RAY_ADDRESS (host:port) and, so that a run waits for its whole cluster and never takes another's for its
own, OR1_RAY_NODES and OR1_RAY_GPUS. `python -m or1_megatron.cluster` waits for them and says what is missing.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from or1_megatron.errors import RunFailure, UserError

_DEADLINE_S = 300.0


@dataclass(frozen=True)
class Node:
    """A live node of the Ray cluster."""

    id: str
    host: str
    address: str
    gpus: int


def address_to_join() -> str:
    """RAY_ADDRESS; empty: Ray is started on this host. Raises UserError for one that names no cluster."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address and ":" not in address:
        raise UserError(
            f"RAY_ADDRESS={address} names no cluster for certain: another's could answer; set host:port, or unset it"
        )
    return address


def enter(object_store_bytes: int) -> bool:
    """Starts Ray on this host, or joins the cluster at RAY_ADDRESS and waits for it; whether it joined.

    Raises UserError for an address that names no cluster, RunFailure when nobody answers or nodes are missing.
    """
    address = address_to_join()
    if not address:
        with _own_sigterm():
            ray.init(
                address="local",
                num_cpus=1,
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
        return False
    try:
        with _own_sigterm():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RayError, ValueError, RuntimeError) as error:
        raise RunFailure(f"no Ray answers at RAY_ADDRESS={address}: {str(error).splitlines()[0]}") from None
    wait_until_whole(_number("OR1_RAY_NODES"), _number("OR1_RAY_GPUS"), _number("OR1_RAY_DEADLINE_S") or _DEADLINE_S)
    return True


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps this process's handler, if it has one: ray.init's ends the process, and a run would save nothing."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def nodes() -> list[Node]:
    """Live nodes; the driver's own first, the others by address."""
    own = ray.get_runtime_context().get_node_id()
    found = [
        Node(
            id=entry["NodeID"],
            host=entry["NodeManagerHostname"],
            address=entry["NodeManagerAddress"],
            gpus=int(entry["Resources"].get("GPU", 0)),
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return sorted(found, key=lambda node: (node.id != own, _by_number(node.address)))


def wait_until_whole(num_nodes: int, num_gpus: int, deadline_s: float) -> None:
    """Returns when so many nodes and GPUs are registered; 0: not asked. Raises RunFailure: too late, or too many."""
    end = time.monotonic() + deadline_s
    while True:
        there = nodes()
        gpus = sum(node.gpus for node in there)
        listed = ", ".join(f"{node.host} ({node.gpus} GPUs)" for node in there)
        if (num_nodes and len(there) > num_nodes) or (num_gpus and gpus > num_gpus):
            raise RunFailure(
                f"Ray has {len(there)} nodes and {gpus} GPUs, of which {num_nodes} and {num_gpus} are this run's: "
                f"it is another's cluster; there are {listed}"
            )
        if len(there) >= num_nodes and gpus >= num_gpus:
            return
        if time.monotonic() > end:
            raise RunFailure(
                f"after {deadline_s:.0f} s Ray has {len(there)} of {num_nodes} nodes and {gpus} of {num_gpus} GPUs: "
                f"{listed}"
            )
        time.sleep(0.5)


def _by_number(address: str) -> tuple[int, ...] | tuple[str]:
    parts = address.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else (address,)


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdigit():
        raise UserError(f"{name}={text} is not a whole number; the launcher sets it, or unset it")
    return int(text)


def main() -> int:
    """Joins, waits, prints the nodes."""
    try:
        if not os.environ.get("RAY_ADDRESS"):
            raise UserError("RAY_ADDRESS is not set: host:port of the cluster to wait for")
        enter(0)
        there = nodes()
    except (UserError, RunFailure) as error:
        print(f"or1: {error}", file=sys.stderr)
        return error.exit_code
    print(f"Ray has {len(there)} nodes with {sum(node.gpus for node in there)} GPUs")
    ray.shutdown()
    return 0
