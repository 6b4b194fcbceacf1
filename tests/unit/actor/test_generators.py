"""Which checkpoints hold this layout's random states."""

from __future__ import annotations

from pathlib import Path

import pytest

from or1_megatron.actor import checkpoint


def test_a_key_that_begins_another_is_not_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """dp 1 is not dp 16: Megatron would look in vain for what is stored under neither."""
    stored = {"generators.tp2-cp1-pp1-dp16/shard_0.0.0.3_1.2.1.16": object()}
    monkeypatch.setattr(checkpoint, "load_sharded_metadata", lambda directory: stored)
    assert checkpoint._holds_generators(Path(), "generators.tp2-cp1-pp1-dp16")
    assert not checkpoint._holds_generators(Path(), "generators.tp2-cp1-pp1-dp1")
