"""Benchmarks become rows of the field's schema, and their own references pass as far as there are any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reference_solutions import FOLDER

from or1_megatron.data.benchmarks import INSTRUCTION, NAMES, benchmark_rows, checked_function, problem
from or1_megatron.errors import UserError
from or1_megatron.reward.problem import code_tests

COUNTS = {
    "aime24": 30, "aime25": 30, "math500": 500, "gsm8k": 1319, "humaneval": 164, "mbpp": 500, "leetcode": 1890,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_named_benchmarks(name: str):
    if not FOLDER.is_dir():
        pytest.skip("the benchmarks' files are not on this machine")
    rows = [row for _, row in benchmark_rows(name, FOLDER)]
    assert len(rows) == COUNTS[name]
    for row in rows:
        (message,) = row["prompt"]
        gold = row["reward_model"]["ground_truth"]
        is_code = code_tests((gold,), row["data_source"]) is not None
        assert is_code == (name in ("humaneval", "mbpp", "leetcode"))
        assert is_code or (message["content"].count("\\boxed") >= 1 and gold and "####" not in gold)
    if name == "gsm8k":
        assert rows[0]["reward_model"]["ground_truth"] == "18" and rows[0]["prompt"][0]["content"].endswith(INSTRUCTION)


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_the_user(tmp_path: Path):
    mine = {"prompt": "2 + 2 =", "reward_model": {"ground_truth": "4"}}
    rows = [mine, {"problem": "2 + 3?", "answer": 5}]
    (first, one), (second, other) = benchmark_rows(write(tmp_path / "b.jsonl", rows), None)
    assert first.endswith("b.jsonl line 1") and one["prompt"] == "2 + 2 ="
    assert second.endswith("line 2") and other["reward_model"] == {"ground_truth": "5"}


def test_bad_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="benchmark gsm8k: say where"):
        list(benchmark_rows("gsm8k", None))
    with pytest.raises(UserError, match=r"gsm8k/test.jsonl does not exist"):
        list(benchmark_rows("gsm8k", tmp_path))
    with pytest.raises(UserError, match=r"'gsm9k' is not one of aime24, .* nor a hub id"):
        list(benchmark_rows("gsm9k", tmp_path))
    with pytest.raises(UserError, match=r"line 2: its fields a, b are not known"):
        list(benchmark_rows(write(tmp_path / "x.jsonl", [{"question": "q", "answer": "1"}, {"a": 1, "b": 2}]), None))
    with pytest.raises(UserError, match=r"line 1 is not an object: holds a int"):
        list(benchmark_rows(write(tmp_path / "y.jsonl", [3]), None))
    (tmp_path / "z.parquet").write_text("no")
    with pytest.raises(UserError, match=r"z.parquet cannot be read"):
        list(benchmark_rows(str(tmp_path / "z.parquet"), None))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"data set openai/gsm8k could not be had from the hub .* without network"):
        list(benchmark_rows("openai/gsm8k", None))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [], "reward_model": {}},
        {"prompt": [{"role": "user", "content": None}], "reward_model": {}},
        {"prompt": [{"role": "user", "content": [{"type": "text"}]}], "reward_model": {}},
        {"test": "def check(f): pass", "entry_point": "f"},
        {"text": "Add.", "test_list": [1]},
    ],
)
def test_rows_of_other_forms_are_named(row: dict, tmp_path: Path):
    with pytest.raises(UserError, match=r"x.jsonl line 1: fields of no known form \("):
        list(benchmark_rows(write(tmp_path / "x.jsonl", [row]), None))


PLAIN = "def check(candidate):\n    assert candidate(n = 1) == [1, 2]\n"


@pytest.mark.parametrize(
    ("asked", "test", "checked"),
    [
        ("You can return the answer in any order.", PLAIN, True),
        ("Return it. You may finish the tasks in any order.", PLAIN, False),
        ("Return the paths in any order.", "def check(candidate):\n    assert same(candidate(n = 1), [1, 2])\n", False),
    ],
)
def test_a_checker_where_any_order_will_do(asked: str, test: str, checked: bool):
    tests = checked_function({"prompt": "", "test": test, "entry_point": "f", "query": asked})
    assert ("checker" in tests) == checked
    if checked:
        names: dict = {}
        exec(tests["checker"], names)
        check = names["check"]
        assert check([], [2, 1], [1, 2]) and check([], [[2], "a"], ["a", [2]]) and check([], "ab", "ab")
        assert not check([], [2, 2], [1, 2]) and not check([], "ba", "ab") and not check([], [1], 1)


@pytest.mark.parametrize(
    ("ability", "asked", "told"),
    [("math", "1 + 1?", True), ("math", "1 + 1? Use \\boxed{}.", False), ("code", "Add two numbers.", False)],
)
def test_where_the_answer_goes_is_told_once_and_of_mathematics_only(ability: str, asked: str, told: bool):
    row = {"prompt": [{"role": "user", "content": asked}], "reward_model": {"ground_truth": "2"}, "ability": ability}
    assert problem("here", row)["prompt"][-1]["content"] == asked + INSTRUCTION * told


def test_a_result_of_two_lists_has_no_checker():
    row = {"prompt": "", "test": PLAIN, "entry_point": "f", "query": "Return both lists in any order."}
    assert "checker" in checked_function(row)
    assert "checker" not in checked_function({**row, "task_id": "find-the-difference-of-two-arrays"})


def test_what_assertions_need_before_them_is_kept():
    row = {"text": "Add.", "test_list": ["assert add(1) == 2"], "test_setup_code": "import math"}
    assert json.loads(problem("here", row)["reward_model"]["ground_truth"])["test_setup_code"] == "import math"
