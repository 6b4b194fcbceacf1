"""Verifier processes that cannot hang the run.

The parent keeps the deadline of every check: a worker beyond it is killed and replaced, alone, and the verdict is
`timeout`. A worker that dies by itself is replaced and the check repeated once; if the second worker dies too, the
run ends: an infrastructure error is never a reward of 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from or1_megatron.errors import RunFailure

_START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Verdict:
    name: str  # correct, wrong, unparsable or timeout
    seconds: float

    @property
    def reward(self) -> float:
        return 1.0 if self.name == "correct" else 0.0


class _Died(Exception):
    """The worker process is gone."""


class RewardService:
    """Context manager. One parent thread per worker; results come as futures, in any order."""

    def __init__(self, num_workers: int, timeout_s: float, memory_mb: int, log_dir: Path | None = None):
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._scratch = tempfile.TemporaryDirectory(prefix="or1-reward-") if log_dir is None else None
        logs = Path(self._scratch.name) if self._scratch else Path(str(log_dir))
        logs.mkdir(parents=True, exist_ok=True)
        self._tasks: queue.Queue[tuple[Future[Verdict], str, tuple[str, ...]] | None] = queue.Queue()
        self._closing = False
        self._workers = [_Worker(logs / f"reward{i}.log", memory_mb) for i in range(num_workers)]
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._workers]

    def __enter__(self) -> RewardService:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers if worker.pid]

    def submit(self, response: str, ground_truth: tuple[str, ...]) -> Future[Verdict]:
        """The verdict on a response, later. The future raises RunFailure when workers keep dying on it."""
        future: Future[Verdict] = Future()
        self._tasks.put((future, response, ground_truth))
        return future

    def close(self) -> None:
        """Ends every worker; unfinished checks fail."""
        self._closing = True
        for _ in self._threads:
            self._tasks.put(None)
        for worker in self._workers:
            worker.kill()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=2.0)
        if self._scratch:
            self._scratch.cleanup()

    def _serve(self, worker: _Worker) -> None:
        while (task := self._tasks.get()) is not None:
            future, response, ground_truth = task
            try:
                future.set_result(self._check(worker, response, ground_truth))
            except Exception as error:  # handed to whoever waits for the verdict
                future.set_exception(error)

    def _check(self, worker: _Worker, response: str, ground_truth: tuple[str, ...]) -> Verdict:
        started = time.monotonic()
        for _ in range(2):
            if self._closing:
                raise RunFailure("the reward service was closed")
            try:
                worker.ensure_started()
                name = worker.ask({"response": response, "ground_truth": ground_truth}, self._timeout_s)
                return Verdict(name, time.monotonic() - started)
            except TimeoutError:
                worker.kill()
                return Verdict("timeout", time.monotonic() - started)
            except _Died:
                worker.kill()
        raise RunFailure(f"a reward worker died twice on the same response; its log is {worker.log}", worker.tail())


class _Worker:
    """One child process and its pipes; started when first needed, and again after its death."""

    def __init__(self, log: Path, memory_mb: int):
        self.log, self._memory_mb = log, memory_mb
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def ensure_started(self) -> None:
        """Raises _Died when the process ends before it is ready."""
        if self._process is not None:
            return
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "or1_megatron.reward.worker", str(self._memory_mb)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        self._received = b""
        if not self._read(time.monotonic() + _START_TIMEOUT_S).get("ready"):
            raise _Died

    def ask(self, task: dict[str, Any], timeout_s: float) -> str:
        """Raises TimeoutError at the deadline and _Died when the process ends."""
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise _Died from None
        return self._read(time.monotonic() + timeout_s)["verdict"]

    def _read(self, deadline: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._received:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            chunk = os.read(pipe, 65536)
            if not chunk:
                raise _Died
            self._received += chunk
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
