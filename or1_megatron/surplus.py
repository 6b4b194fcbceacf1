"""Groups that a step sampled and did not train on, as a file of its checkpoint.

There may be tens of millions of tokens: they and their log-probs are two arrays, bit for bit, and only what is per
response is text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from or1_megatron.errors import UserError
from or1_megatron.types import Group, Prompt, Sample

_DTYPES = {"tokens": np.int32, "log_probs": np.float32}


def write_groups(path: Path, groups: list[Group]) -> None:
    """`path` ends in .npz."""
    rows = [{"uid": group.prompt.uid, "samples": [_as_dict(sample) for sample in group.samples]} for group in groups]
    samples = [sample for group in groups for sample in group.samples]
    tokens, log_probs = (
        np.concatenate([np.empty(0, dtype), *(getattr(sample, name) for sample in samples)], dtype=dtype)
        for name, dtype in _DTYPES.items()
    )
    np.savez(path, groups=np.frombuffer(json.dumps(rows).encode(), np.uint8), tokens=tokens, log_probs=log_probs)


def _as_dict(sample: Sample) -> dict[str, Any]:
    rest = {name: value for name, value in vars(sample).items() if name not in ("prompt", *_DTYPES)}
    return {"length": len(sample.tokens), **rest}


def read_groups(path: Path, prompts: Mapping[str, Prompt]) -> list[Group]:
    """Those of `write_groups`; `prompts` by uid. Raises UserError when one is not among them."""
    with np.load(path) as file:
        rows = json.loads(file["groups"].tobytes())
        arrays = {name: file[name] for name in _DTYPES}
    groups, place = [], 0
    for row in rows:
        if row["uid"] not in prompts:
            raise UserError(
                f"{path} holds responses to problem {row['uid']}, which data.train no longer has; resume with the "
                "files that the run began with"
            )
        group = Group(prompts[row["uid"]])
        for sample in row["samples"]:
            end = place + sample.pop("length")
            mine = {name: array[place:end].copy() for name, array in arrays.items()}
            group.samples.append(Sample(prompt=group.prompt, **mine, **sample))
            place = end
        groups.append(group)
    return groups
