"""One section of the GPU benchmarks in a process of its own: what goes wrong on a GPU can spoil all that comes after.

    python -m benchmarks.gpu.section NAME --out FILE [--ceilings FILE] [--tiny] [--deadline MONOTONIC]

FILE is written anew after each part, so that a section that is stopped leaves what it has measured. Each part gets an
equal share of the time that is left, and none is begun that would not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import ceilings, step, vocabulary, weights
from benchmarks.gpu.clock import Part, free_memory
from benchmarks.gpu.sizes import FULL, TINY, Sizes
from benchmarks.harness import Benchmark
from or1_megatron.parallel import device

SECTIONS: dict[str, Callable[..., list[Part]]] = {
    "ceilings": ceilings.parts,
    "logits": vocabulary.logits_parts,
    "head": vocabulary.head_parts,
    **{f"update {model}": partial(step.parts, model=model) for model in FULL.models},
    "weights": weights.parts,
}


def measure(name: str, sizes: Sizes, ceiling: ceilings.Ceilings | None, deadline: float, out: Path) -> None:
    """Runs the section's parts one after the other, until time.monotonic(), the same in all processes, is `deadline`:
    none is begun when less time is left than the longest before it has taken."""
    found: dict[str, Any] = {"rows": [], "marks": [], "notes": [], "failures": []}
    facts: dict[str, Any] = {}
    parts, longest_s = SECTIONS[name](sizes, ceiling, facts), 0.0
    for number, part in enumerate(parts, 1):
        begun = time.monotonic()
        if deadline - begun < longest_s:
            found["notes"].append(f"part {number} of {name}: not run, out of time")
        else:
            try:
                _run(part, name, sizes.rounds, begun + (deadline - begun) / (len(parts) - number + 1), found)
            except Exception as error:  # the next part is another story
                where, trace = f"part {number} of {name}", traceback.format_exc()
                found["failures"].append({"where": where, "error": str(error), "traceback": trace})
            free_memory()
            longest_s = max(longest_s, time.monotonic() - begun)
        _write(out, {**found, **{key: facts[key] for key in ("ceilings", "kernels") if key in facts}})


def _run(part: Part, name: str, rounds: int, deadline: float, found: dict[str, Any]) -> None:
    bench = Benchmark(name, "")
    part(bench)
    if bench.cases:
        bench.measure(rounds, deadline - time.monotonic())
    record = bench.record()
    found["rows"] += record["rows"]
    found["marks"] += record["marks"]
    found["notes"] += [note if isinstance(note, str) else note() for note in bench.notes]


def _write(out: Path, found: dict[str, Any]) -> None:
    temporary = out.with_suffix(".part")
    temporary.write_text(json.dumps(found, indent=1))
    os.replace(temporary, out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ceilings", type=Path, help="what the section of this name has written")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="of this machine's time.monotonic()")
    options = parser.parse_args(arguments)
    ceiling = ceilings.Ceilings(**json.loads(options.ceilings.read_text())["ceilings"]) if options.ceilings else None
    device.install()
    with tempfile.TemporaryDirectory() as scratch:  # new groups meet there, too
        device.init_process_group(f"file://{scratch}/store", 0, 1, 300)
        measure(options.name, TINY if options.tiny else FULL, ceiling, options.deadline, options.out)


if __name__ == "__main__":
    main()
