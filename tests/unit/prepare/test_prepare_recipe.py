"""Recipes of data preparation: what they may say, and the one line that a mistake gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from or1_megatron import cli
from or1_megatron.arguments import WIDTH
from or1_megatron.errors import UserError
from or1_megatron.prepare.catalog import CATALOG
from or1_megatron.prepare.cleaning.basic_steps import LengthOptions, RowsOptions
from or1_megatron.prepare.graph import order, step_key
from or1_megatron.prepare.recipe import Settings, Write, load
from tests.unit.prepare.odd_steps import write_rows

RECIPES = Path(__file__).parents[3] / "launch" / "recipes" / "data"
GOOD = """
data: {folder}
cache: {folder}/cache
steps:
  a: {{do: rows, files: ["${{data}}/rows.jsonl"]}}
  b: {{do: rows, files: ["${{data}}/rows.jsonl"]}}
  both: {{join: [a, b]}}
  short: {{do: keep_length, most: 9}}
  few: {{do: sample, rows: 5, from: a}}
write: {{path: {folder}/out.parquet}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", 20)
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.format(folder=tmp_path))
    return path


def test_a_step_reads_the_one_before_it_or_the_one_it_names(recipe: Path, tmp_path: Path):
    loaded = load(recipe, ["seed=3", "steps.short.least=2"])
    inputs = {name: node.inputs for name, node in loaded.nodes.items()}
    assert inputs == {"a": (), "b": (), "both": ("a", "b"), "short": ("both",), "few": ("a",)}
    assert loaded.nodes["short"].options == LengthOptions(least=2, most=9) and loaded.settings.seed == 3
    assert loaded.nodes["a"].options == RowsOptions((f"{tmp_path}/rows.jsonl",))
    assert loaded.write == Write(path=f"{tmp_path}/out.parquet", from_="few")
    assert [node.name for node in order(loaded.nodes, "short")] == ["a", "b", "both", "short"]
    assert [node.name for node in order(loaded.nodes, "few")] == ["a", "few"]


def test_a_recipe_changes_adds_to_and_takes_out_of_what_it_inherits(recipe: Path, tmp_path: Path):
    own = tmp_path / "own.yaml"
    own.write_text("inherits: recipe.yaml\nsteps: {few: null, short: {most: 7}, none: {do: drop_rows, uids: [x]}}\n")
    loaded = load(own)
    assert list(loaded.nodes) == ["a", "b", "both", "short", "none"] and loaded.write.from_ == "none"
    assert loaded.nodes["short"].options == LengthOptions(most=7) and loaded.nodes["none"].inputs == ("short",)


MISTAKES = {
    "unknown kind": ("do: keep_length", "do: keep_lenght", "steps.short: there is no step 'keep_lenght'; did you mean "
                     "keep_length? There are numinamath, "),
    "unknown option": ("most: 9", "longest: 9", "steps.short (keep_length): unknown option longest; did you mean "
                       "least? There are least, most"),
    "near option": ("most: 9", "mots: 9", "unknown option mots; did you mean most? There are least, most"),
    "wrong type": ("most: 9", "most: nine", "steps.short (keep_length): most: Value 'nine' of type 'str'"),
    "impossible value": ("most: 9", "most: -1", "steps.short (keep_length): least=1, most=-1: use 0 <= least <= most"),
    "no list": ("do: keep_length, most: 9", "do: drop_rows, uids: x", "uids=x must be a list; write uids=[x]"),
    "fewer than none": ("rows: 5", "rows: -1", "steps.few (sample): rows=-1 must be above 0"),
    "no time": ("do: keep_length, most: 9", "do: reextract, timeout_s: -1", "timeout_s=-1.0 must be above 0"),
    "no limit": ("do: keep_length, most: 9", "do: reference_solutions, memory_mb: 0", "memory_mb=0 must be above 0"),
    "missing option": (", rows: 5", "", "steps.few (sample): rows must be set"),
    "a circle": ("do: keep_length, most: 9", "do: keep_length, from: c}\n  c: {do: keep_length", "steps need each "
                 "other in a circle: short -> c -> short"),
    "itself": ("join: [a, b]", "join: [a, both]", "in a circle: both -> both"),
    "no such step": ("from: a", "from: aa", "steps.few: there is no step named 'aa'; did you mean a? There are a, b"),
    "no such step to join": ("[a, b]", "[a, c]", "steps.both: there is no step named 'c'"),
    "no such step to write": ("write: {", "write: {from: fwe, ", "write: there is no step named 'fwe'; did you mean f"),
    "unknown key": ("cache:", "cach:", "unknown key cach; did you mean cache?"),
    "unknown write key": ("write: {", "write: {sufix: x, ", "write: unknown option sufix"),
    "no steps": ("steps:", "seed:", "`steps` must be a mapping"),
    "no write": ("write:", "seed:", "`write` is missing"),
    "no parquet": ("out.parquet", "out.jsonl", "must end with .parquet"),
    "neither do nor join": ("do: sample, ", "", "steps.few: {'rows': 5, 'from': 'a'} is no step"),
    "a source with from": ("do: rows, ", "do: rows, from: b, ", "steps.a: rows reads files, not the rows of 'b'"),
    "nothing before": ("  a: {do: rows,", "  z: {do: sample, rows: 3}\n  a: {do: rows,", "sample is the first step"),
    "no file": ("rows.jsonl", "none.jsonl", "none.jsonl does not exist"),
    "no kind of file": ("rows.jsonl", "rows.csv", "rows.csv: rows are read from .json, .jsonl, "),
    "no folder": ("data:", "name:", "'data' not found"),
    "no variable": ("cache:", "name: ${oc.env:OR1_NONE}\ncache:", "name: Environment variable 'OR1_NONE' not found; "
                    "export it, or give name=VALUE"),
    "no workers": ("cache:", "workers: -1\ncache:", "workers=-1; use 1 or more"),
}  # fmt: skip


