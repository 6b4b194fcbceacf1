"""Where the answer stands in a response: behind the reasoning."""

from __future__ import annotations

_OPEN, _CLOSE = "<think>", "</think>"


def reasoning_is_open(prompt: str) -> bool:
    """Whether the prompt ends inside `<think>`, so that the response begins with reasoning."""
    return prompt.rfind(_OPEN) > prompt.rfind(_CLOSE)


def after_reasoning(response: str, *, reasoning_open: bool, unclosed: str) -> str | None:
    """The text after the last `</think>` (7.1); None for a reasoning that was opened and never closed.

    reasoning_open: the prompt ends inside `<think>`, as chat templates of reasoning models do.
    unclosed: `zero`, such a response has no answer (it was cut; the paper gives it 0), or `whole`, all of it counts.
    A response without reasoning is taken whole.
    """
    if _CLOSE in response:
        return response.rsplit(_CLOSE, 1)[1]
    if (reasoning_open or _OPEN in response) and unclosed == "zero":
        return None
    return response
