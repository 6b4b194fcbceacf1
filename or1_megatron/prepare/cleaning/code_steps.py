"""What makes a code problem fit for a reward (6.1): sound tests, and a solution that passes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from or1_megatron.prepare.cleaning.checked import judged
from or1_megatron.prepare.cleaning.test_cases import sound_tests
from or1_megatron.prepare.step import (
    Context,
    Drop,
    JudgeRow,
    Row,
    RowStep,
    Step,
    Table,
    TableStep,
    Unusable,
    check_choice,
    check_positive,
    information,
    option,
)
from or1_megatron.reward.preflight import reached_isolation
from or1_megatron.reward.problem import Task
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Verdict

# ---- tests


@dataclass(frozen=True)
class DropBadTests:
    min_tests: int = option(1, "sound tests that a problem must have")
    max_characters: int = option(50_000_000, "of all tests of a problem; larger ones go")
    bad_tests: str = option("problem", "what goes for a broken test among sound ones: the test or the problem")

    def __post_init__(self) -> None:
        check_choice("bad_tests", self.bad_tests, ("test", "problem"))


def _drop_bad_tests(options: DropBadTests) -> JudgeRow:
    def judge(row: Row) -> Row | Drop:
        if row["ability"] != "code":
            return row
        answer = row["answer"] or ""
        if not answer.strip():
            return Drop("no_tests")
        if len(answer) > options.max_characters:
            return Drop("large_tests", f"{len(answer)} characters")
        try:
            sound = sound_tests(answer)
        except Unusable as error:
            return error.drop
        if sound.bad and options.bad_tests == "problem":
            return Drop("bad_test", sound.bad[0])
        if sound.count < options.min_tests:
            return Drop("few_tests", f"{sound.count} sound tests")
        return {**row, "answer": sound.answer} if sound.bad else row

    return judge


# ---- reference solutions


@dataclass(frozen=True)
class ReferenceSolutions:
    without_solution: str = option("drop", "code problems without a reference solution: drop or keep")
    max_solutions: int = option(1, "of `info.solutions`, where a source has several; all of them must pass")
    test_timeout_s: float = option(6.0, "wall time of one test, seconds")
    total_timeout_s: float = option(60.0, "wall time of all tests of a solution, seconds")
    memory_mb: int = option(4096, "address space of a solution, MiB")
    require_isolation: str = option("full", "least isolation under which solutions run, as reward.require_isolation")

    def __post_init__(self) -> None:
        check_choice("without_solution", self.without_solution, ("keep", "drop"))
        check_positive(self, "max_solutions", "test_timeout_s", "total_timeout_s", "memory_mb")


def _reference_solutions(table: Table, options: ReferenceSolutions, context: Context) -> Iterator[Any]:
    def tasks_of(row: Row) -> list[Task] | Drop | None:
        if row["ability"] != "code":
            return None
        solutions = _solutions(row, options.max_solutions)
        if not solutions:
            return Drop("no_solution") if options.without_solution == "drop" else None
        try:
            sound_tests(row["answer"] or "")
        except Unusable as error:
            return error.drop
        tell_isolation()
        return [Task(code if "```" in code else f"```python\n{code}\n```", (row["answer"],)) for code in solutions]

    @cache
    def tell_isolation() -> None:
        context.message(reached_isolation(config))

    def conclude(row: Row, tasks: list[Task], verdicts: list[Verdict]) -> Drop | None:
        for verdict in verdicts:
            if verdict.name != "correct":
                return Drop(f"solution_{verdict.name}", verdict.detail[:200])
        return None

    config = RewardConfig(
        num_workers=context.workers, code_timeout_s=options.test_timeout_s, code_total_s=options.total_timeout_s,
        code_memory_mb=options.memory_mb, require_isolation=options.require_isolation,
    )  # fmt: skip
    yield from judged(table, config, tasks_of, conclude, context)


def _solutions(row: Row, most: int) -> list[str]:
    given = information(row).get("solutions")
    several = [code for code in given if isinstance(code, str)] if isinstance(given, list) else []
    first = [row["solution"]] if (row["solution"] or "").strip() else []
    return list(dict.fromkeys(code for code in [*first, *several] if code.strip()))[: max(1, most)]


STEPS: tuple[Step, ...] = (
    RowStep("drop_bad_tests", DropBadTests, _drop_bad_tests),
    TableStep(
        "reference_solutions", ReferenceSolutions, _reference_solutions, version=3
    ),  # 2: checkers of functions, 3: f = tuple
)
