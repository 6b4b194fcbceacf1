"""What `make gpu-check` runs: tests marked `gpu` and the GPU benchmarks, on one GPU, in eight minutes at most.

    python -m benchmarks.gpu.check [--out gpu-check.json] [--device cuda|cpu] [--tiny] [--only NAME ...]

The two ceilings are measured first. Each section is a process of its own with its share of the time and what the ones
before it have left. FILE is written anew after each: rows, marks, tests, kernels, machine, versions; at the end there
is one table of it. `--only` keeps what FILE has of the others, the ceilings included. `--device cpu --tiny` goes
through every line without a GPU; its figures mean nothing. Exit code 1: a test failed or ours failed, or a section left
nothing. A mark that falls short is a result and no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import verdicts

ROOT = Path(__file__).resolve().parents[2]
# Seconds of each; together eight minutes. Sections stop by themselves a little before.
SECONDS = {
    "ceilings": 60,
    "tests": 170,
    "logits": 60,
    "head": 40,
    "update 1.5B": 70,
    "update 4 layers of 7B": 45,
    "weights": 35,
}
_CLOSING_S = 5.0  # of a section
# Quick ones first: what is stopped has the others.
_TESTS = ("kernels", "seam", "actor")
GPU_TESTS = [*(f"tests/gpu/test_gpu_{name}.py" for name in _TESTS), "tests/parallel/test_weights.py"]


def environment(where: str, **more: str) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if where == "cpu" else {}
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        **hidden,
        **more,
    }


def run(command: list[str], env: dict[str, str], limit_s: float, log: Path) -> tuple[int | None, str]:
    """Exit code, None when it was stopped, and the last lines of what it said."""
    with log.open("w") as file:  # not a pipe: whoever outlives the process would hold it open
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=env, start_new_session=True,
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes hold the GPU, too
            process.wait()
            code = None
    return code, log.read_text(errors="replace")[-2000:]


def run_section(name: str, where: str, tiny: bool, scratch: Path, limit_s: float) -> dict[str, Any]:
    """What the section has written; `failures` says what is missing."""
    out = scratch / f"{name}.json".replace(" ", "-")
    deadline = time.monotonic() + limit_s - min(_CLOSING_S, limit_s / 5)
    command = ["benchmarks.gpu.section", name, "--out", str(out), "--deadline", str(deadline)]
    if name != "ceilings":
        command += ["--ceilings", str(scratch / "ceilings.json")]
    code, said = run([*command, *(["--tiny"] if tiny else [])], environment(where), limit_s, out.with_suffix(".log"))
    found = json.loads(out.read_text()) if out.exists() else {"rows": [], "marks": [], "notes": [], "failures": []}
    if code is None:
        found["failures"].append({"where": name, "error": f"stopped after {limit_s:.3g} s", "traceback": said})
    elif code:
        found["failures"].append({"where": name, "error": f"exit code {code}", "traceback": said})
    return found


def run_tests(where: str, scratch: Path, limit_s: float) -> dict[str, Any]:
    """Counts, and the first line of each failure and skip."""
    chosen = ["-m", "gpu", *GPU_TESTS] if where == "cuda" else ["tests/gpu"]
    path = scratch / "verdicts.jsonl"
    command = ["pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.verdicts", *chosen]
    code, said = run(command, environment(where, OR1_VERDICTS=str(path)), limit_s, scratch / "tests.log")
    rows = verdicts.read(path)
    found: dict[str, Any] = {
        outcome: [{key: row[key] for key in ("test", "reason")} for row in rows if row["outcome"] == outcome]
        for outcome in ("failed", "skipped")
    }
    if code is None:
        found["failed"].append({"test": "the others", "reason": f"stopped after {limit_s:.3g} s: {said[-500:]}"})
    elif not rows:
        found["failed"].append({"test": "tests/gpu", "reason": said})
    return {"passed": sum(row["outcome"] == "passed" for row in rows), **found, "exit": code}


def rows_told(sections: dict[str, Any]) -> list[str]:
    rows = [(name, row) for name, section in sections.items() for row in section["rows"]]
    width = max((len(row["label"]) for _, row in rows), default=0)
    lines = []
    for name, row in rows:
        rate = row["amount"] / row["median"]
        lines.append(
            f"{name:21} {row['kind']:5} {row['label']:{width}} {1e3 * row['median']:10.4g} ms "
            f"{rate:12,.4g} {row['unit']}/s  {row['remark']}".rstrip()
        )
    return lines


def table(record: dict[str, Any]) -> str:
    """One line per thing measured, then notes, marks and tests."""
    sections = record["sections"]
    lines = [f"gpu-check on {record['machine']['gpu']}, {record['seconds']:.0f} s", ""]
    lines += ["tiny sizes: the figures mean nothing", ""] if record["tiny"] else []
    lines += rows_told(sections)
    lines += [f"{name:21} note  {note}" for name, section in sections.items() for note in section["notes"]]
    for label, kernels in (pair for section in sections.values() for pair in section.get("kernels", {}).items()):
        lines += ["", f"kernels of one step: {label}"]
        lines += [f"  {k['share']:6.1%} {k['ms']:10.3f} ms {k['calls']:6} x {k['kernel'][:90]}" for k in kernels[:12]]
    lines.append("")
    tests = record["tests"]
    if tests:
        lines.append(f"tests: {tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} skipped")
        lines += [f"  {kind}: {t['test']}: {t['reason']}" for kind in ("failed", "skipped") for t in tests[kind]]
    lines += [
        f"FAILED {fault['where']}: {fault['error']}\n{fault['traceback']}"
        for section in sections.values()
        for fault in section["failures"]
    ]
    lines += [
        f"mark {m['name']} {m['value']:.4g} {m['target']:.4g} {'holds' if m['holds'] else 'falls short'}"
        for section in sections.values()
        for m in section["marks"]
    ]
    return "\n".join(lines)


def check(where: str, chosen: list[str], *, tiny: bool, before: dict[str, Any], out: Path) -> dict[str, Any]:
    """Runs what is chosen, in order, and returns all that gpu-check.json holds; `before` has the rest."""
    from benchmarks.harness import machine
    from or1_megatron.runfolder import package_versions

    started, total_s = time.monotonic(), sum(SECONDS[name] for name in chosen)
    record = {"tests": None, "sections": {}, **before, "device": where, "tiny": tiny, "machine": machine()}
    record["versions"] = {"python": platform.python_version(), **package_versions()}
    sections = record["sections"]
    with tempfile.TemporaryDirectory(prefix="or1-gpu-check-") as directory:
        scratch = Path(directory)
        if "ceilings" in sections:
            (scratch / "ceilings.json").write_text(json.dumps(sections["ceilings"]))
        for place, name in enumerate(chosen):
            later_s = sum(SECONDS[later] for later in chosen[place + 1 :])
            limit_s = max(1.0, total_s - (time.monotonic() - started) - later_s)
            print(f"gpu-check: {name}, at most {limit_s:.0f} s ...", file=sys.stderr, flush=True)
            if name == "tests":
                record["tests"] = run_tests(where, scratch, limit_s)
            else:
                sections[name] = _section(name, where, tiny, scratch, limit_s, sections)
                print("\n".join(rows_told({name: sections[name]})), file=sys.stderr, flush=True)
            record["seconds"] = time.monotonic() - started
            _write(out, record)
    return record


def _section(
    name: str, where: str, tiny: bool, scratch: Path, limit_s: float, sections: dict[str, Any]
) -> dict[str, Any]:
    if name != "ceilings" and "ceilings" not in sections.get("ceilings", {}):
        missing = {"where": name, "error": "not run: there are no ceilings to measure against", "traceback": ""}
        return {"rows": [], "marks": [], "notes": [], "failures": [missing]}
    found = run_section(name, where, tiny, scratch, limit_s)
    if name == "ceilings" and "ceilings" not in found:  # the first process here reads all of CUDA from the disk
        found = run_section(name, where, tiny, scratch, limit_s)
    return found


def _write(out: Path, record: dict[str, Any]) -> None:
    temporary = out.with_suffix(".part")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=tuple(SECONDS), metavar="NAME", help=", ".join(SECONDS))
    options = parser.parse_args(arguments)
    from benchmarks.harness import machine
    from or1_megatron.parallel.device import has_cuda

    if options.device == "cuda" and not has_cuda():
        print("gpu-check: torch sees no CUDA device here, nothing was run; see nvidia-smi", file=sys.stderr)
        return 2
    before = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    here = {"device": options.device, "tiny": options.tiny, "machine": machine()}
    if any(before.get(key) != value for key, value in here.items()):
        before = {}  # of another machine, or of sizes that mean nothing
    chosen = [name for name in SECONDS if not options.only or name in options.only]
    if "ceilings" not in before.get("sections", {}).get("ceilings", {}) and "ceilings" not in chosen:
        chosen = ["ceilings", *chosen]
    record = check(options.device, chosen, tiny=options.tiny, before=before, out=options.out)
    print(table(record))
    print(f"written: {options.out}")
    tests = record["tests"]
    failed = any(section["failures"] for section in record["sections"].values())
    return int(failed or bool(tests and (tests["failed"] or tests["exit"])))


if __name__ == "__main__":
    sys.exit(main())
