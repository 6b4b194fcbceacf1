"""The fork server: gives each run of unknown code a fresh, warm, locked-down process.

It is a bare interpreter with the usual modules imported, started by sandbox.py. It holds nothing worth reading: code,
inputs and tests arrive in the child, on descriptors that the client passes through. A child gives up everything
(isolation.py) before the first line of unknown code runs. Nobody waits on pids but the server, so none is reused while
in use. What costs time in a child are the pages that it is the first to write on: whatever can be prepared is, here,
and modules that do work in every fork (threading) are left to the programs that want them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from or1_megatron.reward import isolation, referee, session

_RULES_AT = 250  # where the server keeps the landlock rules, above every descriptor that a child is given


@dataclass(frozen=True)
class _Prepared:
    """What the server has ready for every child."""

    stage: session.Stage
    rules: int  # of landlock, see isolation.landlock_rules; -1 where unsupported
    program: bytes  # of seccomp, see isolation.filter_of_any_process

    @property
    def level(self) -> str:
        return isolation.LEVELS[(self.rules >= 0) + (self.program != b"")]


def serve(root: str, handle: int) -> None:
    """The fork server's life, until its client on socket `handle` is gone. root: where it was imported from."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    isolation.die_with_parent()
    sys.path.remove(root)
    sys.argv[:] = sys.orig_argv[:] = ["solution.py"]  # a solution may look for arguments, and knows of none
    control = socket.socket(fileno=handle)
    prepared = _prepare()
    seccomp = "on" if prepared.program else "missing"
    description = f"landlock {isolation.landlock_version()}, seccomp {seccomp}, rlimits"
    control.send(json.dumps({"level": prepared.level, "description": description}).encode())
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 65536, 8)
        if not data:
            return
        request = json.loads(data)
        if "end" in request:
            control.send(json.dumps(_end(request["end"], request["patience_s"])).encode())
            continue
        pid = os.fork()
        if not pid:
            _child(request, control, descriptors, prepared)
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(json.dumps({"pid": pid}).encode())


def _prepare() -> _Prepared:
    nothing, (unread, pipe) = os.memfd_create("or1"), os.pipe()
    os.dup2(nothing, 0)
    os.dup2(pipe, 1)
    stage = session.Stage()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for place in (0, 1):
        os.dup2(nowhere, place)
    for descriptor in (nothing, unread, pipe, nowhere):
        os.close(descriptor)
    rules = isolation.landlock_rules(isolation.readable_paths())
    if rules >= 0:
        rules = os.dup2(rules, _RULES_AT, inheritable=False)
    isolation.drop_capabilities()
    program = isolation.filter_of_any_process()
    if not program or rules < 0:  # nothing else keeps a child from its parent's memory
        isolation.untraceable()
    gc.collect()
    gc.freeze()
    return _Prepared(stage, rules, program)


def _end(pid: int, patience_s: float) -> dict[str, Any]:
    handle = os.pidfd_open(pid)
    late = not select.select([handle], [], [], patience_s)[0]
    if late:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)
    _, status, usage = os.wait4(pid, 0)
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # where seccomp is missing, it may have left others
    return {"code": code, "signal": killed_by, "late": late, "cpu_s": usage.ru_utime + usage.ru_stime}


def _child(request: dict[str, Any], control: socket.socket, descriptors: list[int], prepared: _Prepared) -> None:
    """Locks itself down and plays its role. Never returns."""
    try:
        isolation.die_with_parent()
        os.setsid()
        control.close()
        _CHILDREN[request["role"]](request, descriptors, prepared)
    finally:
        os._exit(1)


def _lock(request: dict[str, Any], keep: int, prepared: _Prepared) -> None:
    """Closes every descriptor above `keep` and gives everything up. Where that fails it is no verdict on the code."""
    try:
        os.closerange(keep + 1, _RULES_AT)
        os.chdir("/")
        isolation.set_limits(request["memory_mb"], request["cpu_s"])
        isolation.enter(prepared.rules, prepared.program)
    except BaseException:
        os.kill(os.getpid(), signal.SIGKILL)


def _place(descriptors: list[int]) -> None:
    """Moves the descriptors to 3, 4, ... (first out of the way, so that none overwrites another)."""
    high = [os.dup2(descriptor, 100 + place) for place, descriptor in enumerate(descriptors)]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, 3 + place)


def _program(request: dict[str, Any], descriptors: list[int], prepared: _Prepared) -> None:
    """code, stdin, stdout"""
    code, stdin, stdout = descriptors
    program = _read_all(code).decode()
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _lock(request, 2, prepared)
    session.run_program(program, prepared.stage)


def _tested(request: dict[str, Any], descriptors: list[int], prepared: _Prepared) -> None:
    """code, inbox, outbox"""
    payload = json.loads(_read_all(descriptors[0]))
    _quiet()
    _place(descriptors[1:])
    _lock(request, 4, prepared)
    session.run_tested(payload["code"], payload["prelude"], prepared.stage, 3, 4)


def _referee(request: dict[str, Any], descriptors: list[int], prepared: _Prepared) -> None:
    """tests, inbox, outbox, verdict"""
    payload = json.loads(_read_all(descriptors[0]))
    _quiet()
    _place(descriptors[1:])
    _lock(request, 5, prepared)
    referee.run_referee(payload, 3, 4, 5)


def _quiet() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _read_all(descriptor: int) -> bytes:
    size, parts = os.fstat(descriptor).st_size, []
    while size and (part := os.pread(descriptor, size, sum(map(len, parts)))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


_CHILDREN = {"program": _program, "tested": _tested, "referee": _referee}
