"""`or1 report`: writes report.html and report.json, or serves the page of a running run on loopback."""

from __future__ import annotations

import dataclasses
import http.server
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from or1_megatron.errors import UserError
from or1_megatron.parallel.file_sums import publish_text
from or1_megatron.report.advice import advice
from or1_megatron.report.page import page
from or1_megatron.report.rundata import RunData, read_run
from or1_megatron.report.scales import thinned

REFRESH_S = 5


def summary(run: RunData) -> dict[str, Any]:
    """What report.json says of one run."""
    names = sorted({name for row in run.steps for name, value in row.items() if isinstance(value, int | float)})
    return {
        "name": run.name,
        "steps": len(run.steps),
        "hours": run.hours(),
        "seconds_per_step": {
            name.removeprefix("seconds/"): run.total(name) / len(run.steps) for name in names if "seconds/" in name
        },
        "evaluations": run.evaluations,
        "tail": dataclasses.asdict(run.tail) if run.tail else None,
        "lengths": {"count": len(run.lengths), "longest": max(run.lengths, default=0), "cut_at": run.limit},
        "advice": advice(run),
        "series": {name: thinned(run.series(name), largest=name.endswith("/max")) for name in names if name != "step"},
        "examples": [dataclasses.asdict(example) for example in run.examples],
    }


def report(paths: Sequence[Path], out: Path | None) -> list[Path]:
    """Writes both files into `out`, by default the first run's folder. Raises UserError, nothing half-written."""
    if out and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    runs = [read_run(path) for path in paths]
    folder = out or runs[0].folder.path
    texts = {"report.html": page(runs), "report.json": json.dumps([summary(run) for run in runs]) + "\n"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        publish_text(folder / name, text)
    return [folder / name for name in texts]


def watch(paths: Sequence[Path], port: int, ready: Callable[[str], None]) -> None:
    """Serves the page on 127.0.0.1 until Ctrl-C, drawn anew at each request; port 0: any free one.

    `ready` is told the address. Raises UserError when a folder is none, or the port is taken.
    """
    for path in paths:
        if not (path / "config.yaml").is_file():
            raise UserError(
                f"{path} is not a run folder: it holds no config.yaml; give the directory `or1 train` printed"
            )
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _handler(paths))
    except OverflowError:
        raise UserError(f"--port {port}: use 1 to 65535, or 0 for any free one") from None
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; choose another, or 0 for any free one") from None
    with server:
        ready(f"http://127.0.0.1:{server.server_address[1]}/")
        server.serve_forever()


def _handler(paths: Sequence[Path]) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            try:
                text = page([read_run(path) for path in paths], REFRESH_S)
            except UserError as error:  # no step yet: the page comes by itself
                text = f"<!doctype html><meta http-equiv=refresh content={REFRESH_S}><p>{error}"
            data = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
