"""The torch profiler's file; nsys needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from or1_megatron.config import Config
from or1_megatron.errors import UserError
from or1_megatron.parallel.device import release_memory, take_peak_memory
from or1_megatron.profiling.profilers import Profiler
from or1_megatron.recipe import load

RECIPE = Path(__file__).resolve().parents[3] / "launch" / "recipes" / "quickstart.yaml"


def test_the_torch_profiler_writes_what_ran(tmp_path: Path):
    file = tmp_path / "profile" / "rank0-step-000003.json"
    profiler = Profiler("torch", file)
    profiler.start()
    torch.mm(torch.randn(8, 8), torch.randn(8, 8))
    profiler.stop()
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert "aten::mm" in names and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["profiling.tool=torch"], "profiling.steps"),
        (["profiling.tool=torch", "profiling.steps=[1]", "profiling.ranks=[0,2]"], "ranks from 0 to 1"),
        (["profiling.tool=perf"], "none, torch, nsys"),
    ],
)
def test_what_cannot_be_recorded_is_refused(words: list[str], said: str):
    with pytest.raises(UserError, match=said):
        load(RECIPE, words)
    assert isinstance(load(RECIPE, ["profiling.tool=torch", "profiling.steps=[1]"]), Config)


def test_peak_memory_falls_back_after_it_was_taken():
    release_memory()  # an allocator may hand out, and keep, what other tests have freed
    take_peak_memory()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    high = take_peak_memory()
    del block
    release_memory()
    take_peak_memory()
    assert 0 < take_peak_memory() <= high - (32 << 20)
