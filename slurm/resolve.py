"""What submit.py has to know of a recipe, as JSON. Run by the job's Python, which has the package; starts nothing.

python resolve.py RECIPE [key=value ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from or1_megatron.architecture import read_architecture
from or1_megatron.dryrun import memory_per_rank, plan_lines
from or1_megatron.errors import UserError
from or1_megatron.recipe import load, to_yaml


def resolve(recipe: str, overrides: list[str]) -> dict:
    """Raises UserError for what `or1 train` would refuse."""
    config = load(recipe, overrides)
    lines = plan_lines(config)
    known = (Path(config.model.path) / "config.json").is_file()
    parts = memory_per_rank(config.widest(), read_architecture(config.model.path)) if known else {}
    return {
        "name": config.name,
        "runs_dir": config.runs_dir,
        "yaml": to_yaml(config),
        "plan": lines,
        "ranks": config.parallel.num_ranks,
        "engines": config.rollout.num_engines,
        "placement": config.rollout.placement,
        "stages": [min(stage.until, config.steps) for stage in config.stages] or [config.steps],
        "memory_gib": sum(parts.values()) / 2**30,
        "missing": [path for path in [config.model.path, *config.data.train] if not Path(path).exists()],
    }


if __name__ == "__main__":
    try:
        print(json.dumps(resolve(sys.argv[1], sys.argv[2:])))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
