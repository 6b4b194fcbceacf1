"""`or1 plan` as a user calls it: the paper's recipe in seconds, a calibrated machine, bad input."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from or1_megatron import cli, plan
from or1_megatron.plan import Assumptions
from or1_megatron.profiling.calibration import Interval, calibrate, computing_seconds, events_by_step, intervals
from or1_megatron.profiling.lengths import LogNormal, Measured
from or1_megatron.profiling.planner import StepTime, Work
from or1_megatron.recipe import from_tree, load
from or1_megatron.runfolder import RunFolder
from or1_megatron.types import Group, Prompt, Sample
from tests.tiny_models import write_tiny_model

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
FIXED, PER_RESPONSE, START, RATE, OPTIMIZER, REDUCTION = 0.02, 0.004, 0.1, 5e9, 1.5, 0.25


def test_the_32b_recipe_on_four_clusters(capsys: pytest.CaptureFixture[str]):
    started = time.process_time()
    assert cli.main(["plan", str(RECIPES / "or1_32b.yaml"), "--gpus", "32,64,128,256"]) == 0
    assert time.process_time() - started < 10
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.endswith("%") and line.split()[0].isdigit()]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        (gpus, stage, steps) for gpus in ("32", "64", "128", "256") for stage, steps in (("1", "760"), ("2", "370"))
    ]
    seconds = [float(row[7]) for row in rows]
    assert seconds[0::2] == sorted(seconds[0::2], reverse=True)
    hours = [float(line.split()[2]) for line in lines if " GPUs: " in line]
    assert hours[0] == pytest.approx(sum(float(row[8]) for row in rows[:2]), abs=1)
    assert any("no refills" in line for line in lines) and lines[-1].startswith("assumed:")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--paper", "--gpus", "3"], "--paper takes no recipe and no other option"),
        (["--paper", str(RECIPES / "or1_32b.yaml")], "--paper takes no recipe and no other option"),
        (["--paper", "--hardware", "h100"], "--paper takes no recipe and no other option"),
        (["--paper", "--kept", "0"], "--paper takes no recipe and no other option"),
        ([str(RECIPES / "or1_32b.yaml"), "--calibrate", "none", "--gpus", "64"], "--gpus 64: --calibrate plans for"),
        ([str(RECIPES / "or1_32b.yaml"), "--calibrate", "none", "--hardware", "h100"], "--hardware h100: --calibrate"),
    ],
)
def test_options_that_would_not_be_used(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert cli.main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def process(pid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}


def span(pid: int, name: str, start: float, seconds: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": pid, "ts": start * 1e6, "dur": seconds * 1e6}


def write_run(root: Path, stage_of: dict[int, int] | None = None) -> Path:
    """A run folder of four steps on a machine whose costs are known exactly; the second of two ranks computes longer.

    In the second stage groups are twice as large and the machine is twice as slow."""
    write_tiny_model(root / "model", "llama", tied=True)
    recipe = {
        "model": {"path": str(root / "model")},
        "rollout": {
            "rollout_batch_size": 4, "group_size": 2, "context_length": 64, "max_generated_factor": 1.0,
            "max_batched_tokens": 16,
        },
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = RunFolder.create(load(root / "recipe.yaml", [f"run_dir={root / 'run'}"]))
    events = [process(pid, name) for pid, name in enumerate(("driver", "engine0", "rank0", "rank1"))]
    at = 0.0
    for step in range(1, 5):
        slow = stage = (stage_of or {}).get(step, 1)
        lengths = [3 + step, 5 + 2 * step, 9, 12, 12, 20, 20, 31]
        counts, rounds, began = [(at, len(lengths), 0)], 0, at
        at += slow * START * len(lengths)
        for length in sorted(set(lengths)):
            running = sum(other >= length for other in lengths)
            at += slow * (length - rounds) * (FIXED + PER_RESPONSE * running)
            rounds = length
            counts.append((at, sum(other > length for other in lengths), rounds))
        events += [
            {"ph": "C", "name": "responses", "pid": 1, "ts": at * 1e6, "args": {"responses": n, "rounds": r}}
            for at, n, r in counts
        ]
        rollout, flops = at - began, 1e9 * step
        update = slow * (flops / RATE + REDUCTION + OPTIMIZER)
        for rank, computes in ((2, 0.7 * flops / RATE), (3, flops / RATE)):
            both = slow * (flops / RATE + REDUCTION)
            events.append(span(rank, "forward_backward", at, both))
            events.append(span(rank, "reduce_gradients", at + slow * computes, both - slow * computes))
            events.append(span(rank, "optimizer", at + both, slow * OPTIMIZER))
        at += update
        events.append(span(0, "step", began, at - began))
        at += 1
        run.metrics.log(step, {
            "seconds/step": 9.0, "seconds/rollout": rollout, "length/max": 31, "stage": stage,
            "seconds/others": 0.9, "seconds/sync": 0.5, "sgd_steps": 1,
            "seconds/update": update, "training_flops": flops, "groups/generated": 4 // slow,
            "groups/kept": 3, "tokens": 6 * slow * (10 + sum(lengths) / 8),
            "length/mean": sum(lengths) / 8,
        })  # fmt: skip
        prompts = [Prompt(f"p{i}", "", (1,), ("1",)) for i in range(4)]
        run.save_rollouts(step, [
            Group(prompt, [
                Sample(prompt, j, np.ones(lengths[2 * i + j]), np.zeros(0), "", "stop", 0) for j in range(2)
            ])
            for i, prompt in enumerate(prompts)
        ])  # fmt: skip
    run.write("trace.json", json.dumps({"traceEvents": events, "metadata": {"last_step": 4}}))
    return run.path


def test_calibration_finds_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunFolder.open(write_run(tmp_path, stage_of={3: 2}))
    trace = json.loads((run.path / "trace.json").read_text())
    assert sum(part.rounds for part in intervals(trace["traceEvents"])) == 4 * 31
    by_step = events_by_step(trace)
    assert list(by_step) == [1, 2, 3, 4] and computing_seconds(by_step[2]) == pytest.approx(2e9 / RATE)
    machine: dict[str, Any] = {"num_ranks": 2, "num_engines": 1, "max_batched_tokens": 16}
    found = calibrate(trace, run.metrics.read(), group_sizes=[2, 4], stages={1}, **machine)
    assert (found.fixed, found.per_response, found.start) == pytest.approx((FIXED, PER_RESPONSE, START), rel=1e-6)
    assert (found.flops_rate, found.optimizer_step_s) == pytest.approx((RATE, OPTIMIZER + REDUCTION), rel=1e-6)
    assert found.prompt_tokens == 10 and found.num_steps == 2
    assert (found.sync_s, found.rest_s) == pytest.approx((0.5, 0.4))
    both = calibrate(trace, run.metrics.read(), group_sizes=[2, 4], **machine)
    assert both.num_steps == 3 and both.fixed > 1.1 * FIXED
    sharing = [{**row, "packing/spared_tokens": 7.0} for row in run.metrics.read()]
    assert calibrate(trace, sharing, group_sizes=[2, 4], **machine).shares_prompts and not both.shares_prompts


# A rollout that had begun before, then a whole one.
COUNTS = [{"responses": n, "rounds": done} for n, done in ((5, 7), (0, 9), (8, 0), (4, 2), (0, 5))]


@pytest.mark.parametrize("name", ["rollouts/step-000004.parquet", "history/step-000004.parquet", "trace.json"])
def test_a_file_of_the_run_that_was_cut_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path)
    RunFolder.open(run).save_history(4, [])
    (run / name).write_bytes((run / name).read_bytes()[:-20])
    capsys.readouterr()
    assert cli.main(["plan", "launch/recipes/quickstart.yaml", "--calibrate", str(run)]) == 2
    assert f"{run / name} " in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_a_trace_of_an_older_version_is_not_calibrated_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path)
    trace = json.loads((run / "trace.json").read_text())
    (run / "trace.json").write_text(json.dumps({"traceEvents": trace["traceEvents"]}))
    assert cli.main(["plan", "launch/recipes/quickstart.yaml", "--calibrate", str(run)]) == 2
    assert "is not a trace that a run of this version has written" in capsys.readouterr().err


def test_a_run_that_decodes_while_it_trains_is_not_calibrated_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunFolder.open(write_run(tmp_path))
    run.config.rollout.overlap, run.config.loss.old_log_probs = True, "engine"
    run.save_config(run.config)
    assert cli.main(["plan", "launch/recipes/quickstart.yaml", "--calibrate", str(run.path)]) == 2
    assert "calibrate on a run with rollout.overlap=false" in capsys.readouterr().err


def test_an_interval_counts_once_all_prompts_are_prefilled():
    """Eight responses to prompts of 10 tokens, 28 tokens a round beside those that decode: four rounds of 20."""
    assert [Interval(1, 8, 8, begun, 1.0).all_started(10, 28) for begun in (0, 3, 4)] == [False, False, True]
    assert Interval(1, 4, 8, 1, 1.0).all_started(10, 28)  # half have ended
    assert not Interval(1, 8, 8, 99, 1.0).all_started(10, 8)  # no room beside them is ever left
    assert not Interval(1, 300, 300, 99, 1.0).all_started(10, 9999)  # an engine decodes 256 at once
    events = [{"ph": "C", "name": "responses", "pid": 1, "ts": 1e6 * n, "args": args} for n, args in enumerate(COUNTS)]
    assert [interval.begun for interval in intervals(events)] == [0, 2]


def test_calibrated_plan_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = RunFolder.open(write_run(tmp_path))
    words = ["plan", str(tmp_path / "recipe.yaml"), "--calibrate", str(run.path), "steps=10"]
    assert cli.main(words) == 0
    first, assumed, *_, row = capsys.readouterr().out.splitlines()
    assert "20 ms + 4 ms per response" in first and "75% of the groups kept" in assumed
    assert [float(cell) for cell in row.split()[4:6]] == [0.5, 0.4]  # push and the rest, as measured: nothing hides it
    assert float(row.split()[2]) == pytest.approx(31 * FIXED + 8 * 15 * PER_RESPONSE + 8 * START, rel=0.2)


def test_the_kept_share_follows_the_group_size():
    lengths = LogNormal(10, 0.5, 0.5)
    seen = Assumptions(lengths, 0.6, outcomes=((4, 0), (4, 1), (4, 2), (4, 4), (4, 3)))
    assert seen.kept(4) == 0.6 and seen.kept(2) < 0.5 and 0.65 < seen.kept(16) <= 1
    both = Assumptions(lengths, 0.6, outcomes=(*seen.outcomes, *((2 * n, 2 * right) for n, right in seen.outcomes)))
    assert both.kept(4) < 0.6 < both.kept(8)  # the share was seen on groups of both sizes
    assert Assumptions(lengths, 0.6).kept(16) == 0.6
    assert Assumptions(lengths, 0.0, outcomes=((4, 0), (4, 4))).kept(8) == 0.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "many"], "--gpus many"),
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "8,100000000"], "numbers of GPUs up to 65536"),
        (["--gpus", "8", "--hardware", "abacus"], "h800, h100"),
        (["--gpus", "8", "--lengths", "no/such"], "MEDIAN,SIGMA"),
        (["--gpus", "8", "--kept", "0"], "--kept 0"),
        (["--gpus", "8"], "does not fit"),
        (["--gpus", "8", "model.path=models/mine"], "models/mine is not here"),
        (["--gpus", "8", f"model.path={RECIPES}"], "recipes holds no config.json, and recipes is none of"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["plan", str(RECIPES / "or1_32b.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


class Predicted:
    """Stands in for the prediction: notes the work; a step takes a second for every 64 tokens of the context."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def __call__(self, work: Work, costs: Any, draws: int = 0) -> StepTime:
        self.works.append(work)
        return StepTime(work.context_length / 64, *[0.0] * 9)


