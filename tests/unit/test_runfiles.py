"""What a cut or foreign file of a run folder is told as."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from or1_megatron.errors import UserError
from or1_megatron.runfiles import read_columns, read_metrics, read_rows, read_trace


def test_metrics_end_with_what_is_whole(tmp_path: Path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": "x\u2028y"}\n{"step": 2, "b')
    assert read_metrics(tmp_path) == [{"step": 1, "a": "x\u2028y"}]


@pytest.mark.parametrize("line", [b'{"step": 2, "re', b'{"a": 1}', b'{"step": "2"}', b"[2]", b"\xff\xfe", b""])
def test_a_line_that_is_none_is_named(line: bytes, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is no JSON object with a step; remove that line"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("text", ['{"traceEvents": [{"ph"', "[1]", "{}", '{"traceEvents": []}', '{"traceEvents": 3}'])
def test_a_trace_that_is_none(text: str, tmp_path: Path):
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(UserError, match=r"trace.json .*; copy it anew, or remove it"):
        read_trace(tmp_path / "trace.json")


def test_parquet_that_was_cut(tmp_path: Path):
    file = tmp_path / "step-000001.parquet"
    parquet.write_table(pyarrow.table({"uid": ["a", "b"], "length": [1, 2]}), file)
    assert read_columns(file, ["length"]) == {"length": [1, 2]}
    assert read_rows(file) == [{"uid": "a", "length": 1}, {"uid": "b", "length": 2}]
    with pytest.raises(UserError, match=r"step-000001.parquet cannot be read: .*nope"):
        read_columns(file, ["nope"])
    file.write_bytes(file.read_bytes()[:-20])
    for read in (read_columns, read_rows):
        with pytest.raises(
            UserError, match=r"step-000001.parquet cannot be read: .*; copy it anew, or remove it"
        ) as said:
            read(file)
        assert "\n" not in str(said.value)
