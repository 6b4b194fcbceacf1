"""What `or1 eval` takes as its model, what it refuses at once, and scoring saved responses again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from or1_megatron import cli
from or1_megatron.errors import RunFailure, UserError
from or1_megatron.responses import response_table, write_responses
from or1_megatron.scoring import LONGEST_CONTEXT, configuration, evaluate, rescore
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Group, Prompt, Sample, Verdict
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("m") / "tiny", "llama", tied=True)


def test_a_bare_model_has_all_of_its_positions(model: Path):
    with configuration(model, ["evaluation.num_samples=32"]) as config:
        assert (config.name, config.model.path, config.evaluation.num_samples) == ("tiny", str(model), 32)
        assert 0 < config.rollout.context_length <= LONGEST_CONTEXT
    with configuration(model, ["rollout.context_length=64"]) as config:
        assert config.rollout.context_length == 64


def test_what_is_refused_at_once(model: Path, tmp_path: Path):
    with pytest.raises(UserError, match="is no model directory, run folder or recipe"):
        evaluate(tmp_path / "nothing", ["aime24"])
    with pytest.raises(UserError, match="--limit -1"):
        evaluate(model, ["aime24"], limit=-1)
    with pytest.raises(UserError, match="nothing to evaluate on; use --benchmark"):
        evaluate(model, [])
    with pytest.raises(UserError, match="rollout.context_length=99999 is above the model's max_position_embeddings"):
        evaluate(model, ["aime24"], overrides=["rollout.context_length=99999"])
    (tmp_path / "empty").mkdir()
    for file in model.glob("*.json"):
        (tmp_path / "empty" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="safetensors"):
        evaluate(tmp_path / "empty", ["aime24"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty.jsonl holds no problem"):
        evaluate(model, [str(tmp_path / "empty.jsonl")])
    (tmp_path / "one.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}')
    (tmp_path / "out.parquet").touch()
    with pytest.raises(UserError, match=r"--out .*out.parquet exists"):
        evaluate(model, [str(tmp_path / "one.jsonl")], out=tmp_path / "out.parquet")


def group(name: str, texts: list[str], verdicts: list[str]) -> Group:
    prompt = Prompt(name, "1 + 1 = ?<think>", (1,), ("2", "two"), "sums")
    return Group(
        prompt,
        [
            Sample(
                prompt,
                i,
                np.full(i + 1, 3),
                np.full(i + 1, -0.1),
                text,
                "stop",
                0,
                verdict,
                float(verdict == "correct"),
            )
            for i, (text, verdict) in enumerate(zip(texts, verdicts, strict=True))
        ],
    )


def test_rescoring_finds_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One verdict was too strict; the prompt ended inside <think>, so that an answer needs </think> before it."""
    groups = [
        group("a", ["x</think>\\boxed{2}", "\\boxed{2}"], ["correct", "unparsable"]),
        group("b", ["</think>\\boxed{\\frac{4}{2}}", "</think>\\boxed{3}"], ["wrong", "wrong"]),
    ]
    write_responses(tmp_path / "r.parquet", groups, benchmark="sums", temperature=1.0)
    assert cli.main(["eval", "--rescore", str(tmp_path / "r.parquet"), "--out", str(tmp_path / "new.parquet")]) == 0
    said = capsys.readouterr().out
    assert "benchmark sums, temperature 1.0: 2 problems x 2 responses" in said
    assert "avg@2     50.00 %" in said and "pass@2   100.00 %" in said and "length      1.5 tokens" in said
    assert said.endswith("1 of 4 verdicts changed\n")
    new = parquet.read_table(tmp_path / "new.parquet")
    assert new["verdict"].to_pylist() == ["correct", "unparsable", "correct", "wrong"]
    assert (
        new["reward"].to_pylist() == [1.0, 0.0, 1.0, 0.0]
        and new.schema == response_table(groups, benchmark="sums", temperature=1.0).schema
    )


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("r.parquet", "exists; choose another"),
        ("r.parquet/x.parquet", "its folder cannot be made"),
        ("x.jsonl", "use .parquet"),
    ],
)
def test_rescoring_refuses_a_place_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, words: str):
    write_responses(tmp_path / "r.parquet", [group("a", ["</think>\\boxed{2}"], ["correct"])])
    monkeypatch.setattr("or1_megatron.scoring.score_rows", None)
    with pytest.raises(UserError, match=f"--out .*{words}"):
        rescore(tmp_path / "r.parquet", RewardConfig(num_workers=1), tmp_path / out)


def test_rescoring_makes_the_folder(tmp_path: Path):
    write_responses(tmp_path / "r.parquet", [group("a", ["</think>\\boxed{2}"], ["correct"])])
    rescore(tmp_path / "r.parquet", RewardConfig(num_workers=1), tmp_path / "new" / "r.parquet")
    assert parquet.read_table(tmp_path / "new" / "r.parquet")["verdict"].to_pylist() == ["correct"]


