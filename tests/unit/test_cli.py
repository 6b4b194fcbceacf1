"""The command `or1` as a user meets it: help, exit codes, one-line errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from or1_megatron import cli
from or1_megatron.config import all_keys
from or1_megatron.errors import RunFailure, StopRequested, UserError

ROOT = Path(__file__).resolve().parents[2]


def or1(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "or1_megatron", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_help_answers_at_once_and_names_the_commands():
    started = time.monotonic()
    done = or1("--help")
    assert done.returncode == 0
    assert all(f"  {command} " in done.stdout for command in ("train", "eval", "doctor"))
    assert time.monotonic() - started < 2.0  # 0.1 s alone; importing torch takes longer than this on two busy cores


def test_help_imports_no_heavy_library():
    script = "import sys, or1_megatron.cli as c; c.build_parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "vllm", "megatron", "omegaconf", "rich"}.intersection(done.stdout.split())


def test_train_help_holds_every_key_within_100_columns():
    text = or1("train", "--help").stdout
    for key in all_keys():
        assert f"  {key.name} " in text
        for choice in key.choices:
            assert choice in text
    assert "required" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("words", [["frobnicate"], ["train", "--frobnicate"], []])
def test_argparse_mistakes_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "or1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "needs RECIPE first"),
        (["eval", "steps=3"], "needs MODEL, RUN or RECIPE first"),
        (["train", "none.yaml"], "none.yaml does not exist"),
        (["train", "--resume", "no-such-folder"], "no-such-folder does not exist"),
        (["train", "--resume", "somewhere", "recipe.yaml"], "drop 'recipe.yaml'"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("or1: error: ") and message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code", "shown"),
    [
        (UserError("bad value"), 2, "or1: error: bad value\n"),
        (RunFailure("rank 3 died", "line 1\nline 2\n"), 1, "or1: run failed: rank 3 died\n  | line 1\n  | line 2\n"),
        (StopRequested("saved step 4"), 130, "or1: stopped: saved step 4\n"),
        (KeyboardInterrupt(), 130, "or1: stopped\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"), 2, "the disk is full at runs/x; free some space"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "m/x"), 2, "or1: error: m/x: Permission denied\n"),
    ],
)
def test_each_ending_has_its_code(
    raised: BaseException,
    code: int,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def end(options: object) -> int:
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "doctor", end)
    assert cli.main(["doctor"]) == code
    assert shown in capsys.readouterr().err


def test_other_errors_are_ours_and_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    def end(options: object) -> int:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setitem(cli.COMMANDS, "doctor", end)
    with pytest.raises(PermissionError):
        cli.main(["doctor"])


def test_a_reader_that_goes_early_is_no_traceback():
    command = [sys.executable, "-m", "or1_megatron", "plan", "--paper"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reading:
        assert reading.stdout and reading.stderr
        reading.stdout.close()
        assert (reading.stderr.read(), reading.wait()) == (b"", 141)


def test_a_broken_pipe_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def end(options: object) -> int:
        raise BrokenPipeError(errno.EPIPE, "a worker's socket")

    monkeypatch.setitem(cli.COMMANDS, "doctor", end)
    with pytest.raises(BrokenPipeError, match="a worker's socket"):
        cli.main(["doctor"])
