"""The quickstart: fetch a small real model, write its problems, train on them.

Run from the repository root: `python launch/quickstart.py [key=value ...]`; overrides go to `or1 train`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fetch_model import MODEL_NAME

from or1_megatron.cli import main
from or1_megatron.data.tasks import write_addition_problems
from or1_megatron.parallel.device import slow_in_bf16

RECIPE = Path(__file__).parent / "recipes" / "quickstart.yaml"


def quickstart(overrides: list[str]) -> int:
    cache = Path(".cache")
    # In a process of its own: what dequantising takes is not there during the run.
    fetch = [sys.executable, Path(__file__).with_name("fetch_model.py"), "--out", cache / "models"]
    fetched = subprocess.run(fetch, check=False)
    if fetched.returncode:
        return fetched.returncode
    model = cache / "models" / MODEL_NAME
    train, held_out = cache / "quickstart" / "train.jsonl", cache / "quickstart" / "held_out.jsonl"
    counts = write_addition_problems(train, held_out, seed=0)
    print(f"quickstart: model {model}; {counts[0]} problems to train on, {counts[1]} held out", flush=True)
    if slow_in_bf16():
        print("quickstart: this CPU emulates bf16, so model.dtype=fp32", flush=True)
        overrides = ["model.dtype=fp32", *overrides]
    return main(["train", str(RECIPE), *overrides])


if __name__ == "__main__":
    sys.exit(quickstart(sys.argv[1:]))