def test_a_problem_that_a_step_dealt_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Counts as two groups, as in the run."""
    right, wrong = "</think>\\boxed{2}", "</think>\\boxed{3}"
    groups = [group("a", [right, wrong], ["wrong"] * 2), group("b", [right] * 2, ["wrong"] * 2)]
    groups.append(group("a", [right, wrong], ["wrong"] * 2))
    write_responses(tmp_path / "r.parquet", groups, step=4)
    rescore(tmp_path / "r.parquet", RewardConfig(num_workers=1))
    said = capsys.readouterr().out
    assert "step 4: 3 problems x 2 responses" in said and "avg@2     66.67 %" in said
    write_responses(tmp_path / "cut.parquet", [groups[0], group("c", [right], ["correct"])], step=4)
    with pytest.raises(UserError, match="step 4: problems have 1 to 2 responses"):
        rescore(tmp_path / "cut.parquet", RewardConfig(num_workers=1))


def test_code_is_scored_again_only_in_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prompt = Prompt("c", "", (1,), (json.dumps({"inputs": ["1"], "outputs": ["1"]}),), "code")
    sample = Sample(
        prompt, 0, np.full(1, 3), np.full(1, -0.1), "```python\nprint(input())\n```", "stop", 0, "wrong", 0.0
    )
    write_responses(tmp_path / "r.parquet", [Group(prompt, [sample])])
    monkeypatch.setenv("PATH", "")  # no bubblewrap
    with pytest.raises(UserError, match="require_isolation=namespaces"):
        rescore(tmp_path / "r.parquet", RewardConfig(num_workers=1, require_isolation="namespaces"))


def test_a_file_that_is_no_responses(tmp_path: Path):
    (tmp_path / "plain.jsonl").write_text('{"response": "2", "ground_truth": "2"}')
    with pytest.raises(UserError, match=r"plain.jsonl is no file of `or1 eval`.*or1 verify"):
        rescore(tmp_path / "plain.jsonl", RewardConfig(num_workers=1))


def test_only_the_first_problems_of_each_set(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [f'{{"question": "{n} + 1?", "answer": "{n + 1}"}}' for n in range(3)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    row = {"prompt": "1 + 1 =", "reward_model": {"ground_truth": "2"}}
    (tmp_path / "h.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    seen = []
    table = response_table([group("a", ["2"], ["correct"])])
    monkeypatch.setattr(
        "or1_megatron.scoring._answer_all", lambda config, sets: seen.append(list(map(len, sets.values()))) or [table]
    )
    for number, limit in enumerate((0, 2)):
        evaluate(model, [str(tmp_path / "b.jsonl")], limit=limit, out=tmp_path / f"b{number}.parquet")
        files = [f"evaluation.files=[{tmp_path / 'h.jsonl'}]"]
        evaluate(model, [], limit=limit, out=tmp_path / f"h{number}.parquet", overrides=files)
    assert seen == [[3], [3], [2], [2]]


def test_what_was_answered_before_a_failure_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "b.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}')
    tables = [response_table([group("a", ["2", "3"], ["correct", "wrong"])])]

    def dies(config: object, sets: object):
        yield from tables
        raise RunFailure("the last engine died")

    monkeypatch.setattr("or1_megatron.scoring._answer_all", dies)
    for name, rows in (("some", 2), ("none", 0)):
        out = tmp_path / f"{name}.parquet"
        with pytest.raises(RunFailure, match="the last engine died"):
            evaluate(model, [str(tmp_path / "b.jsonl")], out=out)
        assert (parquet.read_table(out).num_rows if out.exists() else 0) == rows
        assert (f"responses: {out}" in capsys.readouterr().out) == bool(rows)
        tables.clear()


def test_a_context_beyond_what_the_paper_evaluates_is_not_taken_by_itself(model: Path, tmp_path: Path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4 * LONGEST_CONTEXT}))
    with configuration(tmp_path, []) as found:
        assert found.rollout.context_length == LONGEST_CONTEXT


def test_a_run_is_evaluated_in_the_context_of_its_widest_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("or1_megatron.scoring.export", lambda run, step, out: out)
    (tmp_path / "config.yaml").write_text(
        "model: {path: /m}\nsteps: 2\nstages: [{until: 1, context_length: 64}, {until: 2, context_length: 128}]\n"
        "rollout: {context_length: 32}\n"
    )
    with configuration(tmp_path, []) as config:
        assert config.rollout.context_length == 128


def test_a_check_that_failed_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    groups = [group("a", ["2"], ["correct"]), group("b", ["3"], ["correct"])]
    write_responses(tmp_path / "r.parquet", groups, step=4)
    verdicts = [Verdict("infrastructure_error", 0.0), Verdict("correct", 0.0)]
    monkeypatch.setattr("or1_megatron.scoring.score_rows", lambda *_: (verdicts, None))
    rescore(tmp_path / "r.parquet", RewardConfig(num_workers=1), tmp_path / "new.parquet")
    said = capsys.readouterr().out
    assert "step 4: 1 problems x 1 responses" in said and "avg@1    100.00 %" in said
    assert parquet.read_table(tmp_path / "new.parquet")["reward"].to_pylist() == [0.0, 1.0]
