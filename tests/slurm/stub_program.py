"""Stands in for `or1 train` where a test is about the launcher: keeps its contract with the run folder, trains nothing.

Joins Ray as the run does and writes what it found there, then counts steps: a metrics line and a checkpoint each, from
the newest one on. USR1: saves and ends with 130. STUB_STEPS, STUB_STEP_S, STUB_FAIL (exit code at the first step).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from or1_megatron.cluster import joining

run = Path(os.environ["OR1_RUN"])
joining.enter(0)
nodes = [[node.host, node.gpus] for node in joining.nodes()]
with (run / "ray_nodes.jsonl").open("a") as file:
    file.write(json.dumps(nodes) + "\n")
stopped = []
signal.signal(signal.SIGUSR1, lambda number, frame: stopped.append(number))
done = max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/driver.json")), default=0)
if "STUB_FAIL" in os.environ:
    print("the stub fails as it was told")
    sys.exit(int(os.environ["STUB_FAIL"]))
for step in range(done + 1, int(os.environ["STUB_STEPS"]) + 1):
    time.sleep(float(os.environ.get("STUB_STEP_S", "0.5")))
    row = {"step": step, "seconds/step": 0.5, "attempt": os.environ["OR1_ATTEMPT"][-1]}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    checkpoint = run / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "driver.json").write_text("{}")
    if stopped:
        sys.exit(130)
