"""Code answers (7.2): last Python block -> syntax -> every test in the sandbox; the first failure ends it.

Each stdin test is one process. All calls and assertions of a solution share one process, as in the sets' own
harnesses, with the tests in another (referee.py). Rules of comparison are LiveCodeBench's: lines are stripped, equal
text or equal numbers; where the expected number is a decimal fraction it may differ by 1e-6, relative or absolute.
"""

from __future__ import annotations

import ast
import json
import os
import re
import select
import signal
import time
import warnings
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from typing import Any

from or1_megatron.reward.problem import BROKEN_TESTS, CodeTests
from or1_megatron.reward.referee import TOLERANCE
from or1_megatron.reward.sandbox import Ending, Sandbox, memory_file
from or1_megatron.reward.session import EXIT_MEMORY

_MARKED = re.compile(r"```[ \t]*(?:python3?|py)[ \t]*\r?\n", re.IGNORECASE)
_MAX_CODE = 500_000  # characters; nobody's solution is longer, and a parser can be made to work hard
_GRACE_S = 0.5  # between the end of a program's output and its exit


@dataclass(frozen=True)
class Limits:
    """Of one test, and of all tests of a response; seconds of wall time."""

    test_s: float
    total_s: float


class Interrupted(Exception):
    """Something outside ended a child: the check says nothing about the solution."""


