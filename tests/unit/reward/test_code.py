"""Verdicts on code answers: where the code stands, the forms of tests, rules of comparison, checkers, faulty tests."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from or1_megatron.errors import UserError
from or1_megatron.reward.code import extract_code, same_output
from or1_megatron.reward.problem import Task, code_tests
from or1_megatron.reward.service import RewardService
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Verdict


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardService]:
    config = RewardConfig(num_workers=1, code_timeout_s=1.0, code_total_s=2.0, code_memory_mb=1024)
    with RewardService(config, tmp_path_factory.mktemp("logs")) as service:
        yield service


def check(service: RewardService, code: str, tests: object) -> Verdict:
    return service.submit(Task(f"So:\n```python\n{code}\n```\n", (json.dumps(tests),))).result(30)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\n```python\nb\n```", "b\n"),
        ("```python\na\n```\n```python\nopen", "a\n"),
        ("```Python3 \r\na\n```", "a\n"),
        ("```py\na\n```\nOutput:\n```\n3\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```\na\n```\nand\n```\nb\n```", "b\n"),
        ("```cpp\na\n```\nthen\n```\nb", "a\n"),
        ("a = 1", None),
        ("```python\na = 1", None),
        ("", None),
    ],
)
def test_last_block_counts(text: str, code: str | None) -> None:
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("output", "expected", "equal"),
    [
        ("3\n", "3", True),
        ("  3  \n\n", "3\n", True),
        ("1 2\n3 4", "1 2\n3 4\n", True),
        ("1 2 3 4", "1 2\n3 4", False),
        ("1\n\n2", "1\n2", False),
        ("3.0", "3", True),
        ("3", "3.0", True),
        ("1e3", "1000", True),
        ("0.3333333", "0.33333333", True),
        ("0.33333", "0.33333333", False),
        ("1000000.9", "1000001.0", True),
        ("1000003.0", "1000001.0", False),
        ("10000000000000000000001", "10000000000000000000000", False),
        ("1.0000001", "1", False),
        ("yes", "YES", False),
        ("", "", True),
        ("", "0", False),
        ("nan", "1.0", False),
        ("inf", "1.0", False),
        ("1.0", "nan", False),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("5", "1" * 400 + ".5", False),
        ("1" * 400 + ".4", "1" * 400 + ".5", True),
        ("1e9999999", "1.5", False),
        ("1.500001", "1.5", True),
    ],
)
def test_outputs_compare_as_in_livecodebench(output: str, expected: str, equal: bool) -> None:
    assert same_output(output, expected) is equal


DOUBLE = {"inputs": ["1\n", "21\n"], "outputs": ["2\n", "42\n"]}
CALLED = {"inputs": [[1, 2], [[1, 2], [3]]], "outputs": [3, [1, 2, 3]], "fn_name": "add"}
LCB = [{"input": "[1, 2]\n1", "output": "[2, 3]", "testtype": "functional", "metadata": {"func_name": "shift"}}]
LEET = {
    "prompt": "from typing import *\nclass ListNode:\n    def __init__(self, val=0, next=None):\n"
    "        self.val, self.next = val, next\n"
    "def build(values):\n    return ListNode(values[0], build(values[1:])) if values else None\n"
    "def same(a, b):\n    return a is b if not (a and b) else a.val == b.val and same(a.next, b.next)\n",
    "test": "def check(candidate):\n    assert same(candidate(build([1, 2, 3])), build([3, 2, 1]))\n",
    "entry_point": "Solution().turn",
}
TURN = (
    "class Solution:\n    def turn(self, head: Optional[ListNode]):\n        last = None\n        while head:\n"
    "            head.next, last, head = last, head, head.next\n        return last"
)
IN_PLACE = {"test": "def check(f):\n    a = [3, 1]\n    f(a)\n    assert a == [1, 3]", "entry_point": "f"}
ANY_ROOT = {
    "inputs": ["4\n"], "outputs": ["2\n"],
    "checker": "def check(given, output, expected):\n    return int(output) ** 2 == int(given)",
}  # fmt: skip
ANY_PAIR = {
    "inputs": [[[1, 2, 3], 4]], "outputs": [[0, 2]], "fn_name": "two",
    "checker": "def check(given, output, expected):\n    return sum(given[0][i] for i in output) == given[1]",
}  # fmt: skip
ANY_ORDER = {
    "test": "def check(candidate):\n    assert candidate([3, 1], k=2) == [6, 2]\n    assert candidate([], k=2) == []",
    "entry_point": "Solution().scale",
    "checker": "def check(given, output, expected):\n    return given[1] == 2 and sorted(output) == sorted(expected)",
}
TWO = {
    "test": "def check(candidate):\n    assert candidate([1, 2, 3], t=4) == [0, 2]", "entry_point": "two",
    "checker": ANY_PAIR["checker"],
}  # fmt: skip
DAYS = {
    "test_setup_code": "import datetime",
    "test_list": ["assert f(datetime.date(2024, 2, 29)) == datetime.date(2024, 3, 1)"],
}
NO_CHECK = {"test": "def check(f):\n    assert f(1) == 1", "entry_point": "f"}
LIAR = (
    "class Liar:\n    def __iter__(self): return iter([0, 0, 0, 0])\n    def __len__(self): return 2\n"
    "    def __getitem__(self, i): return i\ndef two(a, t): return Liar()"
)

VERDICTS = [
    ("program", "print(2 * int(input()))", DOUBLE, "correct"),
    ("program, numpy-free main", "if __name__ == '__main__':\n    print(2 * int(input()))", DOUBLE, "correct"),
    ("program by descriptor", "import os\nos.write(1, b'%d' % (2 * int(os.read(0, 99))))", DOUBLE, "correct"),
    ("program by buffer", "sys.stdout.buffer.write(b'%d' % (2 * int(sys.stdin.buffer.read())))", DOUBLE, "correct"),
    ("program that exits", "print(2 * int(input()))\nexit()", DOUBLE, "correct"),
    ("program with its own output", "import io\nsys.stdout = io.StringIO()\nprint(2 * int(input()))\n"
     "sys.__stdout__.write(sys.stdout.getvalue())", DOUBLE, "correct"),
    ("program by fileinput", "import fileinput\nprint(2 * int(next(fileinput.input())))", DOUBLE, "correct"),
    ("program that looks for arguments", "if len(sys.argv) > 1: sys.exit(sys.argv[1])\nprint(2 * int(input()))",
     DOUBLE, "correct"),
    ("program that looks for more", "if len(sys.orig_argv) > 1: sys.exit(1)\nprint(2 * int(input()))", DOUBLE,
     "correct"),
    ("not a number at all", "print('sNaN')", DOUBLE, "wrong"),
    ("program with thread", "from threading import *\nThread(target=lambda: print(2 * int(input()))).start()", DOUBLE,
     "correct"),
    ("first right only", "print(2)", DOUBLE, "wrong"),
    ("right, then an error", "print(2 * int(input()))\n1 / 0", DOUBLE, "wrong"),
    ("right, then exit code 3", "print(2 * int(input()))\nexit(3)", DOUBLE, "wrong"),
    ("too slow", "while True: pass", DOUBLE, "timeout"),
    ("too large", "a = [0] * 10**10", DOUBLE, "memory"),
    ("no syntax", "print(", DOUBLE, "unparsable"),
    ("NUL", "print(2)\0", DOUBLE, "unparsable"),
    ("return outside a function", "return 2", DOUBLE, "wrong"),
    ("annotation of no known name", "def f(x: Node) -> Node: return 2 * x\nprint(f(int(input())))", DOUBLE, "correct"),
    ("empty", "", DOUBLE, "wrong"),
    ("call", "def add(a, b): return a + b", CALLED, "correct"),
    ("call of a method", "class Solution:\n    def add(self, a, b): return a + b", CALLED, "correct"),
    ("call, tuple for list", "def add(a, b): return a + b if a == 1 else (*a, *b)", CALLED, "correct"),
    ("call, nearly an integer", "def add(a, b): return (a + b) * (1 + 1e-9) if a == 1 else a + b", CALLED, "wrong"),
    ("call, true for one", "def add(a, b): return True", CALLED, "wrong"),
    ("call of another name", "def plus(a, b): return a + b", CALLED, "wrong"),
    ("call of a name from operator", "", CALLED, "wrong"),
    ("assertion on a name from math", "x = 1", {"test_list": ["assert gcd(4, 6) == 2"]}, "wrong"),
    ("name imported by the solution", "from math import gcd", {"test_list": ["assert gcd(4, 6) == 2"]}, "correct"),
    ("call of no function", "add = 3", CALLED, "wrong"),
    ("call, error", "def add(a, b): raise ValueError", CALLED, "wrong"),
    ("call, prints", "def add(a, b):\n    print('x' * 10**6)\n    return a + b", CALLED, "correct"),
    ("call, the same list again and again", "def add(a, b):\n    for _ in range(60): a = [a, a]\n    return a", CALLED,
     "wrong"),
    ("lines of JSON", "class Solution:\n    def shift(self, a, k): return [x + k for x in a]", LCB, "correct"),
    ("lines of JSON, wrong", "class Solution:\n    def shift(self, a, k): return a", LCB, "wrong"),
    ("linked list", TURN, LEET, "correct"),
    ("linked list, same", "class Solution:\n    def turn(self, head): return head", LEET, "wrong"),
    ("own node class", "class ListNode: pass\n" + TURN, LEET, "correct"),
    ("in place", "def f(a): a.sort()", IN_PLACE, "correct"),
    ("not in place", "def f(a): a = sorted(a)", IN_PLACE, "wrong"),
    ("assertions", "def f(x): return x + 1", {"test_list": ["assert f(1) == 2", "assert f(2) == 3"]}, "correct"),
    ("assertions, one fails", "def f(x): return 2", {"test_list": ["assert f(1) == 2", "assert f(2) == 3"]}, "wrong"),
    ("named as a builtin", "def sum(a, b): return a + b", {"test_list": ["assert sum(10, 15) == 25"]}, "correct"),
    ("own sorted", "def sorted(x): return [1]\ndef f(): pass", {"test_list": ["assert sorted(f()) == [1]"]}, "wrong"),
    ("handed to a builtin", "def f(x): return 2 * x", {"test_list": ["assert list(map(f, [1, 2])) == [2, 4]"]},
     "correct"),
    ("handed to a builtin, wrong", "def f(x): return x", {"test_list": ["assert list(map(f, [1, 2])) == [2, 4]"]},
     "wrong"),
    ("entry point handed to a builtin", "def f(x): return -x",
     {"test": "def check(c):\n    assert sorted([1, 2], key=c) == [2, 1]", "entry_point": "f"}, "correct"),
    ("named as a builtin, in a loop", "def sum(a, b): return a + b",
     {"test_list": ["for i, j in zip([1], [2]): assert sum(i, j) == 3"]}, "correct"),
    ("a generator", "def f(n): yield from range(n)", {"test_list": ["assert list(f(3)) == [0, 1, 2]"]}, "correct"),
    ("a generator, wrong", "def f(n): yield from range(n)", {"test_list": ["assert list(f(3)) == [0, 1]"]}, "wrong"),
    ("a map", "def f(n): return map(str, range(n))", {"test_list": ["assert sorted(f(2)) == ['0', '1']"]}, "correct"),
    ("a date", "def f(day): return day + timedelta(1)", DAYS, "correct"),
    ("a date, wrong", "def f(day): return day + timedelta(2)", DAYS, "wrong"),
    ("a date, as text", "def f(day): return '2024-03-01'", DAYS, "wrong"),
    ("stops the tests' iteration", "def f(x): raise StopIteration",
     {"test_list": ["assert all(g == w for g, w in zip(map(f, [1, 2]), [math.floor(5), 6]))"]}, "wrong"),
    ("a type", "def f(a, t): return [x for x in a if type(x) is t]", {"test_list": ["assert f([1, ''], str) == ['']"]},
     "correct"),
    ("its own class", "class N:\n    def __init__(self, v): self.v, self.n = v, None\ndef f(x): return x.n.v",
     {"test_list": ["assert f(a) == 2"], "test_setup_code": "a = N(1)\na.n = N(2)"}, "correct"),
    ("many roots", "print(-2)", ANY_ROOT, "correct"),
    ("many roots, none", "print(3)", ANY_ROOT, "wrong"),
    ("many roots, no number", "print('True')", ANY_ROOT, "wrong"),
    ("many pairs", "def two(a, t): return [2, 0]", ANY_PAIR, "correct"),
    ("many pairs, none", "def two(a, t): return [0, 1]", ANY_PAIR, "wrong"),
    ("any order", "class Solution:\n    def scale(self, a, k): return [k * x for x in a[::-1]]", ANY_ORDER, "correct"),
    ("any order, wrong", "class Solution:\n    def scale(self, a, k): return a", ANY_ORDER, "wrong"),
    ("any order, not a list", "class Solution:\n    def scale(self, a, k): return True", ANY_ORDER, "wrong"),
    ("any order, equal to everything", "class E(list):\n    __eq__ = lambda self, other: True\n"
     "class Solution:\n    def scale(self, a, k): return E([0])", ANY_ORDER, "wrong"),
    ("any order, in place", "class Solution:\n    def scale(self, a, k):\n        a[:] = [k * x for x in a[::-1]]\n"
     "        return a", ANY_ORDER, "correct"),
    ("arguments changed for the checker", "def two(a, t):\n    a[:] = [t, 0, 0]\n    return [0, 1]", TWO, "wrong"),
    ("right, and arguments changed", "def two(a, t):\n    a.clear()\n    return [2, 0]", TWO, "correct"),
    ("an object for the checker", LIAR, TWO, "wrong"),
    ("an object inside for the checker", LIAR.replace("return Liar()", "return deque([Liar()])"), TWO, "wrong"),
    ("an object for the checker of a call", LIAR, ANY_PAIR, "wrong"),
    ("a checker without a comparison", "def f(x): return 1", {"test": "def check(f):\n    assert f(1)",
     "entry_point": "f", "checker": "def check(given, output, expected): return True"}, "infrastructure_error"),
    ("the end of an iterator is what the tests wait for", "def f(x): raise StopIteration",
     {"test_list": ["try:\n    f(1)\n    assert False\nexcept StopIteration:\n    pass"]}, "correct"),
    ("a builtin's name, and a caught error's", "def max(x): return 5",
     {"test_list": ["try:\n    pass\nexcept ValueError as err:\n    print(err)\nassert max([1]) == 5"]}, "correct"),
    ("a builtin's name, and one of the prelude", "def max(x): return 5",
     {"test": "five = 5\ndef check(g):\n    assert max([1]) == five", "entry_point": "max"}, "correct"),
    ("tests never call", "def f(x): return 1", {"test_list": ["assert True"]}, "infrastructure_error"),
    ("tests do not compile", "def f(x): return 1", {"test_list": ["assert f(1"]}, "infrastructure_error"),
    ("prelude imports nothing", "def f(x): return 1", {**NO_CHECK, "prompt": "from nothing_of_the_kind import x"},
     "infrastructure_error"),
    ("prelude fails", "def f(x): return 1", {**NO_CHECK, "prompt": "x = nothing_of_the_kind"}, "infrastructure_error"),
    ("tests import nothing", "def f(x): return 1", {"test_list": ["import nothing_of_the_kind", "assert f(1) == 1"]},
     "infrastructure_error"),
    ("check imports nothing", "def f(x): return 1", {**NO_CHECK, "test": "def check(f):\n    import nothing\n    f(1)"},
     "infrastructure_error"),
    ("solution imports nothing", "def f(x): import nothing_of_the_kind", {"test_list": ["assert f(1) == 1"]}, "wrong"),
    ("solution imports nothing at once", "import nothing_of_the_kind", {"test_list": ["assert f(1) == 1"]}, "wrong"),
    ("checker fails", "print(2)", {**ANY_ROOT, "checker": "import nothing_of_the_kind"}, "infrastructure_error"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "tests", "verdict"), [row[1:] for row in VERDICTS], ids=[row[0] for row in VERDICTS])
def test_verdict(service: RewardService, code: str, tests: object, verdict: str) -> None:
    found = check(service, code, tests)
    assert found.name == verdict, found


def test_tested_code_may_have_more_memory_than_a_worker() -> None:
    with RewardService(RewardConfig(num_workers=1, memory_mb=512, code_memory_mb=1024)) as service:
        assert check(service, "a = bytearray(600 << 20)\nprint(2 * int(input()))", DOUBLE).name == "correct"


def test_same_order_of_a_set_every_time(service: RewardService) -> None:
    """Text hashes are random from process to process unless their seed is fixed; verdicts must not be."""
    tests = {"inputs": [""], "outputs": ["%s"]}
    first = check(service, "print(hash('or1'))", tests).detail
    assert "got" in first
    with RewardService(RewardConfig(num_workers=1)) as other:
        assert check(other, "print(hash('or1'))", tests).detail == first


@pytest.mark.parametrize(
    ("truth", "source", "words"),
    [
        ("7", "leetcode", "no tests in a known form"),
        ('{"inputs": [], "outputs": []}', "x", "no test"),
        ('{"inputs": ["1"], "outputs": []}', "x", "1 inputs but 0 outputs"),
        ('[{"input": "1", "output": "1", "testtype": "functional"}]', "x", "name no function"),
        ('{"inputs": ["1"], "outputs": ["no JSON"], "fn_name": "f"}', "x", "cannot be read .Expecting value"),
        ('{"inputs": [1], "outputs": [1], "fn_name": "f"}', "x", "cannot be read .'int' object is not iterable"),
        ('{"inputs": 1, "outputs": 1}', "x", "cannot be read .object of type 'int'"),
        ('[{"input": "1", "output": "1", "testtype": "functional", "metadata": "f"}]', "x", "cannot be read"),
        (
            '[{"input": "1", "output": "1", "testtype": "functional", "fn_name": 1}]',
            "x",
            "a name is needed, not 1",
        ),
        ('{"test": "assert f()", "entry_point": ["f"]}', "x", r"cannot be read .a name is needed, not .'f'."),
        ('{"inputs": [[1]], "outputs": [1], "fn_name": ["f"]}', "x", r"cannot be read .a name is needed, not .'f'."),
    ],
)
def test_tests_that_cannot_be_used(truth: str, source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        code_tests((truth,), source)


def test_a_builtin_class_is_a_solution(service: RewardService) -> None:
    """It must be called where the solution is: a test that never calls the solution counts as broken."""
    for tests in (
        {"test_list": ["assert f('ab') == ('a', 'b')"]},
        {"test": "def check(g):\n    assert g('ab') == ('a', 'b')", "entry_point": "f"},
    ):
        assert check(service, "f = tuple", tests).name == "correct"
        assert check(service, "f = list", tests).name == "wrong"


def test_the_limit_of_a_test_holds_while_it_asks(service: RewardService) -> None:
    """The solution answers before it is asked and then reads nothing."""
    code = (
        'import os, struct, time\nm = b\'{"value": {"root": [0], "nodes": [["handle", 0]]}}\'\n'
        "os.write(4, struct.pack('<I', len(m)) + m)\ntime.sleep(1000)"
    )
    found = check(service, code, {"test_list": ["assert f('x' * 10**6) == 1"]})
    assert found.name == "timeout" and "call 1 took longer than 1.0 s" in found.detail, found


def test_math_is_not_code() -> None:
    for truth in ("7", "[1,2]", "\\{1,2\\}", "{1}", '{"a": 1}', "[[1, 2], [3]]"):
        assert code_tests((truth,), "math") is None
