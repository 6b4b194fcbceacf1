"""The written file: the project's own loader takes it as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyarrow import parquet

from or1_megatron.data.prompts import Difficulty, load_prompts
from or1_megatron.errors import UserError
from or1_megatron.prepare.tables import SCHEMA, StoredTable, TableWriter, table_of
from or1_megatron.prepare.training_file import write_training_file, written_key
from tests.tiny_models import byte_tokenizer

TESTS = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
ROWS = [
    {"uid": "a/0", "source": "a", "ability": "math", "problem": "2 + 2?", "answer": "4", "licence": "MIT",
     "origin": "a.json row 1", "info": json.dumps({"index": 0, "model_difficulty": {"7B": 3}, "level": 1})},
    {"uid": "a/1", "source": "a", "ability": "math", "problem": "é?", "answer": '["1", "2"]', "licence": "MIT",
     "origin": "a.json row 2", "info": json.dumps({"index": 1, "model_difficulty": {"7B": 9, "32B": 1}, "level": "x"})},
    {"uid": "b/0", "source": "b", "ability": "code", "problem": "Double it.", "answer": TESTS, "licence": "Apache-2.0",
     "origin": "b.json row 1", "info": json.dumps({"tags": {}, "model_difficulty": {"7B": 5}})},
]  # fmt: skip


def stored(path: Path, rows: list[dict]) -> StoredTable:
    with TableWriter(path, SCHEMA) as file:
        file.write(table_of(rows))
    return StoredTable(path)


def test_it_is_loaded_for_training_as_it_is(tmp_path: Path):
    out = tmp_path / "train.parquet"
    write_training_file(stored(tmp_path / "t", ROWS), out, "\nBox it.", "key")
    tokenizer = byte_tokenizer()
    prompts = load_prompts([str(out)], tokenizer, context_length=4096)
    assert [prompt.ground_truth for prompt in prompts] == [("4",), ("1", "2"), (TESTS,)]
    assert [prompt.data_source for prompt in prompts] == ["a", "a", "b"]
    asked = [{"role": "user", "content": "2 + 2?\nBox it."}]
    assert prompts[0].text == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert "Double it." in prompts[2].text and "Box it" not in prompts[2].text
    hard = load_prompts([str(out)], tokenizer, context_length=4096, wanted=Difficulty("7B", 4, 9))
    assert len(hard) == 2


def test_rows_are_in_the_fields_schema(tmp_path: Path):
    out = tmp_path / "train.parquet"
    write_training_file(stored(tmp_path / "t", ROWS), out, "", "key")
    rows = parquet.read_table(out).to_pylist()
    assert list(rows[0]) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "2 + 2?"}]
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": "4"}
    extra = [row["extra_info"] for row in rows]
    assert extra[0]["uid"] == "a/0" and extra[2]["licence"] == "Apache-2.0" and extra[1]["origin"] == "a.json row 2"
    assert extra[1]["model_difficulty"] == {"7B": 9, "32B": 1} and extra[2]["index"] is None
    assert [each["level"] for each in extra] == ["1", "x", None]  # not of one type: text
    assert extra[2]["tags"] == "{}"  # parquet knows no empty struct
    assert written_key(out) == "key" and written_key(tmp_path / "none") is None
    (tmp_path / "other.parquet").write_text("text")
    assert written_key(tmp_path / "other.parquet") == written_key(tmp_path / "t") == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ""}, r"row a/1 \(a.json row 2\) has no answer; drop it with a step"),
        ({"problem": ""}, "has no problem"),
        ({"info": "[1]"}, r"row a/1: info='\[1\]' is no JSON object"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(tmp_path: Path, change: dict, message: str):
    table = stored(tmp_path / "t", [ROWS[0], ROWS[1] | change])
    with pytest.raises(UserError, match=message):
        write_training_file(table, tmp_path / "train.parquet", "", "key")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_nothing_left(tmp_path: Path):
    with pytest.raises(UserError, match="no row is left"):
        write_training_file(stored(tmp_path / "t", []), tmp_path / "train.parquet", "", "key")


def test_groups_of_rows_are_bounded_by_their_tests_too(tmp_path: Path):
    """A group is in memory as a whole, and a column of more than 2 GiB cannot be written."""
    tests = json.dumps({"inputs": ["1" * 2**20], "outputs": ["2"]})
    rows = [{**ROWS[2], "uid": f"b/{number}", "answer": tests} for number in range(70)]
    out = tmp_path / "train.parquet"
    write_training_file(stored(tmp_path / "t", rows), out, "", "key")
    with parquet.ParquetFile(out) as file:
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [32, 32, 6]
