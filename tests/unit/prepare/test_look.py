"""`or1 data look`: what is shown of each kind of file, what is left out, and the keys on a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from or1_megatron.cli import main
from or1_megatron.prepare.step import SCHEMA
from or1_megatron.responses import write_responses
from or1_megatron.types import Group, Prompt, Sample


def training_file(folder: Path) -> Path:
    rows = [
        {
            "data_source": f"mine-{'even' if number % 2 == 0 else 'odd'}",
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": f"gold {number}"},
            "extra_info": {"licence": "CC0-1.0", "model_difficulty": {"A": 4 * number, "B": None}},
        }
        for number in range(5)
    ]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "train.jsonl"


def responses_file(folder: Path) -> Path:
    groups = []
    for number, verdicts in enumerate([("correct", "wrong"), ("wrong", "wrong"), ("correct", "correct")]):
        prompt = Prompt(f"p:{number}", f"<user>Question {number}?", (1, 2), ("7",), "mine")
        samples = [
            Sample(prompt, place, np.ones(9), np.zeros(9), f"It is {number}{place}.", "stop", 0, verdict)
            for place, verdict in enumerate(verdicts)
        ]
        groups.append(Group(prompt, samples))
    write_responses(folder / "step-000001.parquet", groups, step=1)
    return folder / "step-000001.parquet"


def shown(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["data", "look", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["data", "look", *map(str, words)]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1
    return error


def test_training_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = training_file(tmp_path)
    all_of_it = shown(capsys, path)
    assert "2  mine-odd  |  math  |  CC0-1.0  |  A: 75 % right" in all_of_it
    assert "\nproblem\nQuestion 4?\n\nanswer\ngold 4\n" in all_of_it
    assert re.findall(r"gold \d", shown(capsys, path, "--source", "*-even")) == ["gold 0", "gold 2", "gold 4"]
    assert re.findall(r"gold \d", shown(capsys, path, "--difficulty", "0.25:0.5")) == ["gold 2", "gold 3"]
    assert re.findall(r"gold \d", shown(capsys, path, "--difficulty", ":0.25", "--model", "A")) == ["gold 3", "gold 4"]
    assert re.findall(r"gold \d", shown(capsys, path, "--limit", 2)) == ["gold 0", "gold 1"]


def test_responses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = responses_file(tmp_path)
    assert re.findall(r"It is \d\d", shown(capsys, path, "--verdict", "wrong")) == ["It is 01", "It is 10", "It is 11"]
    half_right = shown(capsys, path, "--difficulty", "0.5:0.9")
    assert re.findall(r"It is \d\d", half_right) == ["It is 00", "It is 01"]
    assert (
        "1  mine  |  correct  |  p:0  |  step 1  |  response 0  |  9 tokens  |  of this file: 50 % right" in half_right
    )
    assert "prompt\n<user>Question 0?\n\nresponse: correct\nIt is 00.\n\nanswer\n7\n" in half_right


def test_tables_of_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    row = dict.fromkeys(SCHEMA.names, "") | {
        **{"uid": "mine/3", "source": "mine", "ability": "math", "problem": "Why\x1b[2J?", "answer": "so"},
        "info": json.dumps({"model_difficulty": {"A": 1, "B": 12}, "model_correct": {"B": [2, 8]}, "year": 1999}),
    }
    schema = pyarrow.schema([*SCHEMA, ("reason", pyarrow.string()), ("detail", pyarrow.string())])
    lost = dict.fromkeys(SCHEMA.names, "") | {"uid": "mine/4", "reason": "not_utf_8", "detail": "a.jsonl line 4"}
    kept_and_lost = [row, {**row, "reason": "duplicate", "detail": "of mine/1"}, lost]
    parquet.write_table(pyarrow.Table.from_pylist(kept_and_lost, schema=schema), tmp_path / "drops.parquet")
    text = shown(capsys, tmp_path / "drops.parquet")
    assert "1  mine  |  mine/3  |  math  |  A: 94 % right  |  B: 25 % right\n\nproblem\nWhy\u241b[2J?\n" in text
    assert "dropped: duplicate\nof mine/1\n\nproblem" in text and "info\nyear: 1999\n" in text
    assert "3  mine  |  mine/4\n\ndropped: not_utf_8\na.jsonl line 4\n" in text and "\x1b" not in text
    assert shown(capsys, tmp_path / "drops.parquet", "--reason", "dup*").count("mine/3") == 1
    error = refused(capsys, tmp_path / "drops.parquet", "--difficulty", "0:1")
    assert "drops.parquet row 1 has the difficulty for A, B; choose one with --model" in error


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = training_file(tmp_path)
    error = refused(capsys, path, "--source", "his")
    assert "none of its 5 rows is wanted; source: mine-even (3), mine-odd (2); with a difficulty: 5" in error
    for bad in ("0.5", "0.6:0.5", "x:1", "0:2"):
        assert f"--difficulty {bad}: use LOW:HIGH" in refused(capsys, path, "--difficulty", bad)
    (tmp_path / "empty.jsonl").touch()
    assert refused(capsys, tmp_path / "empty.jsonl").strip().endswith("empty.jsonl holds no row")
    assert "--limit 0: use 1 or more" in refused(capsys, path, "--limit", 0)
    assert "none.parquet does not exist" in refused(capsys, tmp_path / "none.parquet")
    (tmp_path / "other.jsonl").write_text('{"a": 1, "b": 2}\n')
    assert "line 1: its fields a, b are not known; or1 data look shows" in refused(capsys, tmp_path / "other.jsonl")
    (tmp_path / "broken.jsonl").write_text("{\n")
    assert "broken.jsonl line 1 is not JSON" in refused(capsys, tmp_path / "broken.jsonl")


def test_the_reader_of_a_pipe_may_leave(tmp_path: Path):
    path = training_file(tmp_path)
    path.write_text(path.read_text() * 1000)  # more than a pipe holds
    words = [sys.executable, "-m", "or1_megatron", "data", "look", str(path), "--limit", "5000"]
    program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout and program.stderr and program.stdout.readline().startswith(b"1  mine-even")
    program.stdout.close()
    assert program.wait(20) == 0 and program.stderr.read() == b""
    program.stderr.close()


class Terminal:
    """A program on a pseudo-terminal of 60 x 12 characters."""

    def __init__(self, *words: str):
        self._own, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 60, 0, 0))
        self.attributes = termios.tcgetattr(theirs)
        self._theirs = theirs
        environment = {**os.environ, "TERM": "xterm"} | {"COLUMNS": "60", "LINES": "12"}
        self.program = subprocess.Popen(
            [sys.executable, "-m", "or1_megatron", *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        )

    def until(self, words: str, seconds: float = 20.0) -> str:
        """All that was written up to `words`."""
        text, deadline = "", time.monotonic() + seconds
        while words not in text:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._own], [], [], left)[0], f"no {words!r} in {text!r}"
            text += os.read(self._own, 65536).decode()
        return text

    def type(self, keys: bytes) -> None:
        os.write(self._own, keys)

    def left_as_it_was(self) -> bool:
        return termios.tcgetattr(self._theirs) == self.attributes


def test_keys_on_a_terminal(tmp_path: Path):
    path = training_file(tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["prompt"][0]["content"] = "\n".join(f"line {number}" for number in range(40))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    terminal = Terminal("data", "look", str(path), "--limit", "3")
    try:
        assert "\x1b[?1049h" in terminal.until("q quit"), "not on a screen of its own"
        terminal.type(b"n")
        first = terminal.until("more lines")
        assert "line 6" in first and "line 30" not in first and "gold 0" not in first
        terminal.type(b"\x1b[6~")
        assert "line 16" in terminal.until("more lines")
        terminal.type(b"\x1b[C")
        terminal.until("gold 2")
        terminal.type(b"n")
        terminal.until("the last one")
        terminal.type(b"\x1b[D")
        terminal.until("line 3")
        terminal.type(b"g")
        terminal.until("gold 0")
        terminal.type(b"p")
        terminal.until("the first one")
        terminal.type(b"q")
        terminal.until("\x1b[?1049l")
        assert terminal.program.wait(20) == 0 and terminal.left_as_it_was()
    finally:
        terminal.program.kill()
