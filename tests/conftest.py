"""What every test may rely on: no network look-ups, quiet OpenMP threads, and a reason printed for each skip."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# Before torch and transformers are imported: both read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Every rank of every test would compile for its few tokens. Compiled formulas have unit tests of their own, and
# test_actor.py steps once with them; the benchmarks and the quickstart run nothing else.
os.environ.setdefault("OR1_COMPILE", "0")

# The same examples each time, however busy the machine is.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from or1_megatron.parallel.device import has_cuda

    no_gpu = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
    for item in marked:
        if not has_cuda():
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, fetched once into .cache/models."""
    from launch.fetch_model import FetchError, fetch_smollm2

    try:
        return fetch_smollm2(Path(__file__).parents[1] / ".cache" / "models")
    except FetchError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
