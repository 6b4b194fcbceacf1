"""`or1 verify` as a user meets it: scores, judgements, bad rows and options."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from or1_megatron import cli, peers, verify
from or1_megatron.reward.named import NAMED
from or1_megatron.sections import RewardConfig
from tests.unit.judged_rows import ROWS, write

CODE = {"response": "```python\nprint(1)\n```", "ground_truth": '{"inputs": [""], "outputs": ["1"]}'}


def test_scores_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path / "rows.jsonl", [*ROWS, CODE]), tmp_path / "out.jsonl"
    assert cli.main(["verify", file, "--out", str(out), "--workers", "1", "--require-isolation", "rlimits"]) == 0
    names = [json.loads(line)["verdict"] for line in out.read_text().splitlines()]
    assert names == ["correct", "wrong", "correct", "unparsable", "wrong", "correct"]
    text = capsys.readouterr().out
    assert "isolation of tested code: " in text
    assert "against 5 judgements by hand: 0 wrong answers accepted, 0 right ones refused" in text


BROKEN = [
    {"response": "```python\nprint(1)\n```", "ground_truth": '{"inputs": [""], "outputs": []}'},
    {"response": "4", "ground_truth": "4", "data_source": "apps"},
]


def test_broken_tests_are_the_verdict_of_their_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path / "rows.jsonl", [ROWS[0], *BROKEN, CODE]), tmp_path / "out.jsonl"
    assert cli.main(["verify", file, "--out", str(out), "--workers", "1", "--require-isolation", "rlimits"]) == 0
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    broken = "infrastructure_error"
    assert [verdict["verdict"] for verdict in verdicts] == ["correct", broken, broken, "correct"]
    assert verdicts[1]["detail"] == "the tests of this problem are at fault: 1 inputs but 0 outputs; drop the problem"
    assert f"tests that cannot be used: 2 of 4 rows; {file} line 2: 1 inputs but 0 " in capsys.readouterr().out


def test_nothing_but_broken_tests_needs_no_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "reached_isolation", None)
    verdicts, _ = verify.score_rows(verify.read_rows(Path(write(tmp_path / "a.jsonl", BROKEN))), RewardConfig())
    assert [verdict.failed for verdict in verdicts] == [True, True]


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
        (
            "f.jsonl",
            '{"response": "x", "ground_truth": "1", "truncated": "no"}',
            "`truncated` is 'no'; it must be true",
        ),
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
    for module in (verify, peers):
        monkeypatch.setattr(module, "RewardService", None)
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
    monkeypatch.setattr(peers, "NAMED", {"theirs": NAMED["MATH rules"]})
    monkeypatch.setattr(peers.Killable, "__init__", lambda *_: None)
    monkeypatch.setattr(peers.Killable, "ask", lambda *_: time.sleep(0.1) or "correct")
    monkeypatch.setattr(peers.Killable, "close", lambda *_: None)
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


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "x", "--workers", "0"]) == 2
    assert cli.main(["verify", "x", "--require-isolation", "total"]) == 2
    assert "use one of rlimits, partial, full, namespaces" in capsys.readouterr().err
    for words in (["--plot", "p.png"], ["--install"], ["--peers", "p"], ["--compare", "--out", "c.jsonl"]):
        assert cli.main(["verify", "x", *words]) == 2
        said = capsys.readouterr().err
        assert "--compare" in said and "does not exist" not in said
    assert cli.main(["eval", "--rescore", "x", "--n", "3"]) == 2
    assert "drop the other words and options" in capsys.readouterr().err
