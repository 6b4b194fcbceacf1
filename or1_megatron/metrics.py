"""The metrics of a run: metrics.jsonl, and the same numbers on the boards of boards.py."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from or1_megatron.boards import Boards
from or1_megatron.config import Config
from or1_megatron.parallel.file_sums import publish_text
from or1_megatron.runfiles import read_metrics


class Metrics:
    """Of the run in the folder `path`; `close` it at the end."""

    def __init__(self, path: Path, config: Config):
        self.config = config
        self._path = path
        self._first_step: int | None = None
        self._opened: Boards | None = None

    def message(self, text: str) -> None:
        """For the user; a run puts its display's in this place."""
        print(text, file=sys.stderr, flush=True)

    def open_boards(self) -> None:
        """What the first `log` does else. Raises UserError when a board cannot be opened."""
        self._boards.open()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends one line {"step": step, ...} and gives the same to the boards."""
        line = json.dumps({"step": step, **{name: _finite(value) for name, value in metrics.items() if name != "step"}})
        with self._file.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._boards.log(step, metrics)

    def read(self) -> list[dict[str, Any]]:
        """See runfiles.read_metrics."""
        return read_metrics(self._path)

    def rewind(self, step: int) -> None:
        """Forgets what is after `step`: the run goes on from there."""
        kept = [metrics for metrics in self.read() if metrics["step"] <= step]
        publish_text(self._file, "".join(json.dumps(metrics) + "\n" for metrics in kept))
        self._first_step = step + 1

    def close(self) -> None:
        if self._opened:
            self._opened.close()
            self._opened = None

    @property
    def _file(self) -> Path:
        return self._path / "metrics.jsonl"

    @property
    def _boards(self) -> Boards:
        if self._opened is None:
            self._opened = Boards(self._path, self.config, self._first_step, self.message)
        return self._opened


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
