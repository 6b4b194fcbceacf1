"""Rows of other people's files: read one by one, and what is wrong with one told by its place."""

from __future__ import annotations

import codecs
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from or1_megatron.data import rows
from or1_megatron.data.benchmarks import benchmark_rows
from or1_megatron.data.rows import BadRow, hub_files, is_hub_name, origin_of, read_rows
from or1_megatron.errors import UserError


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "_CHUNK", 7)  # values and characters lie across the chunks
    wanted = [{"q": f'{"ä√]}" * number} \\ " ,', "n": number, "deep": [{"x": [1, {}]}]} for number in range(9)]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in wanted).encode()
    listed = json.dumps(wanted, ensure_ascii=False, indent=1).encode()
    for name, content in {
        "a.jsonl": lines,
        "mark.jsonl": codecs.BOM_UTF8 + lines,
        "b.json": listed,
        "mark.json": codecs.BOM_UTF8 + b"\n " + listed + b"\n",
        "values.json": lines,
    }.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    flat = [{"q": row["q"], "n": row["n"]} for row in wanted]
    parquet.write_table(pyarrow.Table.from_pylist(flat), tmp_path / "c.parquet", row_group_size=4)
    for path in sorted(tmp_path.iterdir()):
        found = list(read_rows(path))
        plain = [row for _, row in found]
        assert [row["q"] for row in plain] == [row["q"] for row in wanted], path  # type: ignore[index]
        assert [row["n"] for row in plain] == list(range(9)), path  # type: ignore[index]
        assert found[2][0] == ("line 5" if "jsonl" in path.name else "row 3")
    (tmp_path / "number.json").write_bytes(b'[12345678901234, {"a": 1}]')
    assert [place for place, row in read_rows(tmp_path / "number.json") if row == {"a": 1}] == ["row 2"]


def test_a_bad_row_is_told_and_passed_over(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": "caf\xe9"}\n{"a": \n[2]\n{"a": 3}\n')
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, {"a": "caf\xe9"}, 4, {"a": 3}]')
    assert list(read_rows(tmp_path / "a.jsonl")) == [
        ("line 1", {"a": 1}),
        ("line 2", BadRow("not UTF-8", "byte 0xe9 at 10")),
        ("line 3", BadRow("not JSON", "Expecting value: line 2 column 1 (char 7)")),
        ("line 4", BadRow("not an object", "holds a list")),
        ("line 5", {"a": 3}),
    ]
    assert list(read_rows(tmp_path / "a.json")) == [
        ("row 1", {"a": 1}),
        ("row 2", BadRow("not UTF-8", "byte 0xe9")),
        ("row 3", BadRow("not an object", "holds a int")),
        ("row 4", {"a": 3}),
    ]
    binary = pyarrow.array([b"good", b"caf\xe9", b"fine"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    parquet.write_table(pyarrow.table({"a": text}), tmp_path / "a.parquet")
    assert [row for _, row in read_rows(tmp_path / "a.parquet")] == [
        {"a": "good"},
        BadRow("not UTF-8", "byte 0xe9"),
        {"a": "fine"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "is of no known kind; use one of .json, .jsonl, .parquet"),
        ("a.json", b'[{"a": 1}, {"a": ', r"a.json cannot be read: row 2: Expecting value.*; get the file anew"),
        ("a.json", b'[{"a": 1}', r"row 2: the list is not closed"),
        ("a.json", b'{"a": 1} <html>', r"row 2: Expecting value"),
        ("a.json", b'[{"a": 1}, {"a": 2}]\n[{"a": 3}]\n', r"behind the list of 2 rows there is more"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "it is UTF-16, not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:40], "a.jsonl.gz cannot be read"),
        ("a.jsonl.gz", b'{"a": 1}', "cannot be read: Not a gzipped file"),
        ("a.parquet", b"PAR1 and then nothing of the kind", "a.parquet cannot be read"),
        ("a.parquet", b"", "a.parquet cannot be read"),
    ],
)
def test_a_file_at_fault_is_one_line(tmp_path: Path, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="does not exist"):
        list(read_rows(tmp_path / f"other-{name}"))


def test_memory_is_that_of_the_rows_not_of_the_file(tmp_path: Path):
    row = {"text": "x" * 10_000}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 3000)
    (tmp_path / "a.json").write_text(f"[{','.join([json.dumps(row)] * 3000)}]")
    for path in sorted(tmp_path.iterdir()):
        tracemalloc.start()
        assert sum(1 for _ in read_rows(path)) == 3000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 2**20 < path.stat().st_size, path


def test_names_on_the_hub_and_origins():
    assert is_hub_name("openai/gsm8k") and is_hub_name("AI-MO/NuminaMath-1.5@main:data/train-*.parquet")
    assert not is_hub_name("math/train.json") and not is_hub_name("a/b/c") and not is_hub_name("here")
    cached = Path("/cache/datasets--AI-MO--NuminaMath-1.5/snapshots/0123456789abcdef/data/train-0.parquet")
    assert origin_of(cached) == "AI-MO/NuminaMath-1.5@0123456789ab:data/train-0.parquet"
    assert origin_of(Path("here/train.jsonl")) == "here/train.jsonl"


def test_files_of_a_data_set_on_the_hub_by_their_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("main/test-0.parquet", "data/test/0.parquet", "data/train/0.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    found = [str(path.relative_to(tmp_path)) for path in hub_files("o/n", ["*test*.parquet"])]
    assert found == ["data/test/0.parquet", "main/test-0.parquet"]
    assert hub_files("o/n:main/*", ["*"]) == [tmp_path / "main/test-0.parquet"]
    with pytest.raises(UserError, match="has sets of its own in data/test, main; name one: o/n:FOLDER/PATTERN"):
        list(benchmark_rows("o/n", None))


@pytest.mark.parametrize("most", [100, 2**20])
def test_memory_of_a_parquet_file_is_that_of_the_rows_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
):
    """A row larger than that is read alone."""
    monkeypatch.setattr(rows, "_PARQUET_BYTES", most)
    wide = pyarrow.Table.from_pylist([{"text": f"{number:010000}"} for number in range(1000)])
    parquet.write_table(wide, tmp_path / "a.parquet")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(tmp_path / "a.parquet")) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
