"""Whole runs as a user starts them: Ray, vLLM and Megatron on a tiny random model, in a process of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from pyarrow.parquet import read_table
from safetensors.torch import load_file

from or1_megatron.convert import export, hf_to_megatron, megatron_to_hf
from or1_megatron.errors import UserError
from or1_megatron.profiling.calibration import computing_seconds, events_by_step
from or1_megatron.recipe import load
from or1_megatron.runfolder import RunFolder
from tests.e2e.runs import finish, metrics, nothing_left, start, wait_for_steps
from tests.tiny_models import write_tiny_model
from tests.tiny_recipe import write_tiny_recipe


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a problem file and a recipe."""
    root = tmp_path_factory.mktemp("runs")
    model = write_tiny_model(root / "model", "llama", tied=True)
    write_tiny_recipe(root, model, evaluation={"files": [str(root / "problems.jsonl")], "num_samples": 2})
    return root


@pytest.mark.parametrize("degree", ["tp", "pp"])
def test_three_steps_on_two_ranks(workplace: Path, degree: str) -> None:
    run = workplace / f"run-{degree}"
    placement = {"tp": "separate", "pp": "colocated"}[degree]
    options = [
        *("parallel.num_ranks=2", f"parallel.{degree}=2"),
        *("rollout.verify_weights=true", f"rollout.placement={placement}"),
    ]
    process = start(workplace, "recipe.yaml", f"run_dir={run}", *options)
    output = finish(process)
    assert process.returncode == 0, output
    assert output.splitlines()[-1].startswith("tiny: held-out accuracy"), output
    rows = metrics(run)
    assert [row["step"] for row in rows[:3]] == [1, 2, 3]
    for row in rows[:3]:
        assert row["probe/mean"] < 1e-3 and row["mismatch/max"] < 1e-3, row  # engine = actor, sync after sync
        assert row["grad_norm"] > 0 and row["groups/kept"] == 4
        assert 0 < row["mfu"] < 1, row
        training_s = row["seconds/step"] - row.get("seconds/evaluation", 0.0)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / training_s), row
    assert "seconds/evaluation" in rows[0]
    check_times(run, rows)
    megatron_to_hf(run / "checkpoints" / "step-000003" / "actor", workplace / "model", run / "hf")
    before, after = (load_file(path / "model.safetensors") for path in (workplace / "model", run / "hf"))
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert not unchanged, f"three steps did not move {unchanged}"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/avg@2" in line] == [0, 3]
    assert (run / "checkpoints" / "step-000003" / "driver.json").is_file()
    assert len(list((run / "rollouts").glob("*.parquet"))) == 3
    nothing_left(workplace)


