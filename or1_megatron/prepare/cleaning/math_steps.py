"""What makes a math problem fit for a reward (6.1): an answer that its own solution reaches, a question that asks for
one, nothing missing from the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from or1_megatron.prepare.cleaning.answer_type import ANSWER_TYPES, answer_type
from or1_megatron.prepare.cleaning.checked import judged
from or1_megatron.prepare.cleaning.figures import missing
from or1_megatron.prepare.cleaning.text import flaw
from or1_megatron.prepare.step import (
    Context,
    Drop,
    JudgeRow,
    Row,
    RowStep,
    Step,
    Table,
    TableStep,
    check_choice,
    check_positive,
    information,
    option,
    with_information,
)
from or1_megatron.reward.math import extract_answer
from or1_megatron.reward.problem import Task
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Verdict

# ---- broken text


@dataclass(frozen=True)
class DropBroken:
    max_characters: int = option(20_000, "of a problem; longer ones go")
    max_answer_characters: int = option(1_000, "of a math answer; longer ones go")
    require_answer: bool = option(True, "drop rows without an answer")


def _drop_broken(options: DropBroken) -> JudgeRow:
    def judge(row: Row) -> Row | Drop:
        problem, answer = row["problem"] or "", row["answer"] or ""
        if not problem.strip():
            return Drop("empty_problem")
        if options.require_answer and not answer.strip():
            return Drop("no_answer")
        if len(problem) > options.max_characters:
            return Drop("long_problem", f"{len(problem)} characters")
        if row["ability"] != "code" and len(answer) > options.max_answer_characters:
            return Drop("long_answer", f"{len(answer)} characters")
        if found := flaw(problem, latex=row["ability"] != "code"):
            return Drop(*found)
        if row["ability"] != "code" and (found := flaw(answer, latex=True)):
            return Drop(found[0], f"answer: {found[1]}")
        return row

    return judge


# ---- links, figures, proofs


@dataclass(frozen=True)
class DropLinksAndFigures:
    asymptote: str = option("drop", "problems with a drawing as Asymptote code: drop or keep")

    def __post_init__(self) -> None:
        check_choice("asymptote", self.asymptote, ("drop", "keep"))


def _drop_links_and_figures(options: DropLinksAndFigures) -> JudgeRow:
    def judge(row: Row) -> Row | Drop:
        found = missing(row["problem"] or "", options.asymptote == "drop")
        return Drop(*found) if found else row

    return judge


_PROVE = re.compile(
    r"(?:^|[.;:!?\n]|[,.;]\s(?:then|and)|\([a-z0-9]\)|\b(?:then|and|to|please|must|now|also|i+\)))[\s$*\"'“(]{0,20}"
    r"(?:prove|show|demonstrate|verify|justify|establish)(?:\s+(?:that|the following|by|if|there|for|:|"
    r"the (?:inequality|identity|equality|existence|formula))|\s*[:,]\s)",
    re.IGNORECASE,
)
_DISPROVE = re.compile(r"\b(?:disprove|(?:give|write|provide) a proof)\b", re.IGNORECASE)
_ASKS_VALUE = re.compile(
    r"\?|(?<!could )(?<!can )\b(?:find|determine|compute|calculate|evaluate|solve|how many|how much|what is|what are|"
    r"which of|express your answer|give your answer|enter)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DropProofs:
    """No options: what the source says of the question, else its words."""


def _drop_proofs(options: DropProofs) -> JudgeRow:
    def judge(row: Row) -> Row | Drop:
        info = information(row)
        for key in ("question_type", "problem_type"):
            if str(info.get(key, "")).casefold() in ("proof", "proof problem", "proof-type"):
                return Drop("proof", f"{key}={info[key]}")
        if answer_type(row["answer"] or "") == "proof":
            return Drop("proof", f"answer: {row['answer']}")
        problem = row["problem"] or ""
        asked = _DISPROVE.search(problem) or _PROVE.search(problem)
        if asked and not _ASKS_VALUE.search(problem):
            return Drop("proof", problem[max(0, asked.start() - 10) : asked.end() + 30].strip())
        return row

    return judge


# ---- the kind of the answer


@dataclass(frozen=True)
class AnswerTypes:
    drop: tuple[str, ...] = option((), f"kinds of answer to drop, of {', '.join(ANSWER_TYPES)}")
    max_characters: int = option(0, "of an answer, whatever its kind; 0: any number")

    def __post_init__(self) -> None:
        for kind in self.drop:
            check_choice("drop", kind, ANSWER_TYPES)


def _answer_types(options: AnswerTypes) -> JudgeRow:
    def judge(row: Row) -> Row | Drop:
        answer = row["answer"] or ""
        is_code = row["ability"] == "code"
        asked = str(information(row).get("question_type") or "")
        kind = "tests" if is_code and answer else answer_type(answer, row["problem"] or "", asked)
        if kind in options.drop:
            return Drop(f"answer_{kind}", answer[:80])
        if options.max_characters and not is_code and len(answer) > options.max_characters:
            return Drop("long_answer", f"{len(answer)} characters")
        return with_information(row, answer_type=kind)

    return judge


# ---- the answer that the solution reaches


@dataclass(frozen=True)
class Reextract:
    without_solution: str = option("keep", "rows without a reference solution: keep or drop")
    timeout_s: float = option(10.0, "deadline of one comparison, seconds")

    def __post_init__(self) -> None:
        check_choice("without_solution", self.without_solution, ("keep", "drop"))
        check_positive(self, "timeout_s")


def _reextract(table: Table, options: Reextract, context: Context) -> Iterator[Any]:
    def tasks_of(row: Row) -> list[Task] | Drop | None:
        solution, gold = (row["solution"] or "").strip(), (row["answer"] or "").strip()
        if row["ability"] == "code":
            return None
        if not solution:
            return Drop("no_solution") if options.without_solution == "drop" else None
        if not gold:
            return Drop("no_answer")
        answers = final_answers(solution)
        if not answers:
            return Drop("no_answer_in_solution", solution[-80:])
        if gold in answers:
            return None
        return [Task(rf"\boxed{{{answer}}}", (gold,)) for answer in answers]

    def conclude(row: Row, tasks: list[Task], verdicts: list[Verdict]) -> Drop | None:
        names = [verdict.name for verdict in verdicts]
        if "correct" in names:
            return None
        found = f"gold {(row['answer'] or '')[:60]}, solution {extract_answer(tasks[0].response) or ''}"[:160]
        for name, reason in (("wrong", "answer_disagrees"), ("timeout", "comparison_timeout")):
            if name in names:
                return Drop(reason, found)
        return Drop("unreadable_answer", found)

    config = RewardConfig(num_workers=context.workers, timeout_s=options.timeout_s)
    yield from judged(table, config, tasks_of, conclude, context)


_FRAMED = re.compile(r"\\(?:framebox|fbox|framed)(?=\s*\{)")
_HASHES = re.compile(r"####\s*(.+)")
_SAID = re.compile(
    r"(?:(?:final\s+)?answer(?:\s+is)?\s*:|\banswers?(?:\s+\w+){0,3}\s+(?:is|are)(?:\s+therefore|\s+thus)?)\s*",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$\$?([^$]{1,400})\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
_TAIL = 20_000  # characters of a solution that may hold its answer


def final_answers(solution: str) -> list[str]:
    """Answers that the solution may mean, the likeliest first: what it boxes last (and all that it boxes, for a
    question with several answers); else what follows `####`; else what it calls its answer; else its last formula, and
    of an equation the right side, or its last number. Empty when there is none of these."""
    text = _FRAMED.sub(r"\\boxed", solution[-_TAIL:])
    if last := extract_answer(text):
        boxed = _boxed(text)
        together = ", ".join(boxed)
        return _distinct([last, _right_side(last), together] if len(boxed) > 1 else [last, _right_side(last)])
    if marked := _HASHES.findall(text):
        return _distinct([marked[-1].strip()])
    said = list(_SAID.finditer(text))
    rest = text[said[-1].end() :][:400] if said else text.rstrip()[-400:]
    formulas = [next(filter(None, groups)) for groups in _FORMULA.findall(rest)]
    numbers = _NUMBER.findall(rest)
    chosen = [(found[0] if said else found[-1]).strip() for found in (formulas, numbers) if found]
    return _distinct([part for answer in chosen for part in (answer, _right_side(answer))])


def _boxed(text: str) -> list[str]:
    found: list[str] = []
    while (answer := extract_answer(text)) is not None and len(found) < 10:
        found.insert(0, answer)
        text = text[: text.rindex(answer)] if answer else text[: text.rindex("\\boxed")]
        text = text[: max(text.rfind("\\boxed"), text.rfind("\\fbox"))]
    return _distinct(found)


def _right_side(answer: str) -> str:
    return answer.rpartition("=")[2].strip()


_WRAPPED = re.compile(r"\\(?:textbf|mathbf|bf|text|mathrm)\s*\{(.*)\}|\((-?\d+)\)|\$(.*)\$", re.DOTALL)


def _distinct(answers: list[str]) -> list[str]:
    """Without repetitions, and without bold face, dollars and brackets around all of it."""
    plain = []
    for answer in answers:
        plain.append(answer.strip().rstrip(".,;"))
        while inner := _WRAPPED.fullmatch(plain[-1].strip()):
            plain.append(next(part for part in inner.groups() if part is not None).strip())
    return [answer for answer in dict.fromkeys(plain) if answer]


STEPS: tuple[Step, ...] = (
    RowStep("drop_broken", DropBroken, _drop_broken),
    RowStep("drop_links_and_figures", DropLinksAndFigures, _drop_links_and_figures),
    RowStep("drop_proofs", DropProofs, _drop_proofs),
    RowStep("answer_types", AnswerTypes, _answer_types),
    TableStep("reextract", Reextract, _reextract, version=2),  # 2: answers that contradict each other differ
)
