"""Ports and addresses of one job on its nodes. Standard library only.

A block of ports for each job id, below the range from which the kernel hands out ports (32768 by default), so that two
jobs on a node do not meet and no passing connection can sit on one of ours.
"""

from __future__ import annotations

import fcntl
import socket
import struct

FIRST, BLOCK, NUM_BLOCKS = 12000, 200, 100
OF_A_NODE = (
    "node-manager", "object-manager", "dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent",
    "metrics-export",
)  # fmt: skip
_SIOCGIFADDR = 0x8915


def of_job(job_id: int) -> dict[str, int]:
    """Name -> port; workers have the range from "first worker" to "last worker"."""
    base = FIRST + job_id % NUM_BLOCKS * BLOCK
    fixed = ("gcs", "meeting", *OF_A_NODE, "ray-client-server")
    return {
        **{name: base + offset for offset, name in enumerate(fixed)},
        "first worker": base + len(fixed),
        "last worker": base + BLOCK - 1,
    }


def own_address(peer: str, interface: str = "", *, alone: bool = False) -> tuple[str, str]:
    """This node's IPv4 address and interface: of `interface`, or of the route to `peer`.

    Raises OSError for an unknown interface or peer; ValueError when the address is a loopback one and this node is
    not alone.
    """
    if interface:
        return _interface_address(interface), interface
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        address = probe.getsockname()[0]
    if not alone and address.startswith("127."):
        raise ValueError(f"the route to {peer} begins at {address}, which others cannot reach; submit with --interface")
    for _, name in socket.if_nameindex():
        try:
            if _interface_address(name) == address:
                return address, name
        except OSError:
            continue
    raise ValueError(f"no interface has the address {address}; submit with --interface")


def _interface_address(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])
