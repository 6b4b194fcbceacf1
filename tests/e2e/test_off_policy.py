"""A run whose rollouts are one step ahead and whose surplus is carried over, on two replicas, and its resume."""

from __future__ import annotations

import json
from pathlib import Path

from pyarrow.parquet import read_table
from transformers import AutoTokenizer

from or1_megatron.data.prompts import PromptStream
from or1_megatron.types import Prompt
from tests.e2e.runs import finish, metrics, nothing_left, start
from tests.tiny_models import write_tiny_model
from tests.tiny_recipe import write_tiny_recipe


def write_boxing_problems(workplace: Path, groups: str) -> list[str]:
    """A model that boxes a random number up to 30 or writes one of 30 programs within a few tokens, and one problem a
    letter, in the order in which they are asked: M, half of the numbers are right, so that a large group is mixed; C,
    two of three programs are; H, no number is. The keys of both."""
    model = write_tiny_model(workplace / "boxing", "llama", tied=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"\\boxed{{{number}}}" for number in range(31)])
    tokenizer.add_tokens([f"```python\nprint({number} // 20)\n```\n}}" for number in range(30)])
    tokenizer.save_pretrained(model)
    places = PromptStream([Prompt(str(i), "t", (1,), ("",)) for i in range(len(groups))], 0).take(len(groups))
    rows = [{} for _ in groups]
    gold = {"M": [str(number) for number in range(15)], "H": "no number", "C": '{"inputs": [""], "outputs": ["0"]}'}
    for letter, place in zip(groups, places, strict=True):
        rows[int(place.uid)] = {
            "data_source": letter, "prompt": f"{place.uid} + 1 =", "reward_model": {"ground_truth": gold[letter]}
        }  # fmt: skip
    (workplace / "boxing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = ("rollout.group_size=16", 'rollout.stop=["}"]', "loss.rejection=true", "optimizer.lr=1e-4")
    return [f"model.path={model}", f"data.train=[{workplace}/boxing.jsonl]", "evaluation.files=[]", *sampling]


def test_off_policy_and_resume(tmp_path: Path) -> None:
    """Two optimizer steps per rollout on two replicas, one step off, vocabulary entropy, a surplus of informative
    groups that goes into the next step; then a step after a resume. Math and code in one run."""
    run = tmp_path / "run"
    write_tiny_recipe(tmp_path, tmp_path / "boxing")
    options = [
        "parallel.num_ranks=2",
        "loss.mini_batch_size=2",
        "loss.old_log_probs=engine",
        "rollout.overlap=true",
        "rollout.transport=ray",
        "rollout.refill=expected",
        "rollout.max_generated_factor=4",
        *write_boxing_problems(tmp_path, "HHMM" + "MMMM" + "HC" + "MM" + "MMM"),
    ]
    process = start(tmp_path, "recipe.yaml", f"run_dir={run}", "steps=2", "entropy.signal=vocabulary", *options)
    output = finish(process)
    assert process.returncode == 0, output
    assert [row["sgd_steps"] for row in metrics(run)[:2]] == [2, 2]
    assert [row["staleness"] for row in metrics(run)[:2]] == [0, 1]
    assert metrics(run)[0]["mismatch/max"] < 1e-3 < metrics(run)[1]["mismatch/max"]
    # At the end of step 1 the engine decodes ahead and is not waited for; the trace has it nevertheless.
    assert [sorted(row["idle"])[0] for row in metrics(run)[:2]] == ["rank0", "engine0"]
    trace = json.loads((run / "trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "generate" for event in trace) >= 3
    process = start(tmp_path, "--resume", str(run), "steps=3")
    output = finish(process)
    assert process.returncode == 0, output
    assert "resumed after step 2" in output
    rows = [row for row in metrics(run) if "loss" in row]
    assert not any("tokens_per_second/rollout" in row for row in rows), "the seconds of a rollout are not known"
    # The resume samples anew, with the weights that were saved; what is carried over is two versions old.
    assert [(row["step"], row["staleness"]) for row in rows] == [(1, 0), (2, 1), (3, 0.5)]
    counts = [{name: row[f"groups/{name}"] for name in ("generated", "dropped", "kept", "surplus")} for row in rows]
    assert counts == [
        {"generated": 8, "dropped": 2, "kept": 4, "surplus": 2},  # half of four were kept, so four for the missing two
        {"generated": 4, "dropped": 1, "kept": 4, "surplus": 1},  # one of two was, so two for the missing one
        {"generated": 3, "dropped": 0, "kept": 4, "surplus": 0},
    ]
    assert [row["groups/carried"] for row in rows] == [0, 2, 1]
    saved = [read_table(path).to_pylist() for path in sorted((run / "rollouts").glob("*.parquet"))]
    # every response once, in the step that sampled it
    assert [len(responses) for responses in saved] == [16 * 8, 16 * 4, 16 * 3]
    for source, right in (("M", "boxed"), ("C", "print")):
        asked = [row for responses in saved for row in responses if row["data_source"] == source]
        verdicts = {(row["verdict"], right in row["response"]) for row in asked}
        assert {("correct", True), ("wrong", True)} <= verdicts and ("correct", False) not in verdicts, verdicts
    nothing_left(tmp_path)
