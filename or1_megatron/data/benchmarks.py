"""Benchmarks by name: files of other projects, unchanged, as rows of the field's schema.

A benchmark is a name below, whose file lies in a folder of the user's; a file of his own; or OWNER/NAME[:FILE], a
data set on the Hugging Face hub. What a row holds is told by its fields: the schema itself (see prompts.py), question
and answer, HumanEval's and LeetCode's tests, MBPP's assertions.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from or1_megatron.errors import UserError

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."

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
    elif Path(benchmark).suffix in (".json", ".jsonl", ".parquet", ".gz"):
        paths, wanted = [Path(benchmark)], _every
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", benchmark):
        paths, wanted = _from_hub(benchmark), _every
    else:
        raise UserError(
            f"benchmark {benchmark!r} is not one of {', '.join(NAMES)}, nor a .json, .jsonl or .parquet file, nor a "
            "hub id OWNER/NAME[:FILE]"
        )
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"benchmark {benchmark}: {path} does not exist; docs/evaluation.md says where it comes from"
            )
        for number, row in enumerate(_rows(path), 1):
            place = f"{path} row {number}"
            if not isinstance(row, dict):
                raise UserError(f"{place} holds a {type(row).__name__}; it must be an object")
            if wanted(row):
                yield place, {"data_source": benchmark, **problem(place, row)}


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
        tests = {key: row[key] for key in ("prompt", "test", "entry_point")}
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


def _chat(content: str, ground_truth: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": content}], "reward_model": {"ground_truth": ground_truth}}


def _rows(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            yield from parquet.read_table(path).to_pylist()
        elif path.suffix == ".json":
            yield from json.loads(path.read_text())
        else:
            with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
                yield from (json.loads(line) for line in lines if line.strip())
    except (ValueError, OSError) as error:  # pyarrow's are ValueErrors
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _from_hub(benchmark: str) -> list[Path]:
    """The named file of a data set, or its files of the test split, in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    identity, _, name = benchmark.partition(":")
    patterns = [name] if name else ["*test*.jsonl", "*test*.parquet", "*test*.json"]
    try:
        found = Path(snapshot_download(identity, repo_type="dataset", allow_patterns=patterns))
    except (OSError, HFValidationError) as error:  # the hub's own errors and those of the network are OSErrors
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"benchmark {benchmark} could not be had from the hub ({type(error).__name__}: {reason}); on a machine "
            "without network give its file instead"
        ) from None
    paths = sorted(path for pattern in patterns for path in found.rglob(pattern))
    if not paths:
        raise UserError(f"benchmark {benchmark}: no file of it matches {' or '.join(patterns)}; use {identity}:FILE")
    return paths
