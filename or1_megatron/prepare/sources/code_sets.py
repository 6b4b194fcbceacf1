"""Adapters of the code sets. Their answer is JSON in a form that reward/problem.py knows; the solution is Python."""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

from or1_megatron.data.benchmarks import checked_function
from or1_megatron.prepare.sources.schemas import Form, Problem, Schema, known, solution_of, text_of
from or1_megatron.prepare.step import Unusable

_MOST_TRIED = 20  # solutions of a problem that are parsed in search of one in Python 3


def _apps(row: dict[str, Any]) -> Problem:
    """APPS and TACO; `solutions` and `input_output` are JSON, or are given as what it means."""
    tests = _tests(_decoded(row["input_output"], "input_output"))
    question = text_of(row, "question")
    starter, function = solution_of(row, "starter_code"), tests.get("fn_name")
    if starter:
        question += f"\n\nStarter code:\n\n```python\n{starter}\n```"
    elif function and function not in question:
        question += f"\n\nThe function is called `{function}`."
    listed = row.get("solutions")
    solutions = _decoded(listed, "solutions") if listed not in (None, "") else []
    info = known(row, "difficulty", "name", "source", "url", "tags", "skill_types", "time_limit", "memory_limit")
    if isinstance(solutions, list):
        info["num_solutions"] = len(solutions)
    return Problem(
        question,
        json.dumps(tests, ensure_ascii=False),
        _in_python(solutions),
        ability="code",
        identity=str(row["problem_id"]) if row.get("problem_id") is not None else "",
        info=info,
    )


def _decoded(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise Unusable("no_tests", f"{name} is empty")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Unusable("tests_unreadable", f"{name}: {error}") from None


def _tests(found: Any) -> dict[str, Any]:
    inputs, outputs = (found.get(name) for name in ("inputs", "outputs")) if isinstance(found, dict) else (None, None)
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise Unusable("no_tests", "input_output has no inputs and outputs")
    if not inputs and not outputs:
        raise Unusable("no_tests", "inputs and outputs are empty")
    if len(inputs) != len(outputs):
        raise Unusable("tests_unreadable", f"{len(inputs)} inputs but {len(outputs)} outputs")
    tests = {"inputs": inputs, "outputs": outputs}
    return {**tests, "fn_name": str(found["fn_name"])} if found.get("fn_name") else tests


def _in_python(solutions: Any) -> str:
    """The first that parses: the older sets hold Python 2, and TACO some other languages."""
    candidates = solutions if isinstance(solutions, list) else [solutions]
    for code in candidates[:_MOST_TRIED]:
        if isinstance(code, str) and code.strip() and _parses(code):
            return code
    return ""


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _leetcode(row: dict[str, Any]) -> Problem:
    """Version 0.2 asks in `query`; since 0.3 the question and its starter code have fields of their own."""
    _need_tests(row, "test", "entry_point")
    if row.get("problem_description"):
        starter = solution_of(row, "starter_code")
        asked = text_of(row, "problem_description")
        question = f"{asked}\n\nStarter code:\n\n```python\n{starter}\n```" if starter else asked
    else:
        question = text_of(row, "query")
    meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
    info = known({**meta, **row}, "question_id", "difficulty", "tags", "estimated_date")
    return Problem(
        question,
        json.dumps(checked_function({"prompt": "", **row}), ensure_ascii=False),
        solution_of(row, "completion"),
        ability="code",
        identity=str(row.get("task_id") or ""),
        info=info,
    )


def _humaneval(row: dict[str, Any]) -> Problem:
    _need_tests(row, "test", "entry_point")
    start, rest = text_of(row, "prompt"), row.get("canonical_solution")
    return Problem(
        f"Complete this Python function.\n\n```python\n{start}\n```",
        json.dumps(checked_function(row), ensure_ascii=False),
        row["prompt"] + rest if isinstance(rest, str) and rest else "",
        ability="code",
        identity=str(row.get("task_id") or ""),
    )


def _mbpp(row: dict[str, Any]) -> Problem:
    """The question shows the first tests, which name the function; the challenge tests count but are not shown."""
    shown, hidden = row["test_list"], row.get("challenge_test_list") or []
    if not isinstance(shown, list) or not shown:
        raise Unusable("no_tests", f"test_list is {shown!r:.60}")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    question = text_of(row, "text" if "text" in row else "prompt")
    examples = "\n".join(map(str, shown))
    return Problem(
        f"{question}\n\nThe code should pass these tests:\n\n```python\n{examples}\n```",
        json.dumps({"test_list": [*shown, *hidden], "test_setup_code": setup}, ensure_ascii=False),
        str(row.get("code") or "").replace("\r\n", "\n"),
        ability="code",
        identity=str(row.get("task_id") if row.get("task_id") is not None else ""),
    )


def _need_tests(row: dict[str, Any], *names: str) -> None:
    for name in names:
        if not isinstance(row[name], str) or not row[name].strip():
            raise Unusable("no_tests", f"{name} is {row[name]!r:.60}")


_APPS_FIELDS = ("solutions", "starter_code", "difficulty", "url", "problem_id")
_TACO_FIELDS = (
    *("solutions", "starter_code", "difficulty", "name", "source", "url", "tags", "skill_types", "time_limit"),
    "memory_limit",
)

CODE_SCHEMAS = (
    Schema(
        "leetcode",
        "LeetCodeDataset",
        (
            Form(
                ("test", "entry_point", "query"),
                (
                    *("prompt", "completion", "task_id", "meta", "problem_description", "starter_code"),
                    *("question_id", "difficulty", "tags", "estimated_date"),
                ),
                _leetcode,
            ),
        ),
        "MIT (repository), Apache-2.0 (hub)",
        hub="newfacade/LeetCodeDataset:LeetCodeDataset-train.jsonl",
        subset="difficulty",
        home="newfacade/LeetCodeDataset",
        version=2,  # 2: checkers where the result may come in any order
    ),
    Schema(
        "taco",
        "TACO",
        (Form(("question", "input_output"), _TACO_FIELDS, _apps),),
        "Apache-2.0; parts MIT or CC-BY-4.0",
        hub="BAAI/TACO:ALL/train-*.parquet",
        subset="difficulty",
    ),
    Schema(
        "apps",
        "APPS",
        (Form(("question", "input_output"), _APPS_FIELDS, _apps),),
        "MIT",
        hub="codeparrot/apps:train.jsonl",
        subset="difficulty",
        version=2,  # 2: both splits of the archive
    ),
    Schema(
        "mbpp",
        "MBPP",
        (
            Form(("text", "test_list"), ("code", "task_id", "test_setup_code", "challenge_test_list"), _mbpp),
            Form(("prompt", "test_list"), ("code", "task_id", "test_imports"), _mbpp),
        ),
        "CC-BY-4.0",
        hub="google-research-datasets/mbpp:full/train-*.parquet",
        home="google-research/mbpp",
    ),
    Schema(
        "humaneval",
        "HumanEval",
        (Form(("prompt", "test", "entry_point"), ("canonical_solution", "task_id"), _humaneval),),
        "MIT",
        hub="openai/openai_humaneval:openai_humaneval/test-*.parquet",
        home="openai/human-eval",
    ),
)
