"""The launcher's own parts, without a Slurm: ports, times, what to start, when to stop; and where its files may run."""

from __future__ import annotations

import ast
import fcntl
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "slurm"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"slurm_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ports, progress, site_limits = load("ports"), load("progress"), load("site_limits")


def test_ports_of_neighbouring_jobs_never_meet() -> None:
    blocks = []
    for job in range(4711, 4711 + ports.NUM_BLOCKS):
        found = ports.of_job(job)
        fixed = [value for name, value in found.items() if "worker" not in name]
        assert len(set(fixed)) == len(fixed) and max(fixed) < found["first worker"] < found["last worker"] < 32768
        blocks.append((min(fixed), found["last worker"]))
    blocks.sort()
    assert all(one[1] < other[0] for one, other in zip(blocks, blocks[1:], strict=False)) and blocks[0][0] > 1024


def test_the_batch_script_means_the_same_ports() -> None:
    text = (FOLDER / "train.sbatch").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("BASE=", "OR1_PORTS="))]
    script = "\n".join(["SLURM_JOB_ID=98765", *lines, "echo $OR1_PORTS"])
    said = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    fixed = {name: port for name, port in ports.of_job(98765).items() if "worker" not in name}
    assert [int(port) for port in said.stdout.split()] == list(fixed.values()) and "ray-client-server" in fixed


def test_a_node_that_is_alone_may_have_a_loopback_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its full name stands beside 127.0.1.1 in /etc/hosts; a node that others have to reach may not."""
    monkeypatch.setattr(ports.socket, "gethostname", lambda: "node1.cluster.example")
    assert ports.own_address("127.0.1.1", alone=True) == ("127.0.0.1", "lo")
    with pytest.raises(ValueError, match="which others cannot reach"):
        ports.own_address("127.0.1.1")


def test_a_task_of_an_array_acts_on_itself() -> None:
    """Its last task has the array's own id, by which Slurm would requeue all of them."""
    text = (FOLDER / "train.sbatch").read_text()
    lines = [line for line in text.splitlines() if line.startswith("ID=") or "|| ID=" in line]
    script = "\n".join([*lines, "echo $ID"])
    array = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"}
    for environment, own in ((array, "70_2"), ({"SLURM_JOB_ID": "70"}, "70")):
        said = subprocess.run(["bash", "-uc", script], env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == own
    asking = [line for line in text.splitlines() if "scontrol update" in line or "scontrol requeue" in line]
    assert len(asking) == 3 and all("$ID" in line for line in asking)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("30:30", 30.5),
        ("2:30:00", 150),
        ("1-12", 2160),
        ("2-00:00:00", 2880),
        ("infinite", None),
        ("0", None),
    ],
)
def test_times_of_slurm(text: str, minutes: float | None) -> None:
    assert site_limits.minutes(text) == minutes
    with pytest.raises(site_limits.Refused, match="is no time"):
        site_limits.minutes("1h")


@pytest.mark.parametrize(
    ("partition", "nodes", "said"),
    [
        ("h800,h100", 4, ""),
        ("h100,h800", 4, ""),
        ("", 4, ""),
        ("h100,h200", 2, "--partition h200 is none of this cluster's: cpu, h100, h800"),
        ("h800,h100", 5, "--nodes 5: partition h800 has 4 nodes with 8 GPUs"),
        ("h100,cpu", 2, "--time 13:00:00 is above the limit of partition h100, 12:00:00"),
    ],
)
def test_one_of_several_partitions_has_to_do(
    monkeypatch: pytest.MonkeyPatch, partition: str, nodes: int, said: str
) -> None:
    sinfo = "h800*|4|1-00:00:00|gpu:8|up\nh100|2|12:00:00|gpu:h100:8|up\ncpu|9|infinite|(null)|up\n"
    monkeypatch.setattr(site_limits.shutil, "which", lambda name: name)
    monkeypatch.setattr(site_limits, "ask", lambda *words: sinfo)
    time_limit = "13:00:00" if "--time" in said else "10:00:00"
    with pytest.raises(site_limits.Refused, match=re.escape(said)) if said else nullcontext():
        site_limits.check(partition, time_limit, nodes, 8, "", "")


def test_gpus_of_a_node() -> None:
    assert site_limits._gpus("gpu:h800:8(S:0-1)") == 8 and site_limits._gpus("mps:100,gpu:4") == 4
    assert site_limits._gpus("(null)") == 0


