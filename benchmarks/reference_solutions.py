"""Reference solutions of HumanEval, MBPP, LeetCode and APPS through the code verifier: every one must pass, and must
fail once it is spoiled. The speed is what a step pays for right answers.

The problems are not part of the repository: they are looked for in `../shared/data`, or in the folder named by
`OR1_PROBLEMS`; a set that is not there is left out, and said so.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import Benchmark, main

from or1_megatron.data.benchmarks import checked_function
from or1_megatron.reward.problem import Task
from or1_megatron.reward.service import RewardService
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Verdict

FOLDER = Path(os.environ.get("OR1_PROBLEMS") or Path(__file__).resolve().parents[2] / "shared" / "data")
CONFIG = RewardConfig(num_workers=2)
# Any order is right; the solution's is the one in which it iterates over a set of strings, a matter of the hash seed.
CHECKERS = {"word-ladder-ii": "def check(input, output, expected): return sorted(output) == sorted(expected)"}


@dataclass(frozen=True)
class Reference:
    """A problem with a solution that is known to be right."""

    name: str
    solution: str
    function: str  # under test; of class Solution where the solution has one
    tests: str  # ground truth, as problem files hold it

    def task(self, code: str) -> Task:
        return Task(f"```python\n{code}\n```", (self.tests,))


def humaneval() -> Iterator[Reference]:
    for row in _rows("humaneval/HumanEval.jsonl.gz"):
        solution = row["prompt"] + row["canonical_solution"]
        yield Reference(row["task_id"], solution, row["entry_point"], json.dumps(checked_function(row)))


def mbpp() -> Iterator[Reference]:
    for row in _rows("mbpp/mbpp.jsonl"):
        tests = {"test_list": row["test_list"] + row["challenge_test_list"], "test_setup_code": row["test_setup_code"]}
        called = re.findall(r"\b([A-Za-z_]\w*)\s*\(", " ".join(row["test_list"]))
        defined = [name for name in re.findall(r"^def\s+(\w+)", row["code"], re.MULTILINE) if name in called]
        yield Reference(str(row["task_id"]), row["code"], defined[-1], json.dumps(tests))


def leetcode() -> Iterator[Reference]:
    for row in _rows("leetcode/LeetCodeDataset-v0.2.0-train.jsonl.gz"):
        tests = checked_function(row)
        if row["task_id"] in CHECKERS:
            tests["checker"] = CHECKERS[row["task_id"]]
        name = row["entry_point"].rpartition(".")[2]
        yield Reference(row["task_id"], row["completion"], name, json.dumps(tests))


SETS: dict[str, tuple[str, Callable[[], Iterator[Reference]]]] = {
    "HumanEval": ("humaneval", humaneval),
    "MBPP": ("mbpp", mbpp),
    "LeetCode": ("leetcode", leetcode),
}


def references(name: str) -> list[Reference] | None:
    """All of a set; None where its files are missing."""
    folder, load = SETS[name]
    return list(load()) if (FOLDER / folder).is_dir() else None


def _rows(path: str) -> Iterator[dict]:
    file = FOLDER / path
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        for line in lines:
            yield json.loads(line)


_SPOIL = """
def _spoiled(function):
    def spoil(value):
        if value is None: return 0
        if isinstance(value, bool): return not value
        if isinstance(value, (int, float, complex)): return value + 1
        if isinstance(value, str): return value + "x"
        if isinstance(value, list): return value + [value[0] if value else 0]
        if isinstance(value, tuple): return value + (0,)
        if isinstance(value, dict): return {**value, "x": 0}
        if isinstance(value, set): return value | {"x"}
        return None
    active = []
    def spoiled(*args, **kwargs):
        if active: return function(*args, **kwargs)  # two spoiled truths may make one
        active.append(1)
        result = function(*args, **kwargs)
        active.pop()
        if result is None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, list): value.append(value[0] if value else 0)
        return spoil(result)
    return spoiled
"""
_EQUAL = """
class _Equal(int):
    __eq__ = __ge__ = __le__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
def _spoiled(function):
    return lambda *args, **kwargs: _Equal(-987654321)
"""


def spoiled(reference: Reference, way: str = _SPOIL) -> str:
    """The solution with results that are always a little wrong."""
    name = f"Solution.{reference.function}" if "class Solution" in reference.solution else reference.function
    return f"{reference.solution}\n{way}\n{name} = _spoiled({name})\n"


def reordered(reference: Reference) -> str:
    """The solution with lists turned round."""
    way = "def _spoiled(f): return lambda *a, **k: (lambda r: r[::-1] if isinstance(r, list) else r)(f(*a, **k))"
    return spoiled(reference, way)


def forged(reference: Reference) -> str:
    """The solution with results that claim to be equal to everything."""
    return spoiled(reference, _EQUAL)


def verdicts(service: RewardService, tasks: list[Task]) -> list[Verdict]:
    return [future.result() for future in [service.submit(task) for task in tasks]]


def count_correct(service: RewardService, tasks: list[Task]) -> int:
    found = verdicts(service, tasks)
    assert not any(verdict.failed for verdict in found), [verdict for verdict in found if verdict.failed]
    return sum(verdict.name == "correct" for verdict in found)


def run_alone(reference: Reference) -> None:
    """The simple harness: solution and tests in one new interpreter, its exit code the verdict."""
    tests = json.loads(reference.tests)
    code = "\n".join([tests.get("prompt", ""), reference.solution, tests.get("test_setup_code", "")])
    code += "\n" + (
        f"{tests['test']}\ncheck({tests['entry_point']})" if "test" in tests else "\n".join(tests["test_list"])
    )
    code = (
        "import math, re, string, collections, heapq, bisect\nfrom typing import *\nfrom collections import *\n" + code
    )
    subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, timeout=20, check=True)


def build(bench: Benchmark, quick: bool) -> None:
    service = bench.stack.enter_context(
        RewardService(CONFIG, Path(bench.stack.enter_context(tempfile.TemporaryDirectory())))
    )
    for name in SETS:
        found = references(name)
        if found is None:
            bench.note(f"{name}: not on this machine (looked in {FOLDER.name}/{SETS[name][0]}; set OR1_PROBLEMS)")
            continue
        found = found[:: len(found) // 80] if quick else found
        for way, code in (("reference", lambda it: it.solution), ("spoiled", spoiled), ("forged", forged)):
            right = count_correct(service, [item.task(code(item)) for item in found])
            bench.note(f"{name}: {right} of {len(found)} {way} solutions pass")
            target, better = (1.0, "higher") if way == "reference" else (0.0, "lower")
            bench.mark(f"{name}_{way}_pass_rate", partial(float, right / len(found)), target, better)
        few = found[:: max(1, len(found) // 60)]
        tasks = [item.task(item.solution) for item in few]
        bench.case(f"service, {name}", partial(verdicts_only, service, tasks), "ours", len(few), "solutions")
        bench.case(f"a process each, {name}", partial(run_each, few), "peer", len(few), "solutions")


def verdicts_only(service: RewardService, tasks: list[Task]) -> None:
    assert count_correct(service, tasks) == len(tasks)


def run_each(few: list[Reference]) -> None:
    with ThreadPoolExecutor(CONFIG.num_workers) as pool:
        list(pool.map(run_alone, few))


if __name__ == "__main__":
    main("reference_solutions", f"solutions checked per second, {CONFIG.num_workers} workers", build)