def extract_code(text: str) -> str | None:
    """The last closed block marked as Python, else the last closed block; None when there is none."""
    for opening in reversed(list(_MARKED.finditer(text))):
        end = text.find("```", opening.end())
        if end >= 0:
            return text[opening.end() : end]
    parts = text.split("```")
    if len(parts) < 3:
        return None
    last = parts[(len(parts) - 1) // 2 * 2 - 1]
    return last.partition("\n")[2]


def score(text: str, tests: CodeTests, sandbox: Sandbox, limits: Limits) -> tuple[str, str]:
    """(verdict, detail). Raises Interrupted, or SandboxFailed: neither is a verdict on the solution."""
    code = extract_code(text)
    if code is None:
        return "unparsable", "no code block"
    if len(code) > _MAX_CODE:
        return "unparsable", f"{len(code)} characters of code"
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(code)  # compiled in the sandbox only: a compiler can be made to work hard, nested `finally`s do
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "unparsable", f"{type(error).__name__}: {str(error)[:200]}"
    deadline = time.monotonic() + limits.total_s
    if not tests.runs:
        return _judged(code, tests, sandbox, limits, deadline)
    handle = memory_file(_bytes(code))
    try:
        for number, (given, expected) in enumerate(tests.runs):
            verdict, detail = _run(handle, given, expected, tests.checker, sandbox, limits, deadline)
            if verdict != "correct":
                return verdict, f"test {number}: {detail}"
        return "correct", ""
    finally:
        os.close(handle)


def _run(
    program: int, given: str, expected: str, checker: str, sandbox: Sandbox, limits: Limits, deadline: float
) -> tuple[str, str]:
    until = min(time.monotonic() + limits.test_s, deadline)
    output, writing = os.pipe()
    own = [memory_file(_bytes(given)), writing]
    try:
        pid = sandbox.start("program", [program, *own], _cpu(limits.test_s))
    finally:
        _close(own)
    most = 2 * len(expected) + 2**20
    try:
        written = _drain(output, most, until)
    finally:
        os.close(output)
    patience = 0.0 if written is None or len(written) > most else max(0.0, until - time.monotonic()) + _GRACE_S
    ending = sandbox.end(pid, patience)
    if written is not None and len(written) > most:
        return "wrong", f"more than {most} bytes of output"
    failure = _failure(ending, _cpu(limits.test_s))
    if failure:
        return failure
    text = (written or b"").decode(errors="surrogateescape")
    if checker:
        payload = {"kind": "check", "checker": checker, "input": given, "output": text, "expected": expected}
        return _referee(payload, sandbox, limits, deadline)[0]
    return (
        ("correct", "")
        if same_output(text, expected)
        else ("wrong", f"got {text[:100]!r}, expected {expected[:100]!r}")
    )


def _judged(code: str, tests: CodeTests, sandbox: Sandbox, limits: Limits, deadline: float) -> tuple[str, str]:
    payload: dict[str, Any] = {"prelude": tests.prelude, "entry_point": tests.entry_point, "checker": tests.checker}
    if tests.calls:
        payload |= {"kind": "call", "function": tests.function, "calls": tests.calls}
    else:
        payload |= {"kind": "assert", "tests": tests.assertions}
    to_tested, from_referee = os.pipe()
    to_referee, from_tested = os.pipe()
    descriptors = [_payload({"code": code, "prelude": tests.prelude}), to_tested, from_tested]
    try:
        tested = sandbox.start("tested", descriptors, _cpu(limits.total_s))
    finally:
        _close(descriptors)
    try:
        (verdict, detail), late = _referee(payload, sandbox, limits, deadline, (to_referee, from_referee))
    except BaseException:
        sandbox.end(tested, 0.0)
        raise
    ending = sandbox.end(tested, 0.0 if verdict != "ended" else _GRACE_S)
    if late:
        return "timeout", f"all tests took longer than {limits.total_s} s"
    if verdict == "ended":
        return _failure(ending, _cpu(limits.total_s)) or ("wrong", f"{detail} with exit code {ending.code}")
    return verdict, detail


def _referee(
    payload: dict[str, Any], sandbox: Sandbox, limits: Limits, deadline: float, channel: tuple[int, int] | None = None
) -> tuple[tuple[str, str], bool]:
    """((verdict, detail), whether the deadline passed first)."""
    inbox, outbox = channel or (memory_file(b""), memory_file(b""))
    verdict_from, verdict_to = os.pipe()
    descriptors = [_payload({**payload, "timeout_s": limits.test_s}), inbox, outbox, verdict_to]
    try:
        pid = sandbox.start("referee", descriptors, _cpu(limits.total_s))
    finally:
        _close(descriptors)
    try:
        said = _drain(verdict_from, 65536, deadline)
    finally:
        os.close(verdict_from)
    ending = sandbox.end(pid, 0.0 if said is None else _GRACE_S)
    if said is None:
        return ("timeout", "the tests took too long"), True
    if not said:
        if ending.signal == signal.SIGXCPU:
            return ("timeout", "the tests took too long"), False
        raise Interrupted(f"the process that holds the tests ended without a verdict: {ending}")
    verdict, detail = json.loads(said)
    if verdict == "broken_tests":
        return ("infrastructure_error", f"{BROKEN_TESTS}: {detail}"), False
    return (verdict, detail), False


def _failure(ending: Ending, cpu_s: int) -> tuple[str, str] | None:
    """Why a process with so much CPU time that should have ended well did not; None when it did."""
    if ending.late or ending.signal == signal.SIGXCPU:
        return "timeout", f"after {ending.cpu_s:.1f} s of CPU time"
    if ending.signal == signal.SIGSYS:
        return "sandbox_violation", "a system call that is not allowed"
    if ending.signal == signal.SIGKILL:
        if ending.cpu_s >= cpu_s:  # its own CPU limit, with SIGXCPU ignored
            return "timeout", f"after {ending.cpu_s:.1f} s of CPU time"
        raise Interrupted("killed from outside")
    if ending.code == EXIT_MEMORY:
        return "memory", "MemoryError"
    if ending.signal or ending.code:
        return "wrong", f"ended with {f'signal {ending.signal}' if ending.signal else f'exit code {ending.code}'}"
    return None


def same_output(output: str, expected: str) -> bool:
    """LiveCodeBench's rule: outer blank lines and the edges of each line do not count, then line by line."""
    lines, wanted = _lines(output), _lines(expected)
    return len(lines) == len(wanted) and all(_same_line(a, b) for a, b in zip(lines, wanted, strict=True))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    tokens, expected = line.split(), wanted.split()
    return len(tokens) == len(expected) and all(_same_number(a, b) for a, b in zip(tokens, expected, strict=True))


def _same_number(token: str, wanted: str) -> bool:
    try:
        value, goal = Decimal(token), Decimal(wanted)
        if value == goal:
            return True
        if not value.is_finite() or not goal.is_finite() or not ("." in wanted or "e" in wanted.lower()):
            return False
        return abs(value - goal) <= Decimal(str(TOLERANCE)) * max(Decimal(1), abs(goal))
    except DecimalException:  # no number; a comparison with a signalling NaN; a difference beyond all bounds
        return False


def _drain(descriptor: int, most: int, until: float) -> bytes | None:
    """All that is written until the other end closes; stops beyond `most` bytes; None when `until` passed."""
    parts, size = [], 0
    while size <= most:
        if not select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
            return None
        part = os.read(descriptor, 2**16)
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _payload(content: dict[str, Any]) -> int:
    return memory_file(json.dumps(content).encode())


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _cpu(seconds: float) -> int:
    return max(1, int(-(-seconds // 1)))


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
