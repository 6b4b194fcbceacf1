"""Math answers (7.1): text after the reasoning -> last balanced box -> equal string, or Math-Verify on boxed answers.

The reasoning ends at the last `</think>`; a response that opened `<think>` and never closed it has no answer (a
truncated response cannot score). A response without either tag is taken whole: raw prompts have no reasoning part.
Deadlines are the caller's business: Math-Verify's own rely on SIGALRM and do not hold inside long C calls.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

_BOX = "\\boxed{"


def score(response: str, ground_truth: tuple[str, ...]) -> str:
    """Verdict `correct`, `wrong` or `unparsable` (no boxed answer). Any one of the gold answers counts."""
    answer = extract_answer(response)
    if answer is None:
        return "unparsable"
    if any(answer == gold.strip() for gold in ground_truth):
        return "correct"
    parsed = _parse(answer)
    if not parsed:
        return "unparsable"
    from math_verify import verify

    # The gold answer is the first argument: the comparison is not symmetric for relations and intervals.
    right = any(verify(list(_parse_gold(gold)), parsed, timeout_seconds=None) for gold in ground_truth)
    return "correct" if right else "wrong"


def extract_answer(response: str) -> str | None:
    """Content of the last balanced \\boxed{...} after the reasoning, stripped; None when there is none."""
    if "</think>" in response:
        response = response.rsplit("</think>", 1)[1]
    elif "<think>" in response:
        return None
    end = len(response)
    while (start := response.rfind(_BOX, 0, end)) >= 0:
        content = _balanced(response, start + len(_BOX))
        if content is not None:
            return content.strip()
        end = start
    return None


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def _parse(answer: str) -> list[Any]:
    from math_verify import parse

    return parse(f"{_BOX}{answer}}}", parsing_timeout=None)  # type: ignore[arg-type]


@lru_cache(maxsize=65536)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    return tuple(_parse(gold))
