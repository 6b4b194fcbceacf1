"""Sizes of the GPU benchmarks, and tiny ones of the same form that a CPU goes through in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.models.qwen2 import QWEN_1_5B, qwen2_config, qwen_7b


@dataclass(frozen=True)
class Sizes:
    copied: int  # bytes
    square: int  # side of the matrices
    logits: tuple[tuple[int, int], ...]  # tokens, columns of a rank
    head: tuple[int, int, int]  # tokens, hidden size, vocabulary
    models: dict[str, dict[str, Any]]  # config.json
    packs: tuple[int, ...]  # tokens of a micro-batch
    step_tokens: int
    buckets: tuple[int, ...]  # bytes at most of one of the weights that are pushed
    cycled: dict[str, Any]  # config.json of the actor whose memory is given up and taken back
    rounds: int


FULL = Sizes(
    copied=4 << 30,
    square=8192,
    # Qwen2.5-7B's vocabulary: a quarter of it, as with tp = 4, and all of it
    logits=((8192, 38_016), (32_768, 38_016), (8192, 152_064), (32_768, 152_064)),
    head=(32_768, 3584, 152_064),
    models={"1.5B": QWEN_1_5B, "4 layers of 7B": qwen_7b(layers=4)},
    packs=(8192, 32_768),
    step_tokens=32_768,
    buckets=(128 << 20, 1 << 30),
    cycled=qwen2_config(896, 4864, 6, 14, 2, 151_936, tied=True),
    rounds=7,
)
TINY = Sizes(
    copied=1 << 16,
    square=64,
    logits=((16, 300), (8, 1000)),
    head=(16, 32, 300),
    models={
        "1.5B": qwen2_config(64, 128, 2, 2, 1, 300, tied=True),
        "4 layers of 7B": qwen2_config(64, 128, 1, 2, 1, 300, tied=False),
    },
    packs=(32, 64),
    step_tokens=64,
    buckets=(50_000,),
    cycled=qwen2_config(64, 128, 1, 2, 1, 300, tied=True),
    rounds=2,
)
