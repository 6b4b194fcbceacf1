"""The GPU benchmarks line by line on tiny sizes, their table and what becomes of a part that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import check, section
from benchmarks.gpu.sizes import FULL, TINY
from benchmarks.harness import Benchmark
from or1_megatron.parallel.device import has_cuda
from tests.gpu import computed
from tests.gpu.one_rank import run_on

ROOT = Path(__file__).parents[2]


def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    run_on("cpu", computed.tiny_sections, tmp_path)
    sections = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sections.keys() == section.SECTIONS.keys() == check.SECONDS.keys() - {"tests"}
    for name, found in sections.items():
        assert found["rows"] and not found["failures"], (name, found["failures"])
        assert all(row["median"] > 0 for row in found["rows"])
    marks = {mark["name"] for found in sections.values() for mark in found["marks"]}
    assert {
        "head_over_products",
        "head_extra_MB",
        "head_over_fastest_peer",
        "logits_T16_V300_share_of_floor",
        "MFU_1.5B_packs_64_torch",
    } <= marks
    assert sections["ceilings"]["ceilings"].keys() == {"bytes_per_s", "flops", "peak_flops"}
    tests: dict[str, Any] = {"passed": 3, "failed": [{"test": "t", "reason": "off"}], "skipped": [], "exit": 1}
    record = {"sections": sections, "tests": tests, "tiny": True, "seconds": 1.0, "machine": {"gpu": "none"}}
    told = check.table(record)
    for words in (
        "T=16 V=300 statistics", "fused head", "recompute full", "mark head_over_products", "kernels of one step",
        "figures mean nothing", "3 passed, 1 failed", "failed: t: off",
    ):  # fmt: skip
        assert words in told, words
    assert "TransformerEngine: not installed" in told


def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Benchmark) -> None:
        raise RuntimeError("misaligned address")

    def sound(bench: Benchmark) -> None:
        bench.case("sound", lambda: 1.0)

    monkeypatch.setitem(section.SECTIONS, "head", lambda *_: [broken, sound])
    section.measure("head", TINY, None, time.monotonic() + 10, tmp_path / "head.json")
    found = json.loads((tmp_path / "head.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["sound"]
    assert [fault["error"] for fault in found["failures"]] == ["misaligned address"]
    section.measure("head", TINY, None, time.monotonic() - 1, tmp_path / "late.json")
    late = json.loads((tmp_path / "late.json").read_text())
    assert late["rows"] == [] and len(late["notes"]) == 2


def test_a_section_that_dies_or_hangs_is_told(tmp_path: Path) -> None:
    found = check.run_section("head", "cpu", True, tmp_path, 60)  # without the file of the ceilings
    assert found["rows"] == [] and found["failures"][0]["error"] == "exit code 1"
    assert "FileNotFoundError" in found["failures"][0]["traceback"]
    stopped = check.run_section("head", "cpu", True, tmp_path, 0.2)
    assert stopped["failures"][0]["error"] == "stopped after 0.2 s"


def test_tests_that_are_stopped_leave_the_verdicts_they_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that hangs has started a process that outlives it in a session of its own and keeps its output open."""
    (tmp_path / "test_some.py").write_text(
        "import subprocess, time, pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_sound(): pass\n"
        "@pytest.mark.skip(reason='no device')\n"
        "def test_skipped(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_hangs():\n"
        "    subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "    time.sleep(60)\n"
    )
    monkeypatch.setattr(check, "GPU_TESTS", [str(tmp_path / "test_some.py")])
    monkeypatch.setattr(check, "environment", lambda where, **more: {**os.environ, "PYTHONPATH": str(ROOT), **more})
    started = time.monotonic()
    found = check.run_tests("cuda", tmp_path, 15)
    assert time.monotonic() - started < 30 and found["exit"] is None
    (skipped,) = found["skipped"]
    assert found["passed"] == 1
    assert skipped["test"].endswith("::test_skipped") and skipped["reason"] == "no device"
    wrong, others = found["failed"]
    assert wrong["test"].endswith("::test_wrong") and wrong["reason"] == "assert 1 == 2"
    assert others["test"] == "the others" and others["reason"].startswith("stopped after 15 s")


def test_each_section_is_written_at_once_and_only_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "gpu-check.json", []
    empty = {"rows": [], "marks": [], "notes": [], "failures": []}

    def run_section(name: str, where: str, tiny: bool, scratch: Path, limit_s: float) -> dict[str, Any]:
        seen.append((name, sorted(json.loads(out.read_text())["sections"]) if out.exists() else []))
        ceilings = {"ceilings": {"flops": 1.0}} if len(seen) > 1 else {}  # the first attempt leaves none
        return empty | ceilings

    monkeypatch.setattr(check, "run_section", run_section)
    words = ["--out", str(out), "--device", "cpu", "--only"]
    assert check.main([*words, "logits", "head"]) == 0
    assert seen == [("ceilings", []), ("ceilings", []), ("logits", ["ceilings"]), ("head", ["ceilings", "logits"])]
    seen[:] = [("", [])]
    assert check.main([*words, "head"]) == 0
    assert seen[1:] == [("head", ["ceilings", "head", "logits"])], "the ceilings are those of before"
    assert check.main([*words, "head", "--tiny"]) == 0
    assert json.loads(out.read_text())["sections"].keys() == {"ceilings", "head"}, (
        "full sizes and tiny ones in one file"
    )


def test_the_time_for_all_is_under_eight_minutes() -> None:
    assert sum(check.SECONDS.values()) <= 480 and FULL.models.keys() == TINY.models.keys()


@pytest.mark.skipif(has_cuda(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "gpu-check.json"
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not out.exists() and done.stdout == ""
    assert done.stderr.splitlines() == ["gpu-check: torch sees no CUDA device here, nothing was run; see nvidia-smi"]


def test_pins_are_those_of_the_package() -> None:
    """What gpu-check installs is what the package names, word for word where both name it."""
    said = (ROOT / "setup.py").read_text().replace("'", '"')
    folder = ROOT / "benchmarks" / "gpu"
    needs = [line for name in ("requirements", "peers") for line in (folder / f"{name}.txt").read_text().splitlines()]
    pinned = [line.replace('"', "'") for line in needs if line[:1] not in ("", "#") and any(c in line for c in "=<>")]
    assert len(pinned) == 5
    for line in pinned:
        assert '"' + line.replace("'", '"') + '"' in said, line


def test_nothing_on_the_way_needs_vllm_or_ray() -> None:
    """Machines with a GPU and without a network have neither."""
    program = """
import sys
for name in ("ray", "vllm", "math_verify", "datasketch", "rich"):
    sys.modules[name] = None
from or1_megatron.parallel import device
device.install()
import benchmarks.gpu.check, benchmarks.gpu.section, or1_megatron.actor.actor
import tests.gpu.computed, tests.gpu.test_gpu_actor, tests.gpu.test_gpu_kernels, tests.gpu.test_gpu_seam
import tests.parallel.ranks_actor
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
