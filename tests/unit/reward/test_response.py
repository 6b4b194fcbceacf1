"""Where the answer starts: behind the reasoning, which may never end."""

from __future__ import annotations

import pytest

from or1_megatron.reward.response import after_reasoning


@pytest.mark.parametrize(
    ("response", "reasoning_open", "unclosed", "text"),
    [
        ("just an answer", False, "zero", "just an answer"),
        ("<think>9</think> 8", False, "zero", " 8"),
        ("9</think> 8", True, "zero", " 8"),
        ("9</think> 8", False, "zero", " 8"),
        ("<think>1</think>2<think>3</think>4", False, "zero", "4"),
        ("<think>surely 9", False, "zero", None),
        ("surely 9", True, "zero", None),
        ("surely 9", True, "whole", "surely 9"),
        ("<think>surely 9", False, "whole", "<think>surely 9"),
        ("</think>", True, "zero", ""),
    ],
)
def test_after_reasoning(response: str, reasoning_open: bool, unclosed: str, text: str | None) -> None:
    assert after_reasoning(response, reasoning_open=reasoning_open, unclosed=unclosed) == text
