"""The schemas in which others publish their problems: a table of small adapters, one for each form of a row.

An adapter takes one row of a file and returns a `Problem`, or raises `Unusable` for a row that is no problem. It reads
the fields that its form names and copies; it judges nothing: that is the other steps' part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from or1_megatron.data.benchmarks import INSTRUCTION
from or1_megatron.prepare.step import Unusable


@dataclass(frozen=True)
class Problem:
    """What a row says, before it has a number and a licence."""

    text: str
    answer: str  # the gold answer, or tests as JSON
    solution: str = ""
    ability: str = "math"
    source: str = ""  # of rows that bring their own data_source
    identity: str = ""  # the source's own, where it has one that is meant to be unique
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """One shape of a row. `needs`: fields without which it is another; `may_have`: read where they are there."""

    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    read: Callable[[dict[str, Any]], Problem]

    def fits(self, row: dict[str, Any]) -> bool:
        return all(name in row for name in self.needs)


@dataclass(frozen=True)
class Schema:
    """One published set. Of `forms` the first that fits a row reads it."""

    name: str
    title: str
    forms: tuple[Form, ...]
    licence: str
    hub: str = ""  # OWNER/NAME:PATTERN, read when no file is named
    home: str = ""  # where it comes from when that is not the hub
    subset: str = ""  # the field that says which part of the set a row belongs to; may lie inside of `meta`
    named_by_subset: bool = False  # the rows' source is NAME-SUBSET
    version: int = 1  # of its step: see SourceStep

    def read(self, row: dict[str, Any]) -> Problem | None:
        """None when no form fits. Raises Unusable."""
        return next((form.read(row) for form in self.forms if form.fits(row)), None)

    def subset_of(self, row: dict[str, Any]) -> str:
        """In the source's own words; empty where it says none."""
        value = row.get(self.subset)
        if value is None and isinstance(row.get("meta"), dict):
            value = row["meta"].get(self.subset)
        return "" if value is None else str(value)

    @property
    def expected(self) -> str:
        return ", or ".join(", ".join(form.needs) for form in self.forms)


def text_of(row: dict[str, Any], name: str) -> str:
    """Raises Unusable where a problem's text is missing."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise Unusable("no_problem_text", f"{name} is {value!r:.60}")
    return value.strip()


def answer_of(row: dict[str, Any], name: str, without: frozenset[str] = frozenset()) -> str:
    """`without`: words, in lower case, that say that there is no answer. Raises Unusable where there is none."""
    value = row.get(name)
    answer = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if not answer or answer.lower() in without:
        raise Unusable("no_answer", f"{name} is {value!r:.60}")
    return answer


def solution_of(row: dict[str, Any], name: str = "solution") -> str:
    value = row.get(name)
    return value.strip() if isinstance(value, str) else ""


def known(row: dict[str, Any], *names: str) -> dict[str, Any]:
    """The fields of these names that say something."""
    return {name: row[name] for name in names if row.get(name) not in (None, "", [], {})}


# How to answer is added where the training file is written, so that it is the same for all sources.
_HOW_TO_ANSWER = (
    INSTRUCTION.strip(),
    "Let's think step by step and output the final answer within \\boxed{}.",
)


def without_instruction(text: str) -> str:
    text = text.strip()
    for ending in _HOW_TO_ANSWER:
        text = text.removesuffix(ending).rstrip()
    return text
