"""`or1 verify` as a user meets it: scores, judgements, bad rows, the table of the comparison, killable verifiers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from or1_megatron import cli, verify
from or1_megatron.reward import isolation
from or1_megatron.reward.named import NAMED
from or1_megatron.reward.problem import Task
from or1_megatron.verify import Column, Killable, Row

ROWS = [
    {"response": "<think>9</think>\\boxed{8}", "ground_truth": "8", "correct": True, "difficulty": 0},
    {"response": "\\boxed{7}", "ground_truth": ["8", "9"], "correct": False, "difficulty": 3},
    {"response": "\\boxed{\\frac{2}{4}}", "reward_model": {"ground_truth": "0.5"}, "correct": True, "difficulty": 3},
    {"response": "none", "ground_truth": 8, "correct": False, "difficulty": 3},
    {"response": "\\boxed{1\\text{ m}}", "ground_truth": "1\\text{ km}", "correct": False, "difficulty": 8},
]
CODE = {"response": "```python\nprint(1)\n```", "ground_truth": '{"inputs": [""], "outputs": ["1"]}'}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_scores_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path / "rows.jsonl", [*ROWS, CODE]), tmp_path / "out.jsonl"
    assert cli.main(["verify", file, "--out", str(out), "--workers", "1", "--require-isolation", "rlimits"]) == 0
    names = [json.loads(line)["verdict"] for line in out.read_text().splitlines()]
    assert names == ["correct", "wrong", "correct", "unparsable", "wrong", "correct"]
    text = capsys.readouterr().out
    assert "isolation of tested code: " in text
    assert "against 5 judgements by hand: 0 wrong answers accepted, 0 right ones refused" in text


def test_parquet_is_read_like_lines(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{**row, "ground_truth": "8"} for row in ROWS]), tmp_path / "rows.parquet")
    rows = verify.read_rows(tmp_path / "rows.parquet")
    assert [(row.task.response, row.correct, row.difficulty) for row in rows] == [
        (row["response"], row["correct"], row["difficulty"]) for row in ROWS
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("empty.jsonl", "\n", "holds no response"),
        ("a.jsonl", '{"response": "x", "ground_truth": "1"}\n{"respons', " line 2 is not JSON: "),
        ("b.jsonl", '{"text": "x"}', " line 1: no text under `response`"),
        ("c.jsonl", '{"response": "x"}', " line 1: `ground_truth` is None"),
        ("d.jsonl", '{"response": "x", "ground_truth": {}}', " line 1: `ground_truth` is {}"),
        ("e.parquet", "x", "e.parquet cannot be read: "),
        ("f.jsonl", '{"response": "x", "ground_truth": "1", "correct": "false"}', "`correct` is 'false'; it must be "),
        ("g.jsonl", '{"response": "x", "ground_truth": "1", "difficulty": [1]}', "`difficulty` is [1]; it must be "),
        (
            "h.jsonl",
            '{"response": "x", "ground_truth": "1", "difficulty": 1}\n'
            '{"response": "x", "ground_truth": "1", "difficulty": "hard"}',
            "`difficulty` is a number in some rows and text in others",
        ),
    ],
)
def test_bad_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert cli.main(["verify", str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "place", "words"),
    [
        ("--out", "rows.jsonl", "--out {} exists; choose another"),
        ("--out", "shut/x.jsonl", "--out {}: you may not write in "),
        ("--plot", "old.png", "--plot {} exists; choose another"),
        ("--out", "folder", "--out {} is a folder; give a file"),
        ("--out", "file/x", "--out {}: its folder cannot be made"),
        ("--plot", "folder", "--plot {}: use .png, .svg or .pdf"),
        ("--plot", "folder.png", "--plot {} is a folder; give a file"),
        ("--plot", "file/x.png", "--plot {}: its folder cannot be made"),
        ("--plot", "x.foo", "--plot {}: use .png, .svg or .pdf"),
    ],
)
def test_places_are_refused_before_anything_is_scored(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    place: str,
    words: str,
) -> None:
    monkeypatch.setattr(verify, "RewardService", None)
    file = write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(verify.os, "access", lambda path, *_, **__: path != tmp_path / "shut")  # root may do anything
    for name in ("file", "old.png"):
        (tmp_path / name).touch()
    for folder in ("folder", "folder.png", "shut"):
        (tmp_path / folder).mkdir()
    before = sorted(tmp_path.iterdir())
    compare = ["--compare"] if option == "--plot" else []
    assert cli.main(["verify", file, option, str(tmp_path / place), *compare]) == 2
    assert words.format(tmp_path / place) in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("compared", [False, True])
def test_how_many_are_done_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, compared: bool
) -> None:
    monkeypatch.setattr(verify, "HEARTBEAT_S", 0.02)
    (tmp_path / NAMED["MATH rules"].folder).mkdir()
    monkeypatch.setattr(verify, "NAMED", {"theirs": NAMED["MATH rules"]})
    monkeypatch.setattr(Killable, "__init__", lambda *_: None)
    monkeypatch.setattr(Killable, "ask", lambda *_: time.sleep(0.1) or "correct")
    monkeypatch.setattr(Killable, "close", lambda *_: None)
    file = write(tmp_path / "rows.jsonl", ROWS)
    words = ["--compare", "--peers", str(tmp_path)] if compared else []
    assert cli.main(["verify", file, "--workers", "1", *words]) == 0
    said = capsys.readouterr().err
    assert " of 5 rows done after " in said and "or1: 0 of 5" in said
    assert ("theirs: 3 of 5 rows done" in said) == compared


def test_folders_are_made(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    assert cli.main(["verify", file, "--out", str(tmp_path / "a" / "b" / "out.jsonl"), "--workers", "1"]) == 0
    plot = tmp_path / "c" / "plot.svg"
    words = ["verify", file, "--compare", "--peers", str(tmp_path / "none"), "--workers", "1", "--plot", str(plot)]
    assert cli.main(words) == 0
    assert plot.stat().st_size > 5000


def test_other_verifiers_get_no_reasoning(tmp_path: Path) -> None:
    rows = [{"response": "\\boxed{8}", "ground_truth": "8", "prompt": prompt} for prompt in ("<think>", "8 = ?")]
    found = verify.read_rows(Path(write(tmp_path / "rows.jsonl", rows)))
    assert [verify._answer_part(row) for row in found] == ["", "\\boxed{8}"]


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


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "x", "--workers", "0"]) == 2
    assert cli.main(["verify", "x", "--require-isolation", "total"]) == 2
    assert "use one of rlimits, partial, full, namespaces" in capsys.readouterr().err
    for words in (["--plot", "p.png"], ["--install"], ["--compare", "--out", "c.jsonl"]):
        assert cli.main(["verify", "x", *words]) == 2
        said = capsys.readouterr().err
        assert "--compare" in said and "does not exist" not in said
    assert cli.main(["eval", "--rescore", "x", "--n", "3"]) == 2
    assert "drop the other words and options" in capsys.readouterr().err


def test_table_and_disagreements() -> None:
    rows = [Row(Task(str(i), ("7",)), i < 2, i % 2) for i in range(4)]
    truth = [True, True, False, False]
    columns = [
        Column("a", ["correct", "wrong", "correct", "wrong"], 1.0),
        Column("b", ["correct", "timeout", "correct", "error"], 1.0),
    ]
    assert verify.errors(columns[0], rows, truth) == (1, 1, 0)
    assert verify.errors(columns[1], rows, truth) == (1, 0, 2)
    assert verify.errors(columns[0], rows, truth, 1) == (0, 1, 0)
    head, a, b = verify.table(columns, rows, truth).splitlines()[1:]
    assert head.split()[-4:] == ["level", "0", "level", "1"]
    assert a.split() == ["a", "1", "1", "0", "1.0", "1+0", "0+1"]
    assert b.split() == ["b", "1", "0", "2", "1.0", "1+0", "0+0"]
    columns[1].answers[0] = "wrong"
    found = verify.disagreements(columns, rows, 20)
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
    monkeypatch.setattr(verify, "DEADLINE_S", 1.0)
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