def check_times(run: Path, rows: list[dict]) -> None:
    """On every process the spans of a step add up to its wall time, and the parts of the driver's step to the step."""
    trace = json.loads((run / "trace.json").read_text())
    events = trace["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert set(names.values()) >= {"driver", "rank0", "rank1", "engine0", "verifier0"}, names
    assert not trace["metadata"]["lost_records"]
    for step, recorded in events_by_step(trace).items():  # what a calibration reads off it
        assert 0 < computing_seconds(recorded) < rows[step - 1]["seconds/update"] and len(recorded) > 20
    spans = [event for event in events if event["ph"] == "X"]
    steps = [span for span in spans if span["name"] == "step"]
    assert len(steps) == 3
    for step, row in zip(steps, rows, strict=False):
        start, end = step["ts"], step["ts"] + step["dur"]
        for pid, name in names.items():
            if name.startswith("verifier"):
                continue
            level = 1 if name == "driver" else 0
            mine = [span for span in spans if span["pid"] == pid and span["args"]["level"] == level]
            cut = [min(s["ts"] + s["dur"], end) - max(s["ts"], start) for s in mine]
            covered = sum(part for part in cut if part > 0)
            assert covered == pytest.approx(step["dur"], rel=0.01, abs=2e3), (name, covered, step)
        assert row["seconds/step"] == pytest.approx(step["dur"] * 1e-6, abs=1e-3)
        paper = sum(row.get(f"seconds/{part}", 0) for part in ("rollout", "update", "others", "evaluation"))
        assert paper == pytest.approx(row["seconds/step"]) and min(row["memory"].values()) > 50e6, row
        assert all(0 < row["idle"][name] < row["seconds/step"] for name in ("rank0", "rank1", "engine0")), row
    engine = next(pid for pid, name in names.items() if name == "engine0")
    running = [event["args"]["responses"] for event in events if event["ph"] == "C" and event["pid"] == engine]
    assert max(running) >= 8 and running[-1] == 0


def test_evaluation_of_a_model(workplace: Path) -> None:
    """A run's checkpoint on two benchmarks at two temperatures; the same when the saved responses are scored again."""
    run = RunFolder.create(load(workplace / "recipe.yaml", [f"run_dir={workplace / 'run-evaluated'}"]))
    checkpoint = run.checkpoints / "step-000007"
    checkpoint.mkdir()
    hf_to_megatron(workplace / "model", checkpoint / "actor")
    (checkpoint / "files.json").write_text("{}")
    rows = [{"question": "1 + 1 = ?", "answer": "#### 2"}, {"question": "2 + 1 = ?", "answer": "#### 3"}]
    (workplace / "gsm8k").mkdir()
    (workplace / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        *(
            "--benchmark",
            "gsm8k",
            "--problems",
            ".",
            "--benchmark",
            "problems.jsonl",
            "--n",
            "3",
            "--out",
            "said.parquet",
        ),
        *("rollout.context_length=256", "rollout.max_response_length=12", "rollout.kv_cache_gb=0.25"),
        *("evaluation.temperatures=[0.5, 1]", "model.dtype=fp32", "reward.num_workers=1"),
    ]
    command = [sys.executable, "-m", "or1_megatron", "eval"]
    done = subprocess.run(
        [*command, str(run.path), *words], check=False, cwd=workplace, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    again = subprocess.run(
        [*command, "--rescore", "said.parquet"], check=False, cwd=workplace, capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 0, again.stderr
    report = again.stdout.splitlines()
    assert report[-1] == "0 of 42 verdicts changed"
    assert all(line in done.stdout for line in report[:-1]), done.stdout
    assert [line for line in report if "problems" in line] == [
        f"benchmark {name}, temperature {t}: {count} problems x 3 responses"
        for t in (0.5, 1.0)
        for name, count in (("gsm8k", 2), ("problems.jsonl", 5))
    ]
    saved = read_table(workplace / "said.parquet").to_pylist()
    assert saved[0]["prompt"].startswith("user: 1 + 1 = ?\nPlease reason step by step") and len(saved) == 42
    assert 0 < max(row["length"] for row in saved) <= 12
    assert not list(run.path.glob(".eval-*")), "the exported model was left behind"
    nothing_left(workplace)


def test_wandb_without_the_package_is_refused_at_once(workplace: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("the package wandb is installed")
    run = workplace / "run-wandb"
    process = start(workplace, "recipe.yaml", f"run_dir={run}", "wandb=project")
    output = finish(process)
    assert process.returncode == 2 and "pip install 'or1_megatron[wandb]'" in output, output
    assert not run.exists()


def test_two_stages_and_a_bitwise_resume(workplace: Path) -> None:
    """Four steps over two stages equal three steps with a save in the background at each, the last of them damaged, a
    resume in mid-stage and two more: numbers, responses, weights."""
    table = "stages=[{until: 1, context_length: 48, mini_batch_size: 2}, {until: 4, rollout_batch_size: 2}]"
    options = ["parallel.num_ranks=2", "loss.old_log_probs=recompute", "entropy.rule=paper", "entropy.target=9", table]
    straight, cut = workplace / "run-straight", workplace / "run-cut"
    for run, words in ((straight, ["steps=4"]), (cut, ["steps=3", "save_interval=1"])):
        process = start(workplace, "recipe.yaml", f"run_dir={run}", "evaluation.files=[]", *options, *words)
        output = finish(process)
        assert process.returncode == 0, output
    assert "stage 2 of 2 from step 2: context 64, D_R 2, D_T 2, gs 2, N_SGD 1" in output
    damaged = cut / "checkpoints" / "step-000003"
    with (damaged / "actor" / "__1_0.distcp").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)
    process = start(workplace, "--resume", str(cut), "steps=4")
    output = finish(process)
    assert process.returncode == 0 and "resumed after step 2" in output, output
    assert f"{damaged} is damaged (actor/__1_0.distcp has " in output, output
    rows = [[row for row in metrics(run) if "loss" in row] for run in (straight, cut)]
    assert [row["sgd_steps"] for row in rows[0]] == [2, 1, 1, 1] and [row["stage"] for row in rows[0]] == [1, 2, 2, 2]
    measured = "second|mfu|latency|idle|memory"
    for one, other in zip(*rows, strict=True):
        one, other = ({n: row[n] for n in row if not re.search(measured, n)} for row in (one, other))
        assert one == other
    assert rows[0][3]["entropy/alpha"] > 0
    written = [row["save/write_seconds"] for row in metrics(cut) if "save/write_seconds" in row]
    assert written and all(0 < seconds < 60 for seconds in written), "of the saves in the background"
    for folder in ("rollouts", "history"):
        ours, theirs = (sorted((run / folder).glob("*.parquet")) for run in (straight, cut))
        assert [path.name for path in ours] == [path.name for path in theirs] and len(ours) == 4
        assert all(read_table(a).equals(read_table(b)) for a, b in zip(ours, theirs, strict=True))
    drivers = [json.loads((run / "checkpoints/step-000004/driver.json").read_text()) for run in (straight, cut)]
    assert drivers[0] == drivers[1]
    for run in (straight, cut):
        megatron_to_hf(run / "checkpoints/step-000004/actor", workplace / "model", run / "hf")
    ours, theirs = (load_file(run / "hf" / "model.safetensors") for run in (straight, cut))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with (cut / "checkpoints/step-000004/actor/__0_0.distcp").open("r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(bytes(range(100)))
    assert export(cut, None, None) == cut / "hf" / "step-000003", "the newest sound one, as a resume would take"
    with pytest.raises(UserError, match="holds no sound checkpoint of step 4"):
        export(cut, 4, None)
    nothing_left(workplace)


def test_a_dead_process_ends_the_run(workplace: Path) -> None:
    """For engines see test_lost_engine.py."""
    run = workplace / "run-dead"
    process = start(workplace, "recipe.yaml", f"run_dir={run}", "steps=100000", "parallel.num_ranks=2")
    wait_for_steps(run, 1, process)
    kill(run, "rank1", process)
    killed = time.monotonic()
    output = finish(process, 90)
    assert process.returncode == 1, output
    assert time.monotonic() - killed < 60
    assert "rank1 died" in output, output
    nothing_left(workplace)


def test_a_dead_rank_is_survived(workplace: Path) -> None:
    """All processes start anew from the newest checkpoint, with nothing left of the rollout that was under way; what
    was done since then is done again."""
    run = workplace / "run-survives"
    options = ["parallel.num_ranks=2", "save_interval=2", "max_restarts=1", "evaluation.files=[]"]
    options += ["rollout.overlap=true", "loss.old_log_probs=engine"]
    process = start(workplace, "recipe.yaml", f"run_dir={run}", "steps=7", *options)
    wait_for_steps(run, 3, process)
    kill(run, "rank1", process)
    output = finish(process)
    assert process.returncode == 0, output
    assert "rank1 died" in output and f"restart 1 of 1 from {run}/checkpoints/step-" in output, output
    assert [row["step"] for row in metrics(run) if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    nothing_left(workplace)


def kill(run: Path, victim: str, driver: subprocess.Popen) -> None:
    log = run / "logs" / f"{victim}.log"
    (pid,) = [p.pid for p in psutil.process_iter() if p.pid != driver.pid and _writes_to(p, log)]
    os.kill(pid, signal.SIGKILL)


def _writes_to(process: psutil.Process, log: Path) -> bool:
    try:
        return os.path.realpath(f"/proc/{process.pid}/fd/1") == os.path.realpath(log)
    except OSError:
        return False


def test_ctrl_c_saves_and_resumes(workplace: Path) -> None:
    """The resumed run fails at its next stage, and keeps what it had done until then."""
    run = workplace / "run-stopped"
    process = start(workplace, "recipe.yaml", f"run_dir={run}", "steps=100000")
    wait_for_steps(run, 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    output = finish(process, 90)
    assert process.returncode == 130, output
    assert f"or1 train --resume {run}" in output
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert len(saved) == 1 and (saved[0] / "driver.json").is_file(), saved
    nothing_left(workplace)
    done = len(metrics(run)) + 1
    (run / "history/step-000001.parquet").unlink()
    stages = f"stages=[{{until: {done}}}, {{until: {done + 1}}}]"
    process = start(workplace, "--resume", str(run), f"steps={done + 1}", stages, "drop_solved=true")
    output = finish(process)
    assert process.returncode == 2 and "step-000001.parquet is gone" in output, output
    assert len(metrics(run)) == done and f"saved step {done}, the last that was completed" in output, output
    assert (run / f"checkpoints/step-{done:06d}/driver.json").is_file()
    nothing_left(workplace)
