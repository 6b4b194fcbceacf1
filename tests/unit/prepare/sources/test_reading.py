"""Rows of every published schema become problems, and what is wrong with a file or a row is told."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from reference_solutions import FOLDER, verdicts

from or1_megatron.errors import UserError
from or1_megatron.prepare.sources.reading import SCHEMAS, STEPS, SourceOptions
from or1_megatron.prepare.step import SCHEMA, Drop, Row
from or1_megatron.reward.problem import Task, code_tests
from or1_megatron.reward.service import RewardService
from or1_megatron.sections import RewardConfig
from tests.unit.prepare.sources.schema_rows import PRINT_SUM, ROWS, STDIN

SOURCES = {step.name: step for step in STEPS}


def read(schema: str, *paths: Path | str, **options: Any) -> tuple[list[Row], list[tuple[str, Drop]]]:
    chosen = SourceOptions(tuple(str(path) for path in paths), **options)
    step = SOURCES[schema]
    found = list(step.read(chosen, step.files(chosen)))
    return [row for row in found if isinstance(row, dict)], [drop for drop in found if isinstance(drop, tuple)]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize("case", ROWS)
def test_a_row_of_each_schema(case: str, tmp_path: Path):
    schema, given, wanted = ROWS[case]
    path = write(tmp_path / "rows.jsonl", given)
    ((row,), drops) = read(schema, path)
    assert not drops and list(row) == SCHEMA.names
    assert row["problem"].startswith("What is 2+3?") or schema == "humaneval"
    assert "\\boxed" not in row["problem"]
    assert row["licence"] == SCHEMAS[schema].licence or "licence" in wanted
    assert row["origin"] == f"{path} line 1"
    assert {"source": schema, **row, "info": json.loads(row["info"])} | wanted == {
        **row,
        "info": json.loads(row["info"]),
    }
    pyarrow.Table.from_pylist([row], schema=SCHEMA)
    tests = code_tests((row["answer"],), row["source"])
    assert (tests is not None) == (row["ability"] == "code")
    if schema != "skywork_or1":  # the same row from parquet, whose empty lists and structs have types of their own
        flat = {name: value for name, value in given.items() if value not in ([], {})}
        parquet.write_table(pyarrow.Table.from_pylist([flat]), tmp_path / "rows.parquet")
        assert read(schema, tmp_path / "rows.parquet")[0][0]["answer"] == row["answer"]


def test_the_tests_accept_the_reference_solution_and_no_other(tmp_path: Path):
    cases = [case for case in ROWS if ROWS[case][0] in ("leetcode", "taco", "apps", "mbpp", "humaneval")]
    rows = [read(ROWS[case][0], write(tmp_path / "rows.jsonl", ROWS[case][1]))[0][0] for case in cases]
    codes = [code for row in rows for code in (row["solution"], row["solution"].replace("+", "-"))]
    golds = [row["answer"] for row in rows for _ in range(2)]
    with RewardService(RewardConfig(num_workers=1)) as service:
        tasks = [Task(f"```python\n{code}\n```", (gold,)) for code, gold in zip(codes, golds, strict=True)]
        assert [verdict.name for verdict in verdicts(service, tasks)] == ["correct", "wrong"] * len(cases)


# (schema, row, reason, words of the detail)
DROPPED = {
    "no gold": ("gsm8k", {"question": "Why?", "answer": "Because."}, "no_answer", "nothing behind ####"),
    "empty gold": ("math", {"problem": "Why?", "answer": None}, "no_answer", "answer is None"),
    "a proof": ("numinamath", {**ROWS["NuminaMath-1.5"][1], "answer": "Proof"}, "no_answer", "answer is 'Proof'"),
    "no box": ("math", {"problem": "?", "level": "Level 1", "solution": "It is clear."}, "no_answer", "in a box"),
    "no question": ("still3", {"question": " ", "answer": "5"}, "no_problem_text", "question is ' '"),
    "no chat": ("skywork_or1", {"prompt": [], "reward_model": {"ground_truth": "5"}}, "no_problem_text", "None"),
    "null reward_model": ("skywork_or1", {"prompt": "2+3", "reward_model": None}, "no_answer", "is None"),
    "empty list": ("skywork_or1", {"prompt": "2+3", "reward_model": {"ground_truth": "[]"}}, "no_answer", "is ''"),
    "no_tests": ("apps", {"question": "?", "input_output": ""}, "no_tests", "input_output is empty"),
    "empty tests": ("taco", {"question": "?", "input_output": '{"inputs": [], "outputs": []}'}, "no_tests", "empty"),
    "odd tests": (
        "taco",
        {"question": "?", "input_output": '{"inputs": [1, 2], "outputs": [1]}'},
        "tests_unreadable",
        "2 inputs but 1 outputs",
    ),
    "torn tests": ("taco", {"question": "?", "input_output": '{"inputs": ['}, "tests_unreadable", "Expecting value"),
    "huge number": (
        "taco",
        {"question": "?", "input_output": '{"inputs": [%s], "outputs": [1]}' % ("9" * 5000)},
        "tests_unreadable",
        "Exceeds the limit",
    ),
    "other fields": ("gsm8k", {"question": "Why?", "text": "Because."}, "fields_missing", "found question, text"),
    "lone surrogate": ("math", {"problem": "a \ud83d b", "answer": "5"}, "not_utf_8", "problem holds U+D83D"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_a_row_that_is_no_problem_is_counted(case: str, tmp_path: Path):
    schema, bad, reason, words = DROPPED[case]
    good = next(row for name, row, _ in ROWS.values() if name == schema)
    rows, drops = read(schema, write(tmp_path / "rows.jsonl", good, bad))
    ((uid, drop),) = drops
    assert len(rows) == 1 and uid == f"{schema}/2" and drop.reason == reason
    assert drop.detail.startswith(f"{tmp_path}/rows.jsonl line 2: ") and words in drop.detail


def test_bad_encoding_and_repeated_ids(tmp_path: Path):
    first = {"problem": "1?", "answer": "1", "unique_id": "one"}
    lines = [json.dumps(first).encode(), b'{"problem": "caf\xe9?", "answer": "2"}', b"{", json.dumps(first).encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    (tmp_path / "b.jsonl").write_bytes(json.dumps({**first, "unique_id": "two", "problem": "2?"}).encode())
    rows, drops = read("math", tmp_path / "*.jsonl", name="mine", licence="CC0-1.0")
    assert [(row["uid"], row["source"], row["licence"]) for row in rows] == [
        ("mine/1", "mine", "CC0-1.0"),
        ("mine/5", "mine", "CC0-1.0"),
    ]
    assert [(uid, drop.reason) for uid, drop in drops] == [
        ("mine/2", "not_utf_8"),
        ("mine/3", "not_json"),
        ("mine/4", "duplicate_id"),
    ]
    assert drops[0][1].detail == f"{tmp_path}/a.jsonl line 2: byte 0xe9 at 16"
    assert drops[2][1].detail == f"{tmp_path}/a.jsonl line 4: one is also at {tmp_path}/a.jsonl line 1"


def test_subsets(tmp_path: Path):
    rows = [{**ROWS["NuminaMath-1.5"][1], "source": name} for name in ("olympiads", "cn_k12", "aops_forum", "cn_k12")]
    path = write(tmp_path / "a.jsonl", *rows)
    kept, drops = read("numinamath", path, subsets=("olympiads", "aops_forum"))
    assert [row["uid"] for row in kept] == ["numinamath/1", "numinamath/3"]
    assert [(uid, drop.reason) for uid, drop in drops] == [
        ("numinamath/2", "other_subset"),
        ("numinamath/4", "other_subset"),
    ]
    with pytest.raises(UserError, match="no row is of subset olympaids; there are aops_forum, cn_k12, olympiads"):
        read("numinamath", path, subsets=("olympaids", "cn_k12"))


def test_files_at_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OR1_PROBLEMS", raising=False)
    path = write(tmp_path / "a.jsonl", {"prompt": "2+3", "reward_model": {"ground_truth": "5"}})
    fields = (
        r"the fields of .*a.jsonl do not fit: found prompt, reward_model; expected question, answer; use source aime"
    )
    with pytest.raises(UserError, match=fields + " or skywork_or1"):
        read("gsm8k", path)
    with pytest.raises(UserError, match=r"found a; expected problem, answer, or problem, solution, level; give a file"):
        read("math", write(tmp_path / "b.jsonl", {"a": 1}))
    html = tmp_path / "c.jsonl"
    html.write_text("<html>\n")
    with pytest.raises(UserError, match=r"c.jsonl holds no row that can be read: line 1 is not JSON: .*; get the file"):
        read("math", html)
    with pytest.raises(UserError, match=r"d.jsonl is empty"):
        read("math", write(tmp_path / "d.jsonl"))
    with pytest.raises(UserError, match=r"none.jsonl is not here, and OR1_PROBLEMS is not set; give a file, a folder"):
        read("math", "none.jsonl")
    with pytest.raises(UserError, match=r"source math: files names .*a.jsonl twice"):
        read("math", path, tmp_path / "a*.jsonl")
    with pytest.raises(UserError, match=r"source aime: give files=\[...\]; it comes from agentica-project/deepscaler"):
        read("aime")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for files in ([], ["openai/gsm8k:main/train-*"]):
        with pytest.raises(UserError, match=r"data set openai/gsm8k could not be had from the hub .* give its file"):
            read("gsm8k", *files)


def test_a_set_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = tmp_path / "datasets--openai--gsm8k" / "snapshots" / commit
    for name in ("main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist([ROWS["GSM8K"][1] | {"question": name}]), folder / name)
    (tmp_path / "datasets--openai--gsm8k" / "refs").mkdir()
    (tmp_path / "datasets--openai--gsm8k" / "refs" / "main").write_text(commit)
    for files, names in {
        (): ["main/train-0.parquet"],
        ("openai/gsm8k",): ["main/train-0.parquet", "socratic/train-0.parquet"],
        (f"openai/gsm8k@{commit}:main/*.parquet",): ["main/test-0.parquet", "main/train-0.parquet"],
    }.items():
        rows, _ = read("gsm8k", *files)
        assert [row["problem"] for row in rows] == names
        assert [row["origin"] for row in rows] == [f"openai/gsm8k@0123456789ab:{name} row 1" for name in names]
    with pytest.raises(
        UserError, match=r"data set openai/gsm8k: no file of it matches none\*.parquet; use openai/gsm8k:"
    ):
        read("gsm8k", "openai/gsm8k:none*.parquet")


def test_folders_of_apps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OR1_PROBLEMS", str(tmp_path))
    for number, question in enumerate([b"What is 2+3?", b"caf\xe9", b"No tests."]):
        folder = tmp_path / "train" / f"{number:04}"
        folder.mkdir(parents=True)
        (folder / "question.txt").write_bytes(question)
        (folder / "metadata.json").write_text('{"difficulty": "interview"}')
        if number < 2:
            (folder / "input_output.json").write_text(json.dumps(STDIN))
            (folder / "solutions.json").write_text(json.dumps([PRINT_SUM]))
    step, options = SOURCES["apps"], SourceOptions(files=("train",))
    assert len(step.files(options)) == 10  # all that is read, since it all decides what comes out
    ((row,), drops) = read("apps", "train")
    assert (row["uid"], row["origin"], row["solution"]) == ("apps/1", "train/0000", PRINT_SUM)
    assert [(uid, drop.reason, drop.detail) for uid, drop in drops] == [
        ("apps/2", "not_utf_8", "train/0001: byte 0xe9"),
        ("apps/3", "no_tests", "train/0002: input_output is empty"),
    ]


REAL = {  # files below FOLDER -> schema, rows, drops
    "gsm8k/train.jsonl": ("gsm8k", 7473, {}),
    "math/train_math.json": ("math", 7470, {"no_answer": 4}),
    "math/math500.json": ("math", 500, {}),
    "aime/train_aime.json": ("aime", 975, {}),
    "aime/*.parquet": ("aime", 60, {}),
    "leetcode/*train.jsonl.gz": ("leetcode", 1890, {}),
    "mbpp": ("mbpp", 974, {}),
    "humaneval": ("humaneval", 164, {}),
    "apps_sample": ("apps", 5, {}),
}


@pytest.mark.parametrize("files", REAL)
def test_real_files(files: str):
    schema, count, dropped = REAL[files]
    if not FOLDER.is_dir():
        pytest.skip("the problem files are not on this machine")
    rows, drops = read(schema, FOLDER / files)
    assert (len(rows), Counter(drop.reason for _, drop in drops)) == (count, dropped)
    assert len({row["uid"] for row in rows}) == count
    pyarrow.Table.from_pylist(rows, schema=SCHEMA)
    for row in rows:
        tests = code_tests.__wrapped__((row["answer"],), row["source"])
        assert (tests is None) == (row["ability"] == "math")
        assert tests is None or (tests.count and row["solution"]), row["origin"]
