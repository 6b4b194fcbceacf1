"""The tests of a code problem, looked at without running them: which are sound, and what they ask for.

The forms are those of or1_megatron/reward/problem.py. Where a problem's tests are one function, `check(candidate)`,
its assertions count one by one, but none is taken out.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from or1_megatron.errors import UserError
from or1_megatron.prepare.cleaning.text import digest
from or1_megatron.prepare.step import Unusable
from or1_megatron.reward.problem import code_tests


@dataclass(frozen=True)
class SoundTests:
    """The sound tests, in the form they came in; what is wrong with each of the others."""

    answer: str
    count: int
    bad: tuple[str, ...]


def sound_tests(answer: str) -> SoundTests:
    """Raises Unusable: no JSON of a known form, inputs and outputs that do not pair, no test at all, tests that
    contradict one another."""
    row = _json(answer)
    try:
        tests = code_tests((answer,), "")
    except UserError as error:
        if error.__cause__:
            reason = f"{type(error.__cause__).__name__}: {str(error.__cause__)[:160]}"
            raise Unusable("tests_corrupt", reason) from None
        raise Unusable("tests_unusable", str(error)[:200]) from None
    if tests is None:
        raise Unusable("tests_unknown_form", answer[:60])
    if isinstance(row, dict) and "inputs" in row:
        return _paired(row, list(zip(row["inputs"], row["outputs"], strict=True)))
    if isinstance(row, list):
        return _cases(row)
    key = next((key for key in ("test_list", "assert_case") if isinstance(row.get(key), list)), None)
    return _assertions(row, key) if key else _function(answer, tests.assertions[0])


def _json(answer: str) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise Unusable("tests_corrupt", f"no JSON: {str(error)[:120]}") from None


def _paired(row: dict[str, Any], pairs: list[tuple[Any, Any]]) -> SoundTests:
    faults = [_fault(given, wanted, bool(row.get("fn_name"))) for given, wanted in pairs]
    sound = [pair for pair, fault in zip(pairs, faults, strict=True) if not fault]
    if not row.get("checker"):
        _refuse_contradiction(sound)
    bad = tuple(f"test {place}: {fault}" for place, fault in enumerate(faults) if fault)
    kept = {**row, "inputs": [given for given, _ in sound], "outputs": [wanted for _, wanted in sound]}
    return SoundTests(json.dumps(kept), len(sound), bad)


def _cases(rows: list[dict[str, Any]]) -> SoundTests:
    faults = [_fault(row["input"], row["output"], False) for row in rows]
    sound = [row for row, fault in zip(rows, faults, strict=True) if not fault]
    _refuse_contradiction([(row["input"], row["output"]) for row in sound])
    bad = tuple(f"test {place}: {fault}" for place, fault in enumerate(faults) if fault)
    return SoundTests(json.dumps(sound), len(sound), bad)


def _fault(given: Any, wanted: Any, is_call: bool) -> str:
    """What is wrong with one test; a program may well read nothing, but what writes nothing cannot be judged."""
    if given is None:
        return "no input"
    if is_call:
        return "" if isinstance(given, list | str) else f"input {str(given)[:40]!r} is no list of arguments"
    if wanted is None or (isinstance(wanted, str | list) and not "".join(map(str, wanted)).strip()):
        return "no output"
    for text in (given, wanted):
        if isinstance(text, str) and ("\x00" in text or "\ufffd" in text):
            return "NUL or undecodable text"
        if isinstance(text, str) and text.rstrip().endswith("...") and len(text) > 200:
            return "cut off"
    return ""


def _refuse_contradiction(pairs: list[tuple[Any, Any]]) -> None:
    seen: dict[bytes, Any] = {}
    for given, wanted in pairs:
        if seen.setdefault(_hashed(given), wanted) != wanted:
            raise Unusable("tests_contradict", f"input {str(given)[:60]!r} has two outputs")


def _assertions(row: dict[str, Any], key: str) -> SoundTests:
    faults = [_assertion_fault(test) for test in row[key]]
    sound = [test for test, fault in zip(row[key], faults, strict=True) if not fault]
    bad = tuple(f"test {place}: {fault}" for place, fault in enumerate(faults) if fault)
    return SoundTests(json.dumps({**row, key: sound}), len(sound), bad)


def _assertion_fault(test: Any) -> str:
    tree = _parsed(test) if isinstance(test, str) else None
    if tree is None:
        return "no Python"
    return "" if any(_checks(node) for node in ast.walk(tree)) else "no assertion about a call"


def _function(answer: str, source: str) -> SoundTests:
    tree = _parsed(source)
    if tree is None:
        raise Unusable("tests_corrupt", "the tests are no Python")
    count = sum(_checks(node) for node in ast.walk(tree))
    if not count:
        raise Unusable("no_tests", "no assertion about a call")
    pairs = [(given, wanted) for given, wanted in _calls(tree) if wanted is not None]
    _refuse_contradiction(pairs)
    return SoundTests(answer, count, ())


def _checks(node: ast.AST) -> bool:
    return isinstance(node, ast.Assert) and any(isinstance(part, ast.Call | ast.Name) for part in ast.walk(node.test))


def _parsed(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def behaviour(answer: str) -> np.ndarray:
    """[T, 2] uint64: hashes of input and expected output of each test, distinct and sorted by input; of `check` and
    assertion lists, of each `assert f(...) == value` with plain arguments. Empty where nothing can be read."""
    found = {_hashed(given)[:8]: _hashed(wanted)[:8] for given, wanted in _pairs(answer)}
    flat = b"".join(given + wanted for given, wanted in found.items())
    table = np.frombuffer(flat, np.uint64).reshape(-1, 2)
    return table[np.argsort(table[:, 0], kind="stable")]


def _pairs(answer: str) -> Iterator[tuple[Any, Any]]:
    try:
        tests = code_tests((answer,), "")
    except (UserError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    if tests is None:
        return
    yield from ((given.split(), wanted.split()) for given, wanted in tests.runs)
    yield from tests.calls
    for source in tests.assertions:
        if tree := _parsed(source):
            yield from _calls(tree)


def _calls(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(arguments, expected) of every `assert f(...) == value`, as source in one writing, argument names left out."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and len(node.test.ops) == 1):
            continue
        call, wanted = node.test.left, node.test.comparators[0]
        if isinstance(node.test.ops[0], ast.Eq) and isinstance(call, ast.Call):
            arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
            yield ", ".join(map(ast.unparse, arguments)), ast.unparse(wanted)


def _hashed(value: Any) -> bytes:
    return digest(value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str))
