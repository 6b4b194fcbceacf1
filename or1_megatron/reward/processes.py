"""The parent's handles on the verifier processes of worker.py: the template that forks workers, and one worker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from or1_megatron.profiling.spans import Span
from or1_megatron.reward.frames import frame, take_frame

_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 2.0
_FAIR_CPU_S = 0.25
_MOST_LIMITS = 3


class Lost(Exception):
    """The process is gone, or does not answer where it must."""


class Template:
    """The process that has everything imported. Must be started by a thread that outlives it: it dies with that."""

    def __init__(self, settings: dict[str, Any], log: Path, spans: deque[Span]):
        """Returns when it is ready; its workers' checks will be noted in `spans`. Raises Lost."""
        self.spans = spans
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "or1_megatron.reward.worker", str(theirs.fileno()), json.dumps(settings)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment,
            )
        self._control = ours
        ours.settimeout(_START_TIMEOUT_S)
        try:
            self._receive()
        except Lost:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self) -> WorkerProcess:
        """A worker that gets ready by itself. Raises Lost."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b'{"fork": true}'], [theirs.fileno()])
            except OSError:
                raise Lost("the template is gone") from None
        try:
            return WorkerProcess(self._receive()["pid"], ours, self)
        except (Lost, ProcessLookupError):
            ours.close()
            raise Lost("the template is gone") from None

    def reap(self, pid: int) -> int:
        """The wait status of a worker that has ended. Raises Lost."""
        try:
            self._control.send(json.dumps({"reap": pid}).encode())
        except OSError:
            raise Lost("the template is gone") from None
        return self._receive()["status"]

    def close(self) -> None:
        """Ends it with all that came from it."""
        self._control.close()
        try:
            self._process.wait(_END_TIMEOUT_S)  # it kills its workers and waits for them: no zombies for init
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> dict[str, Any]:
        try:
            data = self._control.recv(4096)
        except OSError:
            data = b""
        if not data:
            raise Lost("the template is gone")
        return json.loads(data)


class WorkerProcess:
    """One worker: its socket, never blocking, and the job it is on."""

    def __init__(self, pid: int, channel: socket.socket, template: Template):
        self.pid, self.channel, self.template = pid, channel, template
        self._handle = os.pidfd_open(pid)  # the template reaps only when told: the pid is still this process
        channel.setblocking(False)
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self.ready = False
        self.in_background = self.paused = False
        self.num_done = 0
        self.job: Any = None
        self.gold: object = None  # of its last job
        self.started = time.monotonic()
        self._cpu_at_start = 0.0

    def begin(self, job: Any, values: dict[str, Any], text: str) -> None:
        self.job, self.started, self._cpu_at_start = job, time.monotonic(), self._cpu()
        self.gold = job.gold
        self._unsent = memoryview(frame(values, text))
        self.flush()

    def end(self) -> Any:
        """The job it was on, None if it was on none."""
        job, self.job = self.job, None
        if job is not None:
            self.template.spans.append(Span("check", int(self.started * 1e9), time.monotonic_ns(), 0))
        return job

    @property
    def wants_to_write(self) -> bool:
        return bool(self._unsent)

    def flush(self) -> None:
        """Writes what the socket takes; a dead reader is found when reading."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._unsent:
                self._unsent = self._unsent[self.channel.send(self._unsent) :]

    def read(self) -> dict[str, Any] | None:
        """The next whole message, None while there is none. Raises Lost at the end of the stream."""
        with contextlib.suppress(BlockingIOError):
            try:
                data = self.channel.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                raise Lost("the worker is gone")
            self._received += data
        message = take_frame(self._received)
        return message[0] if message else None

    def pause(self) -> None:
        """Stops it until resume(); its job is then in the background for good."""
        self.in_background = self.paused = True
        self._signal(signal.SIGSTOP)

    def resume(self, limit_s: float) -> None:
        """Of its time limit at least half is left."""
        self.paused, self._cpu_at_start = False, self._cpu()
        self.started = max(self.started, time.monotonic() - limit_s / 2)
        self._signal(signal.SIGCONT)

    def is_out_of_time(self, limit_s: float) -> bool:
        """In the background only after some CPU time too, but at most so many limits: it may never compute."""
        spent = time.monotonic() - self.started
        fair = not self.in_background or self.cpu_spent() >= _FAIR_CPU_S or spent >= _MOST_LIMITS * limit_s
        return spent >= limit_s and fair

    def cpu_spent(self) -> float:
        """Seconds of CPU time on its job, since resume() where it was paused."""
        return self._cpu() - self._cpu_at_start

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        self.channel.close()
        os.close(self._handle)

    def _cpu(self) -> float:
        try:
            return time.clock_gettime((~self.pid << 3) | 2)  # clock_getcpuclockid(3); /proc counts in steps of 10 ms
        except OSError:  # it is gone
            return 0.0
