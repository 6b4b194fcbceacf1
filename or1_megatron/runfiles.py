"""What others find in a run folder: its files read back, for those who look at a run from outside too.

A file that was cut, as by a copy that broke off, is the user's to remove or to copy anew: each reader raises UserError
with one line that names it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from or1_megatron.errors import UserError


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl, oldest first; a torn last one is left out. Raises UserError for any other that is
    not a line of a run."""
    path = run / "metrics.jsonl"
    # split, not splitlines: text inside a JSON string may hold other line separators
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path} line {number} is no JSON object with a step; remove that line")
        rows.append(row)
    return rows


def ends_run(row: dict[str, Any]) -> bool:
    """Whether this line of metrics.jsonl is the one behind the last push and evaluation."""
    return "seconds/sync" in row and "seconds/step" not in row


def read_object(path: Path) -> dict[str, Any]:
    """Raises UserError when the file does not hold one JSON object."""
    try:
        found = json.loads(path.read_bytes().decode())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy it anew, or remove it") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}, not an object; copy it anew, or remove it")
    return found


def read_trace(path: Path) -> dict[str, Any]:
    """trace.json. Raises UserError when it is not a trace that a run wrote."""
    trace = read_object(path)
    try:
        trace["traceEvents"][0]["ph"]
    except (TypeError, KeyError, IndexError):
        raise UserError(f"{path} is not a trace that a run has written; copy it anew, or remove it") from None
    return trace


def read_columns(path: Path, names: list[str] | None = None) -> dict[str, list[Any]]:
    """The named columns of a .parquet file, None: all. Raises UserError when it cannot be read or lacks one."""
    from pyarrow import parquet

    try:
        return parquet.read_table(path, columns=names).to_pydict()
    except (ValueError, OSError) as error:  # pyarrow's errors are these
        reason = (str(error) or type(error).__name__).splitlines()[0].removesuffix(".")
        raise UserError(f"{path} cannot be read: {reason}; copy it anew, or remove it") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .parquet file. Raises as read_columns does."""
    columns = read_columns(path)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
