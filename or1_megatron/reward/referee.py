"""The process that holds the tests of a problem and asks the solution's process, which does not. Also sandboxed: tests
come out of data sets. Its verdict is one JSON line on a descriptor that only it has.

    {"kind": "assert", "prelude", "entry_point", "tests": [code, ...], "checker"}   HumanEval, MBPP, LeetCode
    {"kind": "call", "function", "calls": [[args, expected], ...], "checker"}       APPS, TACO, LiveCodeBench
    {"kind": "check", "checker", "input", "output", "expected"}                    one run of a stdin program

A checker is a program that defines check(input, output, expected) -> bool, for problems with several valid outputs;
`input` is the list of arguments where a function is called, and `expected` what an assertion compares the result with.
It passes only by returning True itself.
"""

from __future__ import annotations

import ast
import builtins
import copy
import itertools
import json
import os
from collections import deque
from collections.abc import Iterator
from typing import Any

from or1_megatron.reward.session import MAX_ITEMS, TEST_MODULES, Channel, Deadline, Ended, Namespace, Remote, Session

TOLERANCE = 1e-6


def run_referee(payload: dict[str, Any], inbox: int, outbox: int, verdict_to: int) -> None:
    """Never returns."""
    may_stop = "StopIteration" in json.dumps(payload)  # which holds the tests, not the solution
    session = Session(Channel(inbox, outbox), payload["timeout_s"], may_stop=may_stop)
    try:
        judge = {"assert": _assertions, "call": _calls, "check": _check}[payload["kind"]]
        verdict, detail = judge(payload, session)
    except Deadline:
        verdict, detail = "timeout", f"call {session.num_calls} took longer than {payload['timeout_s']} s"
    except Ended:
        verdict, detail = "ended", f"the solution's process ended during call {session.num_calls}"
    except BrokenTests as error:
        verdict, detail = "broken_tests", str(error)
    except BaseException as error:  # AssertionError, whatever the solution raised, a malformed answer
        at_fault = isinstance(error, ImportError) and _is_of_the_tests(error)
        verdict, detail = "broken_tests" if at_fault else "wrong", f"{type(error).__name__}: {str(error)[:300]}"
    os.write(verdict_to, json.dumps([verdict, detail]).encode())
    os._exit(0)


class BrokenTests(Exception):
    """The problem is at fault: tests that do not compile, fail before the solution is asked or never ask it."""


