"""Solutions of real problems pass; spoiled, and with results equal to everything, they fail. A sample of each set:
benchmarks/reference_solutions.py runs them all."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from reference_solutions import FOLDER, SETS, Reference, forged, references, reordered, spoiled, verdicts

from or1_megatron.reward.problem import Task
from or1_megatron.reward.service import RewardService
from or1_megatron.sections import RewardConfig

SAMPLE = {"HumanEval": 164, "MBPP": 100, "LeetCode": 100}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardService]:
    with RewardService(RewardConfig(num_workers=2), tmp_path_factory.mktemp("logs")) as service:
        yield service


def sample(name: str) -> list[Reference]:
    found = references(name)
    if found is None:
        pytest.skip(f"the problems of {name} are not on this machine")
    return found[:: len(found) // SAMPLE[name]]


@pytest.mark.parametrize("name", SETS)
def test_references_pass_and_mutants_fail(service: RewardService, name: str) -> None:
    few = sample(name)
    for change, expected in ((None, "correct"), (spoiled, "wrong"), (forged, "wrong")):
        tasks = [item.task(change(item) if change else item.solution) for item in few]
        found = zip(few, verdicts(service, tasks), strict=True)
        assert [(item.name, verdict) for item, verdict in found if verdict.name != expected] == []


def test_any_order_where_the_problem_says_so(service: RewardService) -> None:
    found = references("LeetCode")
    if found is None:
        pytest.skip("the problems of LeetCode are not on this machine")
    free = [item for item in found if "checker" in json.loads(item.tests)]
    assert len(free) >= 40 and {"two-sum", "4sum", "word-ladder-ii"} <= {item.name for item in free}
    for item, verdict in zip(free, verdicts(service, [item.task(reordered(item)) for item in free]), strict=True):
        recursive = item.solution.count(f"{item.function}(") > 1
        assert verdict.name == "correct" or recursive, item.name
    fixed = {"reveal-cards-in-increasing-order", "find-the-difference-of-two-arrays"}
    tasks = [item.task(reordered(item)) for item in found if item.name in fixed]
    assert [verdict.name for verdict in verdicts(service, tasks)] == ["wrong", "wrong"]


@pytest.mark.parametrize("number", ["0001", "0111", "2287", "2404", "4184"])
def test_apps(service: RewardService, number: str) -> None:
    folder = FOLDER / "apps_sample" / number
    if not folder.is_dir():
        pytest.skip("the problems of APPS are not on this machine")
    tests = (folder / "input_output.json").read_text()
    solutions = json.loads((folder / "solutions.json").read_text())[:10]
    found = verdicts(service, [Task(f"```python\n{code}\n```", (tests,)) for code in solutions])
    num_right = sum(verdict.name == "correct" for verdict in found)
    assert num_right == (7 if number == "2287" else len(solutions)), found
    empty = verdicts(service, [Task("```python\npass\n```", (tests,))])
    assert empty[0].name == "wrong"