def test_what_is_there_is_not_said_to_be_missing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl").mkdir()
    for given, said in (
        (recipe, "rows.jsonl is a folder; give a file"),
        (tmp_path, " is a folder; give a YAML file"),
        (tmp_path / "none.yaml", "does not exist; there are some in launch/recipes/ and launch/recipes/data/"),
    ):
        assert cli.main(["prepare", str(given)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_nothing_is_written(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
):
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    target = ["write.from=short"] if "circle" in message else []
    assert cli.main(["prepare", str(recipe), *target]) == 2
    error = capsys.readouterr().err
    assert error.startswith("or1: error: ") and message in error and error.count("\n") == 1, error
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out.parquet").exists()


def key_with(recipe: Path, *changes: str) -> str:
    return step_key(load(recipe, [f"steps.few.{change}" for change in changes]).nodes["few"], 0, {"a": "x"}, [])


def test_votes_are_found_again_at_another_endpoint_and_not_with_another_limit(recipe: Path):
    recipe.write_text(recipe.read_text().replace("{do: sample, rows: 5,", "{do: quality_votes, models: [m],"))
    here = "endpoints=[http://a/v1]"
    keys = [key_with(recipe, here, change) for change in ("concurrency=2", "concurrency=1", "max_tokens=9")]
    assert key_with(recipe, "endpoints=[http://b/v1]") == keys[0] == keys[1] != keys[2]


def test_difficulty_is_not_found_again_with_other_weights(recipe: Path, tmp_path: Path):
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    measured = f"{{do: difficulty, model: {tmp_path / 'model'},"
    recipe.write_text(recipe.read_text().replace("{do: sample, rows: 5,", measured))
    keys = []
    for content in (b"1" * 9, b"2" * 9, b"1" * 9):
        weights.write_bytes(content)
        keys.append(key_with(recipe))
    assert keys[0] == keys[2] != keys[1]


def test_no_recipe(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["prepare", "seed=1"]) == 2
    assert "or1 prepare needs RECIPE first" in capsys.readouterr().err
    with pytest.raises(UserError, match="none.yaml does not exist"):
        load("none.yaml")


def test_the_help_holds_every_step_with_its_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in CATALOG:
        assert re.search(rf"^([\w, ]+, )?{name}(,\s[\w,\s]+)? \(", shown, re.MULTILINE)
    for name in (*Settings.__dataclass_fields__, "write.path", "write.from", "most", "uids"):
        assert f"\n  {name} " in shown
    assert "${data}" in shown and max(map(len, shown.splitlines())) <= WIDTH


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_the_recipes_of_the_repository(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every step and option is known, and what is written needs all of them."""
    monkeypatch.setenv("OR1_PROBLEMS", str(tmp_path))
    recipe = load(RECIPES / name, [])
    assert {node.name for node in order(recipe.nodes, recipe.write.from_)} == recipe.nodes.keys()
