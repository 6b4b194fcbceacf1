"""The verifier processes: `python -m or1_megatron.reward.worker CONTROL SETTINGS`, started by service.py.

The process that is started, the template, imports Math-Verify once and then forks a worker whenever it is asked to:
a killed worker is replaced within milliseconds. Messages have sockets of their own (frames.py), so nothing that a
library prints can disturb them. Everything ends with its parent.

    control   service -> template: {"fork": true} + socket | {"reap": pid};   template -> service: {"pid"} | {"status"}
    worker    service -> worker: a task;   worker -> service: {"ready"} once, then {"verdict", "detail", "rss_mb"}
              or {"error"}: the check could not be made, which says nothing about the response
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import traceback
from typing import Any

from or1_megatron.errors import UserError
from or1_megatron.reward import code, isolation, math
from or1_megatron.reward.frames import frame, take_frame
from or1_megatron.reward.problem import code_tests
from or1_megatron.reward.response import after_reasoning
from or1_megatron.reward.sandbox import Sandbox, SandboxFailed
from or1_megatron.reward.session import EXIT_MEMORY

_PAGE = resource.getpagesize()


def main(control: socket.socket, settings: dict[str, Any]) -> None:
    """The template's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to the whole group; the parent decides
    isolation.die_with_parent()
    isolation.untraceable()  # a worker holds tests, and not every kernel keeps tested code from its memory
    isolation.adopt_orphans()
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    math.warm_up()
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"ready": True}).encode())
    workers: dict[int, int | None] = {}  # pid: wait status once it has ended
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
        _reap(workers, os.WNOHANG)
        if not data:
            break
        request = json.loads(data)
        if "reap" in request:
            status = workers.pop(request["reap"])
            control.send(
                json.dumps({"status": os.waitpid(request["reap"], 0)[1] if status is None else status}).encode()
            )
            continue
        pid = os.fork()
        if not pid:
            isolation.die_with_parent()
            control.close()
            _serve(socket.socket(fileno=descriptors[0]), settings)
        workers[pid] = None
        os.close(descriptors[0])
        control.send(json.dumps({"pid": pid}).encode())
    for pid in [pid for pid, status in workers.items() if status is None]:
        os.kill(pid, signal.SIGKILL)
    _reap(workers, 0)


def _reap(workers: dict[int, int | None], options: int) -> None:
    """Collects children that have ended: workers, and as a subreaper also whatever a killed worker left behind."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, options))[0]:
            if ended[0] in workers:
                workers[ended[0]] = ended[1]


def _serve(channel: socket.socket, settings: dict[str, Any]) -> None:
    """A worker's life. Never returns."""
    ready = False
    try:
        _, most = resource.getrlimit(resource.RLIMIT_AS)  # stays: tested code may be allowed more than a worker
        resource.setrlimit(resource.RLIMIT_AS, (settings["memory_mb"] * 2**20, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        bytes(32 * 2**20)  # never touched; a limit that leaves no room would make every verdict `memory`
        verifier = Verifier(settings)
        channel.sendall(frame({"ready": True}))
        ready = True
        while (task := receive(channel)) is not None:
            channel.sendall(frame({**verifier.score(task), "rss_mb": _rss_mb()}))
        os._exit(0)
    except MemoryError:
        if not ready:
            traceback.print_exc()
        os._exit(EXIT_MEMORY if ready else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    finally:
        os._exit(1)


class Verifier:
    """Scores tasks; starts its sandbox at the first one that is code."""

    def __init__(self, settings: dict[str, Any]):
        self._settings = settings
        self._limits = code.Limits(settings["code_timeout_s"], settings["code_total_s"])
        self._sandbox: Sandbox | None = None

    def score(self, task: dict[str, Any]) -> dict[str, str]:
        """{"verdict", "detail"}, or {"error"}."""
        if task["truncated"] and self._settings["truncated"] == "zero":
            return {"verdict": "truncated", "detail": "cut at the length limit"}
        try:
            verdict, detail = self._score(task)
        except MemoryError:
            raise  # the process is in an unknown state; its exit code is the verdict
        except (code.Interrupted, UserError) as error:
            return {"error": str(error)}
        except SandboxFailed as error:
            self._sandbox = None
            return {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        if task["truncated"] and verdict == "unparsable":
            verdict, detail = "truncated", "cut at the length limit before an answer"
        return {"verdict": verdict, "detail": detail}

    def _score(self, task: dict[str, Any]) -> tuple[str, str]:
        text = after_reasoning(
            task["response"],
            reasoning_open=task["reasoning_open"],
            unclosed=self._settings["unclosed_reasoning"],
        )
        if text is None:
            return "unparsable", "the reasoning never ends"
        gold = tuple(task["ground_truth"])
        tests = code_tests(gold, task["data_source"])
        if tests is None:
            return math.score(text, gold), ""
        if self._sandbox is None:
            required = self._settings["require_isolation"]
            sandbox = Sandbox(self._settings["code_memory_mb"], bubblewrap=required == "namespaces")
            try:
                isolation.require(sandbox.level, required, sandbox.description)
            except UserError:
                sandbox.close()
                raise
            self._sandbox = sandbox
        return code.score(text, tests, self._sandbox, self._limits)


def receive(channel: socket.socket) -> dict[str, Any] | None:
    """The next task, which comes when the one before is answered; None when the other end is closed."""
    received = bytearray()
    while (message := take_frame(received)) is None:
        part = channel.recv(2**20)
        if not part:
            return None
        received += part
    return {**message[0], "response": message[1]}


def _rss_mb() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE // 2**20


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]))
