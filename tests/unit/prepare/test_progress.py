"""What a step that takes long says where there is no terminal."""

from __future__ import annotations

import time

import pytest

from or1_megatron.prepare.progress import Bars


def test_without_a_terminal_a_long_step_says_how_far_it_is(capsys: pytest.CaptureFixture[str]):
    with Bars(heartbeat_s=0.05) as bars:
        with bars.step("measured", 1200) as advance:
            advance(34)
            time.sleep(0.3)
        with bars.step("unknown", None):
            time.sleep(0.3)
        with bars.step("short", 5) as advance:
            advance(5)
    said = capsys.readouterr().err.splitlines()
    assert set(said) == {"measured: 34 of 1,200 rows done after 0 s", "unknown: 0 rows done after 0 s"}
