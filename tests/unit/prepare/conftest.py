from __future__ import annotations

from pathlib import Path

import pytest

from or1_megatron.prepare.catalog import CATALOG
from tests.unit.prepare import odd_steps


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a pipeline with the odd steps, which are in the catalogue for this test."""
    for step in odd_steps.STEPS:
        monkeypatch.setitem(CATALOG, step.name, step)
    return odd_steps.write_recipe(tmp_path)
