"""The quickstart: fetch a small real model, write its problems, train on them.

Run from the repository root: `python launch/quickstart.py [key=value ...]`; overrides go to `or1 train`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fetch_model import fetch_smollm2

from or1_megatron.cli import main
from or1_megatron.data.tasks import write_addition_problems

RECIPE = Path(__file__).parent / "recipes" / "quickstart.yaml"


def quickstart(overrides: list[str]) -> int:
    cache = Path(".cache")
    model = fetch_smollm2(cache / "models")
    train, held_out = cache / "quickstart" / "train.jsonl", cache / "quickstart" / "held_out.jsonl"
    counts = write_addition_problems(train, held_out, seed=0)
    print(f"quickstart: model {model}; {counts[0]} problems to train on, {counts[1]} held out", flush=True)
    return main(["train", str(RECIPE), *overrides])


if __name__ == "__main__":
    sys.exit(quickstart(sys.argv[1:]))
