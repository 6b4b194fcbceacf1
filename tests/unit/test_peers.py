"""`or1 verify --compare`: the table of the comparison, verifiers that are locked down, and killed when they hang."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from or1_megatron import cli, peers, verify
from or1_megatron.peers import Column, Killable
from or1_megatron.reward import isolation
from or1_megatron.reward.named import NAMED
from or1_megatron.reward.problem import Task
from or1_megatron.verify import Row
from tests.unit.judged_rows import ROWS, write


def test_other_verifiers_get_no_reasoning(tmp_path: Path) -> None:
    rows = [{"response": "\\boxed{8}", "ground_truth": "8", "prompt": prompt} for prompt in ("<think>", "8 = ?")]
    found = verify.read_rows(Path(write(tmp_path / "rows.jsonl", rows)))
    assert [peers._answer_part(row) for row in found] == ["", "\\boxed{8}"]


def test_half_a_character_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A surrogate on its own, as a tokenizer that is cut leaves it."""
    file = write(
        tmp_path / "rows.jsonl",
        [
            {"response": "\ud83d \\boxed{0.333}", "ground_truth": "\\frac{1}{3}"},
            {"response": "\ud83d \\boxed{1\\text{ m}}", "ground_truth": "1\\text{ km}"},
        ],
    )
    assert cli.main(["verify", file, "--compare", "--peers", str(tmp_path / "none"), "--workers", "1"]) == 0
    assert "answer \\ud83d \\boxed{1" in capsys.readouterr().out


def test_table_and_disagreements() -> None:
    rows = [Row(Task(str(i), ("7",)), i < 2, i % 2) for i in range(4)]
    truth = [True, True, False, False]
    columns = [
        Column("a", ["correct", "wrong", "correct", "wrong"], 1.0),
        Column("b", ["correct", "timeout", "correct", "error"], 1.0),
    ]
    assert peers.errors(columns[0], rows, truth) == (1, 1, 0)
    assert peers.errors(columns[1], rows, truth) == (1, 0, 2)
    assert peers.errors(columns[0], rows, truth, 1) == (0, 1, 0)
    head, a, b = peers.table(columns, rows, truth).splitlines()[1:]
    assert head.split()[-4:] == ["level", "0", "level", "1"]
    assert a.split() == ["a", "1", "1", "0", "1.0", "1+0", "0+1"]
    assert b.split() == ["b", "1", "0", "2", "1.0", "1+0", "0+0"]
    columns[1].answers[0] = "wrong"
    found = peers.disagreements(columns, rows, 20)
    assert found.startswith("1 disagreements") and "accepted by a" in found


def test_comparison_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "plot.png"
    words = ["verify", file, "--compare", "--peers", str(tmp_path / "none"), "--workers", "1", "--plot", str(plot)]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    for name, known in NAMED.items():
        assert (f"{name}: not here; or1 verify --compare --install, or pip install" in text) == bool(known.packages)
    rows = {line.split()[0]: line.split() for line in text.splitlines() if "+" in line}
    assert rows["or1"][1:4] == ["0", "0", "0"] and rows["Math-Verify"][2:5] == ["1", "0", "0"]
    assert plot.stat().st_size > 5000


EVAL = """
import sys
from pathlib import Path
from or1_megatron.reward import named

named.NAMED["eval"] = named.Named(lambda folder: lambda response, gold: bool(eval(response)))
named.main("eval", Path(sys.argv[1]))
"""


@pytest.mark.skipif(not isolation.landlock_version(), reason="the kernel has no landlock")
@pytest.mark.parametrize(
    "attack",
    ["open('SECRET').read()", "open('NEW', 'w')", "__import__('os').fork() + 1", "__import__('socket').socket()"],
)
def test_a_verifier_that_evaluates_answers_reaches_nothing(tmp_path: Path, attack: str) -> None:
    (tmp_path / "secret").write_text("sings")
    attack = attack.replace("SECRET", str(tmp_path / "secret")).replace("NEW", str(tmp_path / "new"))
    tasks = [
        {"response": response, "ground_truth": ["1"]} for response in ("__import__('fractions').Fraction(1)", attack)
    ]
    done = subprocess.run(
        [sys.executable, "-c", EVAL, str(tmp_path)], input="\n".join(map(json.dumps, tasks)),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers[:2] == [{"ready": True}, {"correct": True}], done.stderr
    assert not any("correct" in answer for answer in answers[2:])  # an error, or killed
    assert not (tmp_path / "new").exists()


def test_a_stuck_verifier_is_killed_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "DEADLINE_S", 1.0)
    process = Killable("Math-Verify 0.9", tmp_path)
    try:
        assert process.ask("\\boxed{8}", ("8",)) == "correct"
        assert process._process
        first = process._process.pid
        assert process.ask("\\boxed{9^{9^{9^{9}}}}", ("8",)) == "timeout"
        assert not psutil.pid_exists(first)
        assert process.ask("\\boxed{7}", ("8",)) == "wrong"
    finally:
        process.close()
