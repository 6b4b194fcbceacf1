"""What submit.py has to know of a recipe, as JSON. Run by the job's Python, which has the package; starts nothing.

python resolve.py GPU_GB RECIPE [key=value ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from or1_megatron.architecture import read_architecture
from or1_megatron.dryrun import plan_lines, unfit
from or1_megatron.errors import UserError
from or1_megatron.recipe import load, to_yaml


def resolve(gpu_gb: float, recipe: str, overrides: list[str]) -> dict:
    """Raises UserError for what `or1 train` would refuse."""
    config = load(recipe, overrides)
    lines = plan_lines(config)
    known = (Path(config.model.path) / "config.json").is_file()
    return {
        "name": config.name,
        "runs_dir": config.runs_dir,
        "yaml": to_yaml(config),
        "plan": lines,
        "ranks": config.parallel.num_ranks,
        "engines": config.rollout.num_engines * config.rollout.engine_tp,
        "placement": config.rollout.placement,
        "stages": [min(stage.until, config.steps) for stage in config.stages] or [config.steps],
        "unfit": unfit(config.widest(), read_architecture(config.model.path), gpu_gb * 1e9) if known else "",
        "missing": [path for path in [config.model.path, *config.data.train] if not Path(path).exists()],
    }


if __name__ == "__main__":
    try:
        print(json.dumps(resolve(float(sys.argv[1]), sys.argv[2], sys.argv[3:])))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
