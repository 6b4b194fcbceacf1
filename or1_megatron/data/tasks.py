"""The quickstart's problems: single-digit addition from reasoning-gym, answered in a box after two examples.

The split is by unordered pair: if 3 + 6 is held out, so is 6 + 3, or the mirror would leak. The pairs of the two
worked examples are never held out. Both depend on the seed only.

    python -m or1_megatron.data.tasks --train F --held-out F [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from or1_megatron.parallel.file_sums import publish_text

DATA_SOURCE = "reasoning_gym/chain_sum"
EXAMPLES = ((2, 5), (4, 1))
NUM_HELD_OUT_PAIRS = 12  # of the 55 unordered pairs
_DRAWS = 4000  # all 100 ordered pairs are among them unless the generator changed; asserted below

Pair = tuple[int, int]


def write_addition_problems(train: Path, held_out: Path, seed: int) -> tuple[int, int]:
    """Writes both files (jsonl, one problem a line) and returns how many problems each holds; they sum to 100."""
    sides = split_pairs(addition_pairs(seed), seed)
    for path, split, pairs in zip((train, held_out), ("train", "held_out"), sides, strict=True):
        rows = [json.dumps(problem(pair, split, index)) for index, pair in enumerate(pairs)]
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_text(path, "\n".join(rows) + "\n")
    return len(sides[0]), len(sides[1])


def addition_pairs(seed: int) -> list[Pair]:
    """The 100 ordered pairs of digits, in the order in which reasoning-gym's chain_sum draws them first."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=_DRAWS, seed=seed
    )
    pairs: dict[Pair, None] = {}
    for item in drawn:
        left, operator, right = item["metadata"]["expression"].split()
        if operator == "+":
            assert int(left) + int(right) == int(item["answer"])
            pairs[int(left), int(right)] = None
    assert len(pairs) == 100, f"chain_sum drew {len(pairs)} of 100 pairs in {_DRAWS} draws"
    return list(pairs)


def split_pairs(pairs: list[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held out), each in the given order; a pair and its mirror are on the same side."""
    shown = {tuple(sorted(pair)) for pair in EXAMPLES}
    unordered = sorted({tuple(sorted(pair)) for pair in pairs} - shown)
    away = set(random.Random(seed).sample(unordered, NUM_HELD_OUT_PAIRS))
    return (
        [pair for pair in pairs if tuple(sorted(pair)) not in away],
        [pair for pair in pairs if tuple(sorted(pair)) in away],
    )


def problem(pair: Pair, split: str, index: int) -> dict[str, Any]:
    """One row in the field's schema. The prompt is raw text: no chat template, no space at its end."""
    examples = "".join(f"{a} + {b} = \\boxed{{{a + b}}}\n" for a, b in EXAMPLES)
    return {
        "data_source": DATA_SOURCE,
        "prompt": f"{examples}{pair[0]} + {pair[1]} =",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(sum(pair))},
        "extra_info": {"split": split, "index": index},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the quickstart's addition problems.")
    parser.add_argument("--train", type=Path, required=True, help="training problems, .jsonl")
    parser.add_argument("--held-out", type=Path, required=True, help="held-out problems, .jsonl")
    parser.add_argument("--seed", type=int, default=0, help="chooses order and split; %(default)s")
    arguments = parser.parse_args()
    num_train, num_held_out = write_addition_problems(arguments.train, arguments.held_out, arguments.seed)
    print(f"{arguments.train}: {num_train} problems; {arguments.held_out}: {num_held_out} problems")


if __name__ == "__main__":
    main()
