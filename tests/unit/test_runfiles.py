"""What a cut or foreign file of a run folder is told as."""

from __future__ import annotations

import fcntl
import json
import threading
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from or1_megatron.errors import UserError
from or1_megatron.runfiles import driver_of, read_columns, read_metrics, read_rows, read_trace
from or1_megatron.runfolder import RunFolder


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


def test_who_drives_is_asked_without_taking_the_lock(tmp_path: Path):
    assert driver_of(tmp_path) is None
    lock = tmp_path / "driver.lock"
    lock.write_text(json.dumps(["node3", 5, "71"]))
    assert driver_of(tmp_path) is None, "what is left of one that has ended"
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert driver_of(tmp_path) is None, "another that asks"
        fcntl.flock(file, fcntl.LOCK_EX)
        assert str(driver_of(tmp_path)) == "process 5 on node3 of job 71"


def test_a_driver_that_begins_while_one_asks_is_not_refused(tmp_path: Path):
    """The lock names this host's driver of before, as after any stop and resume."""
    run = RunFolder(tmp_path, None)  # type: ignore[arg-type]
    with run.driven():
        pass
    with (tmp_path / "driver.lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (asking, fcntl.LOCK_UN)).start()
        with run.driven():
            pass
