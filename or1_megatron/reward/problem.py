"""What a response is scored against. The form of the ground truth says which verifier it wants.

A gold answer, or several: math. A JSON object (or list) of one of these forms: code.

    {"inputs": [...], "outputs": [...], "fn_name"?: name}          APPS, TACO, PRIME, Skywork-OR1
    [{"input", "output", "testtype" | "type", "fn_name"? }, ...]   LiveCodeBench, DeepCoder
    {"test" | "test_code", "entry_point", "prompt" | "import_prefix"?}   HumanEval, LeetCode, Skywork-OR1
    {"test_list" | "assert_case": [assertion, ...], "test_setup_code"?}  MBPP, Skywork-OR1

The first and the third may hold "checker", a program that defines check(input, output, expected) -> bool.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from or1_megatron.errors import UserError

_CODE_SOURCES = re.compile(
    r"(^|[^a-z])(code|apps|taco|leetcode|livecodebench|lcb|humaneval|mbpp|codecontests|codeforces)", re.IGNORECASE
)

BROKEN_TESTS = "the tests of this problem are at fault"  # how the detail of such a verdict begins


@dataclass(frozen=True)
class Task:
    """One response to be scored."""

    response: str
    ground_truth: tuple[str, ...]
    data_source: str = ""
    truncated: bool = False  # cut at the length limit
    reasoning_open: bool = False  # the prompt ends inside <think>

    def question(self) -> dict[str, Any]:
        """All but the response, in JSON's values."""
        return {name: value for name, value in vars(self).items() if name != "response"}


@dataclass(frozen=True)
class CodeTests:
    """The tests of one problem. Exactly one of `runs`, `calls`, `assertions` is filled."""

    runs: tuple[tuple[str, str], ...] = ()  # stdin, expected stdout
    calls: tuple[tuple[Any, Any], ...] = ()  # arguments, expected result
    assertions: tuple[str, ...] = ()  # programs
    function: str = ""  # of calls
    entry_point: str = ""  # of assertions: an expression, Solution().twoSum say, given to their check()
    prelude: str = ""  # code that tests and solution both start with
    checker: str = ""

    @property
    def count(self) -> int:
        return len(self.runs) + len(self.calls) + len(self.assertions)


@lru_cache(maxsize=256)
def code_tests(ground_truth: tuple[str, ...], data_source: str) -> CodeTests | None:
    """The tests, or None for a math answer. Raises UserError when a code problem's tests cannot be used; its cause is
    what went wrong in reading them, if something did."""
    row = None
    if len(ground_truth) == 1 and ground_truth[0].lstrip()[:1] in ("{", "["):
        try:
            row = json.loads(ground_truth[0])
        except (ValueError, RecursionError):
            row = None
    try:
        tests = _read(row)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, RecursionError) as error:  # arguments that are no JSON, say
        raise UserError(
            f"reward_model.ground_truth={ground_truth[0][:60]!r}: its tests cannot be read ({error}); drop the problem"
        ) from error
    if tests is None:
        if _CODE_SOURCES.search(data_source):
            raise UserError(
                f"data_source={data_source!r} is code, but reward_model.ground_truth={ground_truth[0][:60]!r} holds no "
                "tests in a known form; see docs/verifiers.md"
            )
        return None
    if not tests.count:
        raise UserError(f"reward_model.ground_truth={ground_truth[0][:60]!r} holds no test; drop the problem")
    return tests


def _read(row: Any) -> CodeTests | None:
    if (
        isinstance(row, list)
        and row
        and all(isinstance(item, dict) and {"input", "output"} <= item.keys() for item in row)
    ):
        return _cases(row)
    if not isinstance(row, dict):
        return None
    checker = str(row.get("checker") or "")
    if {"inputs", "outputs"} <= row.keys():
        if len(row["inputs"]) != len(row["outputs"]):
            raise UserError(f"{len(row['inputs'])} inputs but {len(row['outputs'])} outputs; drop the problem")
        pairs = list(zip(row["inputs"], row["outputs"], strict=True))
        if row.get("fn_name"):
            calls = tuple((_arguments(given), _expected(given, wanted)) for given, wanted in pairs)
            return CodeTests(calls=calls, function=_name(row["fn_name"]), checker=checker)
        return CodeTests(runs=tuple((_text(given), _text(wanted)) for given, wanted in pairs), checker=checker)
    test = row.get("test") or row.get("test_code")
    if test and row.get("entry_point"):
        prelude = str(row.get("import_prefix") or row.get("prompt") or "")
        entry_point = _name(row["entry_point"])
        return CodeTests(assertions=(str(test),), entry_point=entry_point, prelude=prelude, checker=checker)
    listed = row.get("test_list") or row.get("assert_case")
    if isinstance(listed, list):
        if checker:
            raise UserError(
                "a checker beside test_list has nothing to check: use test and entry_point; drop the problem"
            )
        setup = [row["test_setup_code"]] if row.get("test_setup_code") and listed else []
        return CodeTests(assertions=tuple(map(str, [*setup, *listed])))
    return None


def _cases(rows: list[dict[str, Any]]) -> CodeTests:
    kinds = {str(row.get("testtype") or row.get("type") or "stdin") for row in rows}
    if kinds <= {"stdin", "stdin_stdout"}:
        return CodeTests(runs=tuple((_text(row["input"]), _text(row["output"])) for row in rows))
    metadata = rows[0].get("metadata") or {}
    function = rows[0].get("fn_name") or metadata.get("func_name") or metadata.get("fn_name")
    if not function:
        raise UserError(f"tests of kind {', '.join(sorted(kinds))} name no function; add fn_name to each")
    calls = tuple((_arguments(row["input"]), _expected(row["input"], row["output"])) for row in rows)
    return CodeTests(calls=calls, function=_name(function))


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a name is needed, not {value!r:.40}")
    return value


def _text(value: Any) -> str:
    """APPS has inputs as a list of lines in places."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(given: Any) -> list[Any]:
    """A list of arguments, or one JSON value a line (LiveCodeBench)."""
    return [json.loads(line) for line in given.splitlines() if line.strip()] if isinstance(given, str) else list(given)


def _expected(given: Any, wanted: Any) -> Any:
    return json.loads(wanted) if isinstance(given, str) and isinstance(wanted, str) else wanted
