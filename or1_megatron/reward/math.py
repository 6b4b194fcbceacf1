"""Math answers (7.1): last balanced box after the reasoning -> equal string, or Math-Verify on boxed answers.

The gold answer is Math-Verify's first argument: its comparison of relations and intervals is not symmetric. A gold
`1<x<2` accepts `(1,2)`, a gold `(1,2)` does not accept `1<x<2`. Both sides are boxed before parsing, since a bare gold
answer loses 8 % of real pairs; gold answers and verdicts on short answers are kept, because the 16 responses of a
group share them. Deadlines are the caller's business: Math-Verify's own rely on SIGALRM and do not hold in C calls.
"""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Any

from or1_megatron.reward.contradictions import contradicts, decimals

MAX_ANSWER = 5_000  # characters; beyond it only an equal string is right
_MANY_BRACKETS = 20
_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_DIGIT_SPACE = re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\}|~)(?=\d{3}(?!\d))")  # 10\,000
_LOOKS = re.compile(r"\\(?:boldsymbol|bm|mathbf)(?=\s*\{)|\\(?:text)?color\s*\{[A-Za-z]+\}")
_REPEATING = re.compile(r"(\d+)\.(\d*)\\overline\{(\d+)\}")
_IN_BASE = re.compile(r"(-?[0-9A-Za-z.]+)_\{?(\d+)\}?")


def score(text: str, ground_truth: tuple[str, ...]) -> str:
    """Verdict `correct`, `wrong` or `unparsable` (no box, or nothing readable in it). Any one gold answer counts."""
    answer = extract_answer(text)
    if answer is None:
        return "unparsable"
    if any(answer == gold.strip() for gold in ground_truth):
        return "correct"
    return _compare(answer, ground_truth) if len(answer) <= MAX_ANSWER else "unparsable"


def extract_answer(text: str) -> str | None:
    """Content of the last \\boxed{...} that is closed, stripped; of nested ones the inner. None when there is none."""
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if last < 0:
        return None
    answer = _last_closed_box(text, last)  # of a long response this is all that is read, as a rule
    return _last_closed_box(text, 0) if answer is None else answer


def _last_closed_box(text: str, begin: int) -> str | None:
    found, start_of_best = None, -1
    open_braces: list[int] = []  # where the content of each open box starts; -1 for a plain brace
    for token in _TOKENS.finditer(text, begin):
        written = token.group()
        if written == "}":
            start = open_braces.pop() if open_braces else -1
            if start > start_of_best:
                found, start_of_best = (start, token.start()), start
        elif written[0] != "\\":
            open_braces.append(-1)
        elif written[-1] == "{" and len(written) > 2:
            open_braces.append(token.end())
    return None if found is None else text[found[0] : found[1]].strip()


def may_take_long(text: str) -> bool:
    """Whether the answer is of the kind that Math-Verify can compute on for ever: a factorial, powers, many brackets.

    Says nothing about the verdict; such a check is begun early.
    """
    answer = extract_answer(text[-MAX_ANSWER:]) or ""
    return "!" in answer or answer.count("^") > 1 or answer.count("(") > _MANY_BRACKETS


@lru_cache(maxsize=4096)
def _compare(answer: str, ground_truth: tuple[str, ...]) -> str:
    parsed = _parse(answer)
    if not parsed:
        return "unparsable"
    return "correct" if any(_equal(gold, answer, list(parsed)) for gold in ground_truth) else "wrong"


def _equal(gold: str, answer: str, parsed: list[Any]) -> bool:
    in_base, gold_in_base = _IN_BASE.fullmatch(answer), _IN_BASE.fullmatch(gold.strip())
    if in_base and gold_in_base:
        return in_base.groups() == gold_in_base.groups()
    if in_base:
        return _value_in_base(in_base) == gold.strip()  # Math-Verify takes 10_2 for ten
    from math_verify import verify

    golds, rounding = list(_parse_gold(gold)), decimals(gold, answer, _number(gold) if "." in answer else None)
    compare = partial(verify, golds, parsed, float_rounding=rounding, timeout_seconds=None)
    try:
        equal = bool(compare(raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # sympy raises nearly anything on strange input; another pair of readings may still agree
        equal = bool(compare())
    return equal and not contradicts(gold, answer)


def _value_in_base(number: re.Match[str]) -> str:
    try:
        digits, base = number.group(1), int(number.group(2))
        return str(int(digits, base)) if 2 <= base <= 36 else ""
    except ValueError:
        return ""


def _parse(answer: str) -> list[Any]:
    from math_verify import parse

    try:
        answer = _REPEATING.sub(_fraction, _DIGIT_SPACE.sub("", _LOOKS.sub("", answer).rstrip(".;")))
        return parse(f"\\boxed{{{answer}}}", parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]
    except MemoryError:
        raise
    except Exception:
        return []


def _fraction(number: re.Match[str]) -> str:
    """0.1\\overline{6} = (16 - 1) / 90; Math-Verify does not read the bar."""
    whole, fixed, repeating = number.groups()
    digits, fewer = int(whole + fixed + repeating), int(whole + fixed)
    return rf"\frac{{{digits - fewer}}}{{{(10 ** len(repeating) - 1) * 10 ** len(fixed)}}}"


@lru_cache(maxsize=65536)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    return tuple(_parse(gold))


@lru_cache(maxsize=65536)
def _number(gold: str) -> float | None:
    """The gold answer's value where it is one number."""
    parsed = _parse_gold(gold)
    try:
        return float(parsed[0]) if parsed else None
    except MemoryError:
        raise
    except Exception:  # a set, a relation, text
        return None


def warm_up() -> None:
    """Loads and fills what Math-Verify builds lazily (modules, the LaTeX parser's tables), so that forks share it."""
    for gold, answer in (pair.split(" | ") for pair in _WARM_UP.strip().splitlines()):
        _compare(answer, (gold,))


_WARM_UP = r"""
7 | 5+1
-12 | 3.5
025 | 1,024
\frac{1}{2} | 0.3
\dfrac12 | \frac{3}{\sqrt{2}}
6\frac{1}{2} | \sqrt[3]{7}+2\sqrt{5}
\frac{5\pi}{6} | 3\pi+\frac{\pi}{4}
50\% | 12\%
336^\circ | 30^{\circ}
\$25.50 | 18\text{ cm}^2
x=3 | y=4
x^2+2x+1 | (x-1)^2
y=2x+1 | 2x-y=5
(1,2) | (3, -\frac12)
[1,2) | (-\infty,3]\cup(4,\infty)
1<x<2 | x \ge 5
\{1,2,3\} | 1, 2, 5
x=1,x=2 | 1 \text{ and } 4
\pm 3 | 4 \pm \sqrt{2}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&2\\3&5\end{pmatrix}
2^{10} | 10^{-3}
1.5\times 10^3 | 2 \cdot 3^5
5! | \binom{6}{2}
\log_2 8 | \ln 5
\sin\frac{\pi}{7} | \cos 40^\circ
1+2i | 3-4i
e^{2} | e^{i\pi}
\infty | -\infty
\emptyset | \mathbb{R}
\text{Monday} | \text{(B)}
3:4 | 12:30
|x-1| | \lfloor 2.5 \rfloor
a_1+a_2 | \alpha+\beta
10_2 | 11_3
\left( \frac{\sqrt{3}}{2}, 1 \right) | \left[ 2, 3 \right)
n^2-n | \frac{n(n+1)}{2}
"""
