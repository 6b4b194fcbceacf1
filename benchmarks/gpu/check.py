"""What `make gpu-check` runs: tests marked `gpu` and the GPU benchmarks, on one GPU, in eight minutes at most.

    python -m benchmarks.gpu.check [--out gpu-check.json] [--device cuda|cpu] [--tiny] [--without-tests]

The two ceilings are measured first. Each section is a process of its own with its share of the time. At the end there
is one table, and FILE has everything: rows, marks, tests, kernels, machine, versions. `--device cpu --tiny` goes
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
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
# Seconds that each may take; together under eight minutes. Sections stop by themselves a little before.
SECONDS = {
    "ceilings": 30,
    "tests": 140,
    "logits": 70,
    "head": 50,
    "update 1.5B": 85,
    "update 4 layers of 7B": 65,
    "weights": 40,
}


def environment(where: str) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if where == "cpu" else {}
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        **hidden,
    }


def run(command: list[str], where: str, limit_s: float) -> tuple[int | None, str]:
    """Exit code, None when it was stopped, and the last lines of what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment(where), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=limit_s)[0]
        return process.returncode, said[-2000:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own processes hold the GPU, too
        return None, process.communicate()[0][-2000:]


def run_section(name: str, where: str, tiny: bool, scratch: Path) -> dict[str, Any]:
    """What the section has written; `failures` says what is missing."""
    out, limit_s = scratch / f"{name}.json".replace(" ", "-"), SECONDS[name]
    command = ["benchmarks.gpu.section", name, "--out", str(out), "--seconds", str(0.8 * limit_s)]
    if name != "ceilings":
        command += ["--ceilings", str(scratch / "ceilings.json")]
    code, said = run([*command, *(["--tiny"] if tiny else [])], where, limit_s)
    found = json.loads(out.read_text()) if out.exists() else {"rows": [], "marks": [], "notes": [], "failures": []}
    if code is None:
        found["failures"].append({"where": name, "error": f"stopped after {limit_s} s", "traceback": said})
    elif code:
        found["failures"].append({"where": name, "error": f"exit code {code}", "traceback": said})
    return found


def run_tests(where: str, scratch: Path) -> dict[str, Any]:
    """Counts, and the first line of each failure and skip."""
    report = scratch / "tests.xml"
    chosen = ["-m", "gpu", "tests/gpu", "tests/parallel/test_weights.py"] if where == "cuda" else ["tests/gpu"]
    command = ["pytest", "-q", "-p", "no:cacheprovider", *chosen, f"--junitxml={report}"]
    code, said = run(command, where, SECONDS["tests"])
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": [], "exit": code}
    if not report.exists():
        found["failed"].append({"test": "tests/gpu", "reason": "stopped" if code is None else said})
        return found
    for case in ElementTree.parse(report).iter("testcase"):
        verdict = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if verdict is None:
            found["passed"] += 1
        else:
            reason = (verdict.get("message") or "").strip().partition("\n")[0]
            kind = "skipped" if verdict.tag == "skipped" else "failed"
            found[kind].append({"test": case.get("name"), "reason": reason})
    return found


def table(record: dict[str, Any]) -> str:
    """One line per thing measured, then notes, marks and tests."""
    sections = record["sections"]
    rows = [(name, row) for name, section in sections.items() for row in section["rows"]]
    width = max((len(row["label"]) for _, row in rows), default=0)
    lines = [f"gpu-check on {record['machine']['gpu']}, {record['seconds']:.0f} s", ""]
    lines += ["tiny sizes: the figures mean nothing", ""] if record["tiny"] else []
    for name, row in rows:
        rate = row["amount"] / row["median"]
        lines.append(
            f"{name:21} {row['kind']:5} {row['label']:{width}} {1e3 * row['median']:10.4g} ms "
            f"{rate:12,.4g} {row['unit']}/s  {row['remark']}".rstrip()
        )
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


def check(where: str, *, tiny: bool, tests: bool) -> dict[str, Any]:
    """Everything that gpu-check.json holds."""
    from benchmarks.harness import machine
    from or1_megatron.runfolder import package_versions

    started, record = time.monotonic(), {"device": where, "tiny": tiny}
    sections: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="or1-gpu-check-") as directory:
        scratch = Path(directory)
        for name in SECONDS:
            print(f"gpu-check: {name} ...", file=sys.stderr, flush=True)
            if name == "tests":
                record["tests"] = run_tests(where, scratch) if tests else None
            elif name == "ceilings" or "ceilings" in sections["ceilings"]:
                sections[name] = run_section(name, where, tiny, scratch)
    record |= {"sections": sections, "machine": machine(), "seconds": time.monotonic() - started}
    return {**record, "versions": {"python": platform.python_version(), **package_versions()}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--without-tests", action="store_true")
    options = parser.parse_args(arguments)
    from or1_megatron.parallel.device import has_cuda

    if options.device == "cuda" and not has_cuda():
        print("gpu-check: torch sees no CUDA device here, nothing was run; see nvidia-smi", file=sys.stderr)
        return 2
    record = check(options.device, tiny=options.tiny, tests=not options.without_tests)
    temporary = options.out.with_suffix(".part")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, options.out)
    print(table(record))
    print(f"written: {options.out}")
    tests = record["tests"]
    failed = any(section["failures"] for section in record["sections"].values())
    return int(failed or bool(tests and (tests["failed"] or tests["exit"])))


if __name__ == "__main__":
    sys.exit(main())