def test_the_work_of_each_stage_is_that_of_the_recipe(monkeypatch: pytest.MonkeyPatch):
    """Steps end the last stage before its own end; nothing is rejected; the engines' log-probs need no pass."""
    monkeypatch.setattr(plan, "predict", predicted := Predicted())
    tree = {
        "model": {"path": "models/DeepSeek-R1-Distill-Qwen-7B"},
        "steps": 101,
        "stages": [{"until": 100, "context_length": 64}, {"until": 300, "context_length": 4096}],
        "loss": {"old_log_probs": "engine", "rejection": False},
    }
    seen = Assumptions(LogNormal(10, 0.5, 0.5), 0.6)
    lines = plan.plan_gpus(from_tree([("t", tree)]), [8], "h800", seen)
    assert ": 101 steps in 2 stages" in lines[0]
    assert [work.prompt_tokens for work in predicted.works] == [32, 128]
    assert {(work.kept_share, work.recomputes_old_log_probs) for work in predicted.works} == {(1.0, False)}
    assert any("help most, each alone, stage 1 on 8 GPUs" in line for line in lines), "100 x 1 s, and 1 x 64 s"
    assert any("nothing of what was tried" in line for line in lines), "every layout takes the same time"


def test_prompts_are_shared_where_the_run_has_shared_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunFolder.open(write_run(tmp_path))
    monkeypatch.setattr(plan, "predict", predicted := Predicted())
    shown = plan.calibration_of(run)
    for shares in (False, True):
        calibrated = dataclasses.replace(shown, shares_prompts=shares)
        plan.calibrated_steps(run.config, calibrated, Assumptions(LogNormal(10, 0.5, 0.5), 0.6))
    assert [work.shares_prompts for work in predicted.works] == [False, True]


