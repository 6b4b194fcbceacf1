"""A pytest plugin: each test's verdict goes to a file at once, so that a run that is stopped leaves those it had.

    OR1_VERDICTS=FILE pytest -p benchmarks.gpu.verdicts ...

A line of FILE is {"test", "outcome": passed | failed | skipped, "reason", "seconds"}; a later line of a test replaces
an earlier one. A file of tests that cannot be read is a line, too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write(report, report.duration)


def pytest_collectreport(report: Any) -> None:
    if report.outcome != "passed":
        _write(report, 0.0)


def read(path: Path) -> list[dict[str, Any]]:
    """The last line of each test, in the order in which they ended."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({row["test"]: row for row in map(json.loads, lines)}.values())


def _write(report: Any, seconds: float) -> None:
    line = {"test": report.nodeid, "outcome": report.outcome, "reason": _reason(report), "seconds": seconds}
    with open(os.environ["OR1_VERDICTS"], "a") as file:
        file.write(json.dumps(line) + "\n")


def _reason(report: Any) -> str:
    said = report.longrepr
    if isinstance(said, tuple):  # file, line and reason of a skip
        return said[2].removeprefix("Skipped: ")
    crash = getattr(said, "reprcrash", None)
    text = crash.message if crash else str(said or "")
    return text.strip().partition("\n")[0]