def _is_of_the_tests(error: BaseException) -> bool:
    """Whether a line of theirs raised it; the solution's errors come out of its session."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    return place is not None and place.tb_frame.f_code.co_filename in ("prelude.py", "tests.py", "checker.py")


def _assertions(payload: dict[str, Any], session: Session) -> tuple[str, str]:
    try:
        prelude = {"__name__": "tests", "__builtins__": builtins}
        exec(compile(payload["prelude"], "prelude.py", "exec"), prelude)
        programs = [compile(test, "tests.py", "exec") for test in payload["tests"]]
        overridden = frozenset() if payload["entry_point"] else _overridden("\n".join(payload["tests"]), set(prelude))
    except Exception as error:
        raise BrokenTests(f"{type(error).__name__}: {error}") from None
    checker = _checker(payload.get("checker"))
    if overridden:
        overridden = session.ask("defined", sorted(overridden))
        if not overridden:
            return "wrong", "nothing that the tests call is defined"
    namespace = Namespace(session, frozenset(overridden))
    namespace.update(prelude)
    session.classes = {name: item for name, item in prelude.items() if isinstance(item, type)}
    # Functions of the prelude run here; the entry point runs over there, whatever its stub in the prelude says.
    entry_point = payload["entry_point"]
    candidate = None
    if entry_point:
        root = entry_point.partition("(")[0].partition(".")[0]
        namespace.pop(root, None)
        candidate = session.ask("evaluate", entry_point)
        if not isinstance(candidate, Remote):
            return "wrong", f"{entry_point} is not a function"
        if checker:
            candidate = Checked(candidate, checker)
        if root == entry_point:
            namespace[root] = candidate
    for number, program in enumerate(programs):
        try:
            exec(program, namespace)
        except AssertionError as error:
            return "wrong", f"test {number}: AssertionError {str(error)[:200]}"
    # Looked up as a plain key: `check` must be the tests' own, never a name that the solution happens to define.
    if entry_point and dict.__contains__(namespace, "check"):
        dict.__getitem__(namespace, "check")(candidate)
    if not session.num_calls:
        raise BrokenTests("they never call the solution")
    return "correct", ""


class Checked:
    """The function under test where a checker judges: its result equals what the checker accepts, and nothing else."""

    def __init__(self, function: Remote, check: Any):
        self._function, self._check = function, check

    def __call__(self, *args: Any, **kwargs: Any) -> Judged:
        arguments = copy.deepcopy([*args, *kwargs.values()])  # as they were: a call may change them
        return Judged(arguments, _values(self._function(*args, **kwargs)), self._check)


class Judged:
    """A result that assertions compare by the checker; any other use of it is a fault of the tests."""

    def __init__(self, arguments: list[Any], result: Any, check: Any):
        self._arguments, self._result, self._check = arguments, result, check

    def __eq__(self, expected: object) -> bool:
        if isinstance(expected, Judged):
            raise BrokenTests("with a checker they have to compare results with values")
        return self._check(self._arguments, self._result, _plain(expected)) is True

    def _misused(self, *args: Any) -> Any:
        raise BrokenTests("with a checker they have to compare results by ==")

    __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __lt__ = __le__ = __gt__ = __ge__ = _misused
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __abs__ = __round__ = __float__ = __int__ = _misused
    __hash__ = None  # type: ignore[assignment]


def _overridden(tests: str, given: set[str]) -> frozenset[str]:
    """The builtins that tests call when they use nothing else that the solution could define: one of them must be the
    function under test. given: names of their prelude."""
    nodes = list(ast.walk(ast.parse(tests)))
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    called = {call.id if isinstance(call, ast.Name) else "." for call in calls}
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    unknown = {name for name in called | read - TEST_MODULES - given - _bound(nodes) if not hasattr(builtins, name)}
    return frozenset() if unknown else frozenset(called)


def _bound(nodes: list[ast.AST]) -> set[str]:
    """Names that tests give a value themselves."""
    names = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    return names | {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}


def _calls(payload: dict[str, Any], session: Session) -> tuple[str, str]:
    function, checker = payload["function"], _checker(payload.get("checker"))
    for number, (arguments, expected) in enumerate(payload["calls"]):
        target = session.ask("function", function)
        if not isinstance(target, Remote):
            return "wrong", f"{function} is not a function"
        result = target(*_integer_keys(arguments))
        result = _values(result) if checker else _plain(result)
        if checker:
            right = checker(arguments, result, expected) is True
        else:
            right = same(result, expected) or (
                isinstance(expected, list) and len(expected) == 1 and same(result, expected[0])
            )
        if not right:
            return "wrong", f"call {number}: got {str(result)[:100]}, expected {str(expected)[:100]}"
    return "correct", ""


def _check(payload: dict[str, Any], session: Session) -> tuple[str, str]:
    checker = _checker(payload["checker"])
    assert checker is not None
    right = checker(payload["input"], payload["output"], payload["expected"]) is True
    return ("correct", "") if right else ("wrong", "refused by the checker")


def _checker(source: str | None) -> Any:
    if not source:
        return None
    namespace: dict[str, Any] = {"__name__": "checker"}
    try:
        exec(compile(source, "checker.py", "exec"), namespace)
        return namespace["check"]
    except Exception as error:
        raise BrokenTests(f"the checker fails: {type(error).__name__}: {error}") from None


def _plain(value: Any, count: Iterator[int] | None = None) -> Any:
    """The value as JSON would carry it: tuples are lists, keys are text; what JSON cannot carry stays itself.

    Raises AssertionError beyond MAX_ITEMS: sixty lists that each hold the one before twice would have no end.
    """
    count = count or itertools.count()
    if next(count) > MAX_ITEMS:
        raise AssertionError(f"a value of more than {MAX_ITEMS} members")
    if isinstance(value, list | tuple):
        return [_plain(item, count) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, count) for key, item in value.items()}
    return value


def _values(result: Any) -> Any:
    """`_plain` of what a checker may see: an object that lives where the tested code is could answer as it likes."""
    result = _plain(result)
    asked, seen = [result], set()
    while asked:
        value = asked.pop()
        if isinstance(value, Remote):
            raise AssertionError("the result holds an object that is no plain value")
        if id(value) not in seen:
            seen.add(id(value))
            asked += _members(value)
    return result


def _members(value: Any) -> list[Any]:
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    return [*value, *value.values()] if isinstance(value, dict) else list(getattr(value, "__dict__", {}).values())


def _integer_keys(value: Any) -> Any:
    """Arguments as the problem meant them: a JSON object whose keys are all numbers has integer keys (APPS)."""
    if isinstance(value, list):
        return [_integer_keys(item) for item in value]
    if isinstance(value, dict):
        numeric = all(key.lstrip("-").isdigit() for key in value)
        return {int(key) if numeric else key: _integer_keys(item) for key, item in value.items()}
    return value


def same(result: Any, expected: Any) -> bool:
    """Equal values of equal type; where a float is expected it may differ by TOLERANCE, relative or absolute."""
    if isinstance(expected, bool) or isinstance(result, bool):
        return result is expected or (isinstance(result, int) and isinstance(expected, int) and result == expected)
    if isinstance(expected, float) or isinstance(result, float):
        if not isinstance(result, int | float) or not isinstance(expected, int | float):
            return False
        near = isinstance(expected, float) and abs(result - expected) <= TOLERANCE * max(1.0, abs(expected))
        return near or result == expected
    if isinstance(expected, list):
        return (
            isinstance(result, list)
            and len(result) == len(expected)
            and all(same(a, b) for a, b in zip(result, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(result, dict)
            and result.keys() == expected.keys()
            and all(same(result[key], expected[key]) for key in expected)
        )
    return type(result) is type(expected) and result == expected