def test_lengths_are_those_of_the_newest_groups_in_the_stages_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = RunFolder.open(write_run(tmp_path, stage_of={3: 2}))

    def groups(**settings: Any) -> tuple[tuple[int, ...], ...]:
        lengths = plan.measured(run, **settings).lengths
        assert isinstance(lengths, Measured)
        return lengths.groups

    assert groups(stages={2}) == ((6, 11), (9, 12), (12, 20), (20, 31))
    monkeypatch.setattr(plan, "MOST_GROUPS", 1)
    assert groups() == ((7, 13), (9, 12), (12, 20), (20, 31))  # of step 4


def test_the_share_of_a_run_without_rejection_is_that_of_right_and_wrong_ones_together(tmp_path: Path):
    run = RunFolder.open(write_run(tmp_path))
    run.config.loss.rejection = False
    prompt = Prompt("p", "", (1,), ("1",))
    for step, right in enumerate((0, 1, 2, 0), 1):
        verdicts = ["correct"] * right + ["wrong"] * (2 - right)
        samples = [Sample(prompt, i, np.ones(1), np.zeros(1), "", "stop", 0, v) for i, v in enumerate(verdicts)]
        run.save_history(step, [Group(prompt, samples)])
    assert plan.measured(run).kept_share == 0.25


def test_all_groups_may_be_kept():
    assert plan.assumptions(None, 1.0, None).kept_share == 1.0


def test_responses_are_those_of_each_engine_and_tokens_those_of_each_pass(tmp_path: Path):
    run = RunFolder.open(write_run(tmp_path))
    trace = json.loads((run.path / "trace.json").read_text())
    rows = [{**row, "tokens": 2 * row["tokens"]} if "tokens" in row else row for row in run.metrics.read()]
    machine: dict[str, Any] = {"num_ranks": 2, "max_batched_tokens": 16, "num_reuse": 2, "num_engines": 2}
    found = calibrate(trace, rows, group_sizes=[2], **machine)
    assert found.prompt_tokens == 10
    # As if the engine beside the recorded one had decoded half: four responses, and half of the third step's tokens.
    assert found.start == pytest.approx((8 * START + 121 / 2 * PER_RESPONSE) / 4, rel=1e-6)
