"""Machines as the planner sees them: what the data sheet says, and what software achieves on it.

The achieved numbers of `H800` were fitted once, together, to the paper's Tables 7, 8 and 9, see profiling/paper.py;
they describe the system of 2025 that the paper measured: eager vLLM, FSDP, rewards after the rollout. None was measured
with this program. `make gpu-check` measures some on one GPU; from its gpu-check.json, `train_efficiency` is the share
of the peak of an update step with what it recomputes counted, `peak_flops` and `bandwidth` have the two ceilings as
what is at best achieved, and these figures are to take the place of the fitted ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One kind of device in nodes of `devices_per_node`. Seconds, bytes, operations per second."""

    name: str
    # data sheet
    peak_flops: float  # dense bf16
    bandwidth: float  # of the device's memory
    memory: float
    link: float  # per device and direction, inside a node
    network: float  # per device, between nodes
    devices_per_node: int
    # achieved
    weight_efficiency: float  # of the bandwidth, reading weights in a decoding round
    cache_efficiency: float  # of the bandwidth, reading keys and values
    decode_efficiency: float  # of the peak, in decoding and prefill
    train_efficiency: float  # of the peak, in forward and backward, recomputed operations counted
    round_s: float  # of a decoding round, whatever the batch
    layer_s: float  # of a decoding round, per layer: kernel launches
    response_s: float  # of a decoding round, per response in it: scheduling, sampling, detokenising
    allreduce_s: float  # latency of one small all-reduce between tensor-parallel engine ranks
    optimizer_step_s: float  # of an update, per optimizer step
    step_s: float  # of the rest of a step, whatever the batch: the slowest check, switching, waiting
    scoring_s: float  # of the rest of a step, per response: checking it and moving it through the driver
    packing_s: float  # of the rest of a step, per generated token, where the driver packs: benchmarks/rollout.py

    def replaced(self, **values: float) -> Hardware:
        return dataclasses.replace(self, **values)


H800 = Hardware(
    name="H800 80 GB",
    peak_flops=989e12,
    bandwidth=3.35e12,
    memory=80e9,
    link=200e9,
    network=50e9,
    devices_per_node=8,
    weight_efficiency=0.85,
    cache_efficiency=0.6,
    decode_efficiency=0.6,
    train_efficiency=0.30,
    round_s=0.5e-3,
    layer_s=0.155e-3,
    response_s=0.53e-3,
    allreduce_s=15e-6,
    optimizer_step_s=5.5,
    step_s=24.0,
    scoring_s=0.038,
    packing_s=60e-9,
)
KNOWN = {"h800": H800, "h100": dataclasses.replace(H800, name="H100 80 GB", link=450e9)}