JOB = {"program": "", "python": "python3", "recipe": "recipe.yaml", "overrides": [], "steps": ""}


def test_what_the_driver_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New; with what a run left that never saved moved aside; from the newest complete checkpoint."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run, attempt = tmp_path / "run", tmp_path / "run" / "slurm" / "job-1" / "attempt-1"
    attempt.mkdir(parents=True)
    new = ["python3", "-m", "or1_megatron", "train", f"{run}/slurm/recipe.yaml", f"run_dir={run}"]
    assert progress.command(run, attempt, JOB) == new
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "checkpoints" / ".step-000001.partial").mkdir(parents=True)
    assert progress.command(run, attempt, JOB) == new
    assert [path.name for path in run.iterdir()] == ["slurm"]
    assert (attempt / "before" / "metrics.jsonl").is_file()
    with (run / "driver.lock").open("w") as lock:
        lock.write('["node3", 5, "71"]')
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert progress.command(run, attempt, JOB)[-2:] == ["--resume", str(run)], "another job's, not to be moved"
        monkeypatch.setenv("SLURM_JOB_ID", "71")
        assert not progress.driven(run), "its own, which is gone"
    assert not progress.driven(run)
    for step in (9, 10):
        (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (run / "checkpoints" / "step-000009" / "driver.json").write_text("{}")
    assert progress.newest_checkpoint(run) == 9, "10 is not complete"
    assert progress.command(run, attempt, {**JOB, "steps": "740"})[-3:] == ["--resume", str(run), "steps=740"]


def test_time_is_short_when_a_step_a_save_and_a_minute_do_not_fit(tmp_path: Path) -> None:
    rows = [{"step": 1, "seconds/step": 100.0}, {"step": 2, "seconds/step": 80.0, "seconds/save": 30.0}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"cut\n[]\n\xff\n' + lines.encode() + b'{"torn')
    assert not progress.Watch(tmp_path, 0, time.time() + 100 + 30 + 60 + 20).time_is_short()
    assert progress.Watch(tmp_path, 0, time.time() + 100 + 30 + 60 - 20).time_is_short()
    with (tmp_path / "metrics.jsonl").open("w") as file:  # the last save lies more than 20 steps back
        for row in [*rows, *({"step": step, "seconds/step": 80.0} for step in range(3, 40))]:
            file.write(json.dumps(row) + "\n")
    assert progress.Watch(tmp_path, 0, time.time() + 80 + 30 + 60 - 20).time_is_short()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, "seconds/step": 80.0, "save/write_seconds": 45.0}) + "\n")
    assert progress.Watch(tmp_path, 0, time.time() + 80 + 30 + 45 + 60 - 20).time_is_short()
    assert not progress.Watch(tmp_path, 0, time.time() + 80 + 30 + 45 + 60 + 20).time_is_short()
    assert not progress.Watch(tmp_path / "nothing", 0, time.time() + 1).time_is_short(), "no step to go by"


def test_stalled_is_no_trace_for_so_long(tmp_path: Path) -> None:
    watch = progress.Watch(tmp_path, 0.3, float("inf"))
    assert not watch.stalled()
    time.sleep(0.4)
    assert watch.stalled()
    (tmp_path / "metrics.jsonl").write_text("")
    assert not watch.stalled()


