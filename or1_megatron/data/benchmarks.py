"""Benchmarks by name: files of other projects, unchanged, as rows of the field's schema.

A benchmark is a name below, whose file lies in a folder of the user's; a file of his own; or OWNER/NAME[:FILE], a
data set on the Hugging Face hub. What a row holds is told by its fields: the schema itself (see prompts.py), question
and answer, HumanEval's and LeetCode's tests, MBPP's assertions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from or1_megatron.data.rows import hub_files, is_hub_name, is_row_file, sound_rows
from or1_megatron.errors import UserError

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_ANY_ORDER = re.compile(r"\b(?:return|output|answer)[^.\n]*\bin any order\b", re.IGNORECASE)
_FREE_INSIDE = (  # any order within the two lists of the result, not of these
    "find-the-difference-of-two-arrays",
    "find-critical-and-pseudo-critical-edges-in-minimum-spanning-tree",
)
_COMPARISON = re.compile(r"\s*(?:def check\(candidate\):|assert candidate\(.*\) == .*|)\s*")
_SORTED = """def check(input, output, expected):
    if isinstance(output, list) and isinstance(expected, list):
        return sorted(output, key=repr) == sorted(expected, key=repr)
    return output == expected
"""

# name -> file below the folder, which of its rows
_NAMED: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "aime24": ("aime/aime24.parquet", lambda row: True),
    "aime25": ("aime/aime25.parquet", lambda row: True),
    "math500": ("math/math500.json", lambda row: True),
    "gsm8k": ("gsm8k/test.jsonl", lambda row: True),
    "humaneval": ("humaneval/HumanEval.jsonl.gz", lambda row: True),
    "mbpp": ("mbpp/mbpp.jsonl", lambda row: 11 <= row["task_id"] <= 510),  # its test split
    "leetcode": ("leetcode/LeetCodeDataset-v0.2.0-train.jsonl.gz", lambda row: True),
}
NAMES = tuple(_NAMED)


def benchmark_rows(benchmark: str, folder: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row in the field's schema) of every problem. Raises UserError: unknown, not there, a bad row."""
    if benchmark in _NAMED:
        name, wanted = _NAMED[benchmark]
        if folder is None:
            raise UserError(f"benchmark {benchmark}: say where the problem files are, --problems DIR or OR1_PROBLEMS")
        paths = [folder / name]
    elif is_hub_name(benchmark):
        paths, wanted = hub_files(benchmark, ["*test*.jsonl", "*test*.parquet", "*test*.json"]), _every
    elif is_row_file(benchmark):
        paths, wanted = [Path(benchmark)], _every
    else:
        raise UserError(
            f"benchmark {benchmark!r} is not one of {', '.join(NAMES)}, nor a .json, .jsonl or .parquet file, nor a "
            "hub id OWNER/NAME[:FILE]"
        )
    if len(folders := sorted({path.parent for path in paths})) > 1:
        above = os.path.commonpath(folders)
        names = ", ".join(os.path.relpath(folder, above) for folder in folders)
        one = f"{benchmark.partition(':')[0]}:FOLDER/PATTERN"
        raise UserError(f"benchmark {benchmark} has sets of its own in {names}; name one: {one}")
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"benchmark {benchmark}: {path} does not exist; docs/evaluation.md says where it comes from"
            )
        for place, row in sound_rows(path):
            try:
                if wanted(row):
                    yield place, {"data_source": benchmark, **problem(place, row)}
            except (LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{place}: fields of no known form ({type(error).__name__}: {error})") from None


def _every(row: dict[str, Any]) -> bool:
    return True


def problem(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """`prompt` and `reward_model` of a row, whatever its fields are called. Raises UserError."""
    if "reward_model" in row and "prompt" in row:
        prompt = row["prompt"]
        if row.get("ability", "math") == "math" and isinstance(prompt, list) and "\\boxed" not in str(prompt):
            prompt = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + INSTRUCTION}]
        return {"prompt": prompt, "reward_model": row["reward_model"]}
    if "test" in row and "entry_point" in row:
        tests = checked_function(row)
        asked = row.get("query") or (
            "Complete this Python function. Answer with the whole function in one Python code block.\n\n"
            f"```python\n{row['prompt']}\n```"
        )
        return _chat(asked, json.dumps(tests))
    if "test_list" in row and "text" in row:
        tests = {key: row[key] for key in ("test_list", "test_setup_code") if key in row}
        examples = "\n".join(row["test_list"])
        return _chat(
            f"{row['text']}\nYour code should pass these tests:\n\n```python\n{examples}\n```\n"
            "Answer with one Python code block.",
            json.dumps(tests),
        )
    question, answer = row.get("question") or row.get("problem"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str | int | float):
        raise UserError(
            f"{place}: its fields {', '.join(row)} are not known; it needs prompt and reward_model, question and "
            "answer, or code tests"
        )
    return _chat(question + INSTRUCTION, str(answer).rpartition("####")[2].strip())


def checked_function(row: dict[str, Any]) -> dict[str, Any]:
    """The tests of HumanEval and LeetCode: a check(candidate) of the function that the prompt begins.

    Where LeetCode takes the result in any order, the tests have one of them: then with a checker.
    """
    tests = {key: row[key] for key in ("prompt", "test", "entry_point")}
    asked = str(row.get("problem_description") or row.get("query") or "")
    is_free = _ANY_ORDER.search(asked) and row.get("task_id") not in _FREE_INSIDE
    if is_free and all(_COMPARISON.fullmatch(line) for line in str(row["test"]).splitlines()):
        tests["checker"] = _SORTED
    return tests


def _chat(content: str, ground_truth: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": content}], "reward_model": {"ground_truth": ground_truth}}
