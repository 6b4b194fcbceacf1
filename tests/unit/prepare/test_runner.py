"""Whole pipelines: the same bytes for any number of workers, what is counted, and when a step is run again."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from or1_megatron import cli
from or1_megatron.errors import UserError
from or1_megatron.prepare.catalog import CATALOG
from or1_megatron.prepare.pool import LOST
from or1_megatron.prepare.recipe import load
from or1_megatron.prepare.runner import Report, prepare
from tests.unit.prepare import odd_steps
from tests.unit.prepare.odd_steps import NUM_ROWS, ROOT, outcome


def by_name(reports: list[Report]) -> dict[str, Report]:
    return {report.name: report for report in reports}


def test_counts_reasons_and_the_dropped_rows_themselves(recipe: Path, capsys: pytest.CaptureFixture[str]):
    reports = by_name(prepare(load(recipe)))
    sampled = parquet.read_table(reports["some"].folder / "rows.parquet")["answer"].to_pylist()
    left = sum(not answer.endswith("3") for answer in sampled)
    assert [reports[name].outcome.rows_out for name in reports] == [3000, 2700, 2400, left]
    assert reports["slow"].outcome.drops == {"seven": 300} and reports["some"].outcome.drops == {"not_sampled": 300}
    drops = parquet.read_table(reports["slow"].folder / "drops.parquet").to_pylist()
    assert len(drops) == 300 and {row["reason"] for row in drops} == {"seven"}
    assert drops[1]["uid"] == "s/17" and drops[1]["detail"] == "17" and drops[1]["problem"].endswith(" 17?")
    threes = parquet.read_table(reports["threes"].folder / "drops.parquet")
    assert set(threes["reason"].to_pylist()) == {"three"} and threes["solution"][0].as_py().startswith("by ")
    shown = capsys.readouterr().out
    assert "2,700" in shown and "not_sampled" in shown and f"train.parquet: {left:,} problems" in shown
    kept = [row["uid"] for row in parquet.read_table(reports["slow"].folder / "rows.parquet").to_pylist()]
    assert kept == [f"s/{i}" for i in range(NUM_ROWS) if i % 10 != 7]


def test_the_bytes_do_not_depend_on_the_workers_or_the_cut(recipe: Path, tmp_path: Path, monkeypatch):
    prepare(load(recipe))
    prepare(
        load(recipe, ["workers=3", f"cache={tmp_path / 'cache3'}", f"write.path={tmp_path / 'o3' / 'train.parquet'}"])
    )
    assert outcome(tmp_path / "cache") == outcome(tmp_path / "cache3")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "o3")
    other = ["seed=1", f"write.path={tmp_path / 'o4' / 'train.parquet'}"]
    reports = by_name(prepare(load(recipe, other)))
    assert reports["slow"].cached and not reports["some"].cached  # the seed is the table steps' alone
    assert outcome(tmp_path / "out") != outcome(tmp_path / "o4")


def test_an_estimate_ends_well_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    votes = "{do: quality_votes, models: [foo], endpoints: ['ENDPOINT'], estimate_only: true}"
    text = recipe.read_text().replace("{do: slow_table}", votes)
    recipe.write_text(text.replace("ENDPOINT", "localhost:9"))
    assert cli.main(["prepare", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("or1: error: steps.threes: endpoint 'localhost:9' is no http://") and error.count("\n") == 1
    recipe.write_text(text.replace("ENDPOINT", "http://127.0.0.1:9/v1"))
    assert cli.main(["prepare", str(recipe), "--card"]) == 0
    said = capsys.readouterr().err
    assert "quality_votes: 2400 problems x 1 judges x 16 votes; 0 of 38400 votes are there" in said
    assert "nothing is written; estimate_only=false votes" in said and not (tmp_path / "out").exists()


def test_a_card_replaces_itself_only(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page, picture = tmp_path / "out" / "train.md", tmp_path / "out" / "train-lengths.png"
    page.parent.mkdir()
    for file in (page, picture):
        file.write_text("precious")
        assert cli.main(["prepare", str(recipe), "--card"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"or1: error: {file} exists with other content; ") and "--overwrite" in error
        assert file.read_text() == "precious" and not (tmp_path / "cache").exists()
        file.unlink()
    for _ in range(2):
        assert cli.main(["prepare", str(recipe), "--card"]) == 0
    assert page.read_text().startswith("# ") and picture.stat().st_size > 1000
    other = [str(recipe), "--card", "seed=1"]
    assert cli.main(["prepare", *other]) == 2
    assert cli.main(["prepare", *other, "--overwrite"]) == 0


def test_a_step_is_run_again_when_what_it_depends_on_changes(recipe: Path, tmp_path: Path, monkeypatch):
    prepare(load(recipe))
    assert all(report.cached for report in prepare(load(recipe)))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"uid": "s/new", "source": "s", "ability": "math", "problem": "?", "answer": "1"}\n')
    reports = prepare(load(recipe, ["write.overwrite=true"]))
    assert not any(report.cached for report in reports) and reports[0].outcome.rows_out == NUM_ROWS + 1
    monkeypatch.setitem(CATALOG, "sample", dataclasses.replace(CATALOG["sample"], version=2))
    cached = {report.name: report.cached for report in prepare(load(recipe, ["write.overwrite=true"]))}
    assert cached == {"all": True, "slow": True, "some": False, "threes": False}


def test_of_two_at_one_step_the_second_is_refused(recipe: Path, tmp_path: Path):
    recipe.write_text(recipe.read_text().replace("{do: slow}", "{do: slow, seconds: 0.002}"))
    words = [sys.executable, "-m", "tests.unit.prepare.odd_steps", str(recipe)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        while not list((tmp_path / "cache").glob(".slow-*")):
            time.sleep(0.01)
        with pytest.raises(UserError, match=r"step slow: another process is at it in .*\.slow-\w+.partial"):
            prepare(load(recipe))
        first.kill()


def test_a_file_of_other_content_is_not_replaced_unless_asked(recipe: Path, tmp_path: Path, capsys):
    recipe.write_text(recipe.read_text().replace("{do: sample,", "{do: sample, from: all,"))
    assert cli.main(["prepare", str(recipe)]) == 0
    assert cli.main(["prepare", str(recipe)]) == 0
    assert "problems already" in capsys.readouterr().out
    before = outcome(tmp_path / "out")
    assert cli.main(["prepare", str(recipe), "steps.some.rows=10"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "exists with other content" in error and "--overwrite" in error
    assert outcome(tmp_path / "out") == before
    assert cli.main(["prepare", str(recipe), "--overwrite", "steps.some.rows=10"]) == 0
    assert parquet.read_metadata(tmp_path / "out" / "train.parquet").num_rows < 11


def test_a_row_that_kills_its_process_is_dropped_and_all_others_stay(tmp_path: Path, recipe: Path):
    odd_steps.write_rows(tmp_path / "rows.jsonl", 600)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    for place, word in ((5, "die"), (300, "hang")):
        lines[place] = json.dumps(json.loads(lines[place]) | {"problem": word})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    recipe.write_text(recipe.read_text().replace("{do: slow}", "{do: deadly, limit: 1}"))
    reports = by_name(prepare(load(recipe, ["write.from=slow", "workers=2"])))
    assert reports["slow"].outcome.drops == {LOST: 2} and reports["slow"].outcome.rows_out == 598
    drops = parquet.read_table(reports["slow"].folder / "drops.parquet").to_pylist()
    assert [row["uid"] for row in drops] == ["s/5", "s/300"]
    assert "SIGKILL" in drops[0]["detail"] and "longer" in drops[1]["detail"]


def test_a_step_that_fails_is_one_line_that_names_the_row(tmp_path: Path, recipe: Path, capsys):
    row = {"uid": "bad/1", "source": "s", "ability": "math", "problem": "fail", "answer": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe.write_text(recipe.read_text().replace("{do: slow}", "{do: deadly}"))
    assert cli.main(["prepare", str(recipe)]) == 1
    error = capsys.readouterr().err
    assert "run failed: step deadly fails on row bad/1: ZeroDivisionError" in error and "  | " in error


def test_a_row_that_a_step_refuses_is_one_line(recipe: Path, capsys):
    recipe.write_text(recipe.read_text().replace("{do: slow}", "{do: keep_difficulty, model: M}"))
    assert cli.main(["prepare", str(recipe)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("or1: error: keep_difficulty: s/0: ") and not error[-2].startswith("  | ")


def test_what_the_machine_lacks_is_said_before_a_step_is_run(recipe: Path, tmp_path: Path):
    recipe.write_text(recipe.read_text().replace("{do: slow_table}", "{do: quality_votes, models: [nowhere]}"))
    with pytest.raises(UserError, match=r"steps.threes: .*judge nowhere has no endpoint"):
        prepare(load(recipe))
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_another_format_is_refused(recipe: Path, tmp_path: Path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "format.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="holds tables of format 99, this program's are of format 1; .*cache=DIR"):
        prepare(load(recipe))


def test_a_damaged_table_is_named(recipe: Path, tmp_path: Path):
    reports = by_name(prepare(load(recipe, ["write.from=all"])))
    (reports["all"].folder / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"rows-\w+/rows.parquet cannot be read .*; remove .*rows-\w+, then"):
        prepare(load(recipe, ["write.from=all"]))


def test_uids_that_come_twice_are_named_with_their_places(recipe: Path, tmp_path: Path):
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "twice.jsonl").write_text("".join([*lines[:5], lines[2]]))
    twice = ["steps.all.files=[" + str(tmp_path / "twice.jsonl") + "]"]
    with pytest.raises(UserError, match="step all: uid s/2 comes twice: twice.jsonl line 3 and twice.jsonl line 6"):
        prepare(load(recipe, twice))
    assert not list((tmp_path / "cache").glob("*rows*"))
    text = recipe.read_text().replace(
        "  slow:", "  more: {do: rows, files: ['${data}/more.jsonl']}\n  both: {join: [all, more]}\n  slow:"
    )
    recipe.write_text(text)
    (tmp_path / "more.jsonl").write_text(lines[9])
    places = r"rows.jsonl line 10 \(step all\), more.jsonl line 1 \(step more\)"
    with pytest.raises(UserError, match=f"step both: uid s/9 comes twice: {places}"):
        prepare(load(recipe))


def test_a_step_may_not_lose_rows(recipe: Path, monkeypatch):
    forgetful = dataclasses.replace(CATALOG["slow_table"], run=lambda table, options, context: iter(()))
    monkeypatch.setitem(CATALOG, "slow_table", forgetful)
    recipe.write_text(recipe.read_text().replace("{do: slow_table}", "{do: slow_table, from: all}"))
    with pytest.raises(AssertionError, match="step slow_table yields row None where the table has s/0"):
        prepare(load(recipe))