@pytest.mark.parametrize("name", ["submit", "site_limits"])
def test_a_login_nodes_python_can_run_it(name: str) -> None:
    ast.parse((FOLDER / f"{name}.py").read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("name", ["submit", "site_limits", "node", "ports", "progress"])
def test_it_needs_the_standard_library_only(name: str) -> None:
    own = {path.stem for path in FOLDER.glob("*.py")} - {"resolve"}
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert all(found.partition(".")[0] in sys.stdlib_module_names | own for found in names), names


def test_shellcheck_is_clean(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck: apt-get install shellcheck")
    root = FOLDER.parent
    batch = tmp_path / "train.sbatch"
    settings = 'RUNS=(a) MAX_RESTARTS=1 PREFLIGHT_S=1 LEAD_S=1 CONTAINER="" MOUNTS="" PYTHON="" OR1_SHM_MB=1'
    batch.write_text((FOLDER / "train.sbatch").read_text().replace("#@SETTINGS@", settings))
    files = [batch, FOLDER / "preflight", root / "launch" / "ray_cluster.sh", root / "tests" / "slurm" / "cluster.sh"]
    done = subprocess.run(["shellcheck", *files], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_secrets_are_masked_and_settings_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    node = load("node")
    assert node.masked("WANDB_API_KEY", "abc") == "***" and node.masked("RAY_AUTH_TOKEN_PATH", "/x") == "***"
    assert node.masked("NCCL_IB_HCA", "mlx5_0") == "mlx5_0"
    (tmp_path / "env").write_text("# a comment\nNCCL_DEBUG=WARN   # why\n# OFF=1\n\nA = b c\n")
    assert node.settings(tmp_path / "env") == {"NCCL_DEBUG": "WARN", "A": "b c"}
    shipped = node.settings(FOLDER / "cluster.env")
    assert shipped["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and "NCCL_IB_HCA" not in shipped


def test_only_what_carries_the_mark_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    node = load("node")
    marks = [tmp_path / "attempt-1", tmp_path / "attempt-10"]
    ours, others = (subprocess.Popen(["sleep", "60"], env={"OR1_ATTEMPT": str(mark)}) for mark in marks)
    try:
        time.sleep(0.2)
        assert node.marked(marks[0]) == {ours.pid}
        node.end_processes(marks[0], {"ours": ours})
        assert ours.poll() is not None and others.poll() is None
    finally:
        others.kill()
        others.wait()


DRIVER = """#!/bin/bash
[[ $* != *or1_megatron.cluster* ]] || exit 0
echo "$*" >"$OR1_RUN/words"
sleep 1
trap 'exit 130' USR1
echo "[\\"node1\\", $$, \\"71\\"]" >"$OR1_RUN/driver.lock"
for _ in {1..100}; do sleep 0.1; done
"""


def test_a_driver_is_asked_to_save_when_it_can_hear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while it imports, when USR1 would end it; and the lock of an attempt before is not its own."""
    monkeypatch.syspath_prepend(FOLDER)
    node = load("node")
    monkeypatch.setattr(node, "POLL_S", 0.05)
    attempt = tmp_path / "slurm" / "job-71" / "attempt-0"
    (attempt / "failed").mkdir(parents=True)
    (attempt / "head.json").write_text('{"address": ""}')
    attempt.with_name("current").write_text("attempt-0")
    (tmp_path / "driver.lock").write_text('["node1", 1, "71"]')
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000001" / "driver.json").touch()
    python = tmp_path / "slurm" / "python"
    python.write_text(DRIVER)
    python.chmod(0o755)
    job = {**JOB, "python": str(python), "steps": "740", "start_deadline_s": 9, "stall_s": 0}
    (tmp_path / "slurm" / "job.json").write_text(json.dumps(job))
    settings = {"SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "71", "OR1_RUN": str(tmp_path)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("RAY_ADDRESS", "OR1_RAY_NODES", "OR1_RAY_GPUS", "OR1_RAY_DEADLINE_S", "OR1_STEPS"):
        monkeypatch.setenv(name, "")
    (attempt / "stop").write_text("the time limit is near\n")
    with pytest.raises(node.Ended) as ended:
        node.Supervisor(tmp_path, attempt)._lead()
    assert ended.value.code == 130, ended.value
    assert (tmp_path / "words").read_text().split()[-1] == "steps=740", "a chain's last, where no stage is said"


def test_a_chain_that_is_refused_half_way_leaves_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    submit, said = load("submit"), []

    def sbatch(*words: str) -> str:
        said.append(words)
        if len(said) == 3:
            raise submit.Refused("sbatch: job limit reached")
        return str(70 + len(said))

    monkeypatch.setattr(submit, "sbatch", sbatch)
    monkeypatch.setattr(submit.site_limits, "ask", lambda *words: said.append(words))
    with pytest.raises(submit.Refused, match="job limit"):
        submit.submit(tmp_path / "train.sbatch", [5, 9, 12])
    assert "--dependency=afterok:71" in said[1] and said[-1] == ("scancel", "71", "72")


def test_a_recipe_that_is_a_folder_is_not_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    submit = load("submit")
    for name, said in (("", "is a folder; give a YAML file"), ("none.yaml", "does not exist")):
        options = submit.argparse.Namespace(words=[str(tmp_path / name)], array=False, chain="")
        with pytest.raises(submit.Refused, match=said):
            submit.recipes_and_overrides(options)
