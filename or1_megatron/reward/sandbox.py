"""The fork server that gives each run of unknown code a fresh, warm, locked-down process; and its client.

The server is a bare interpreter with the usual modules imported. It holds nothing worth reading: code, inputs and
tests arrive in the child, on descriptors that the client passes through. A child gives up everything (isolation.py)
before the first line of unknown code runs. Nobody waits on pids but the server, so none is reused while in use.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from or1_megatron.errors import UserError
from or1_megatron.reward import isolation, referee, session

_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from or1_megatron.reward import sandbox; sandbox.serve(int(sys.argv[2]))"
)
_START_TIMEOUT_S = 60.0
_RULES_AT = 250  # where the server keeps the landlock rules, above every descriptor that a child is given
_CLEAN_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "HOME": "/nonexistent",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Ending:
    """How a child ended: exit code, or the signal that killed it; `late` when the client's patience ran out."""

    code: int
    signal: int
    late: bool
    cpu_s: float


class SandboxFailed(Exception):
    """The fork server is gone or does not start."""


class Sandbox:
    """A fork server and the children it makes; `level` is what isolation.LEVELS it reached."""

    def __init__(self, memory_mb: int, bubblewrap: bool = False):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Isolated but for the environment, which is ours: -I would ignore its fixed hash seed.
            # By its real path, where a symlinked environment is found inside bubblewrap too.
            python = os.path.join(os.path.realpath(sys.prefix), "bin", os.path.basename(sys.executable))
            command = [python, "-s", "-P", "-c", _BOOT, _ROOT, str(theirs.fileno())]
            self._process = subprocess.Popen(
                (bubblewrap_prefix() if bubblewrap else []) + command,
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env=_CLEAN_ENVIRONMENT, cwd="/", start_new_session=True,
            )  # fmt: skip
        self._socket, self._memory_mb = ours, memory_mb
        ours.settimeout(_START_TIMEOUT_S)
        hello = self._receive()
        self.level, self.description = hello["level"], hello["description"]
        if bubblewrap and self.level == "full":
            self.level = "namespaces"

    def start(self, role: str, descriptors: list[int], cpu_s: int) -> int:
        """A child in `role` (see _CHILDREN) with the given descriptors; returns its pid. Raises SandboxFailed."""
        request = {"role": role, "memory_mb": self._memory_mb, "cpu_s": cpu_s}
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        except OSError:
            raise SandboxFailed("the fork server is gone") from None
        return self._receive()["pid"]

    def end(self, pid: int, patience_s: float) -> Ending:
        """Waits for the child, at most patience_s, then kills it. Raises SandboxFailed."""
        try:
            self._socket.settimeout(patience_s + _START_TIMEOUT_S)
            self._socket.send(json.dumps({"end": pid, "patience_s": patience_s}).encode())
        except OSError:
            raise SandboxFailed("the fork server is gone") from None
        return Ending(**self._receive())

    def close(self) -> None:
        """Ends the server and every child."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _receive(self) -> dict[str, Any]:
        try:
            data = self._socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            raise SandboxFailed("the fork server is gone")
        return json.loads(data)


def bubblewrap_prefix() -> list[str]:
    """The bwrap command line: the libraries read-only, nothing else there, no namespace shared. Raises UserError."""
    binary = shutil.which("bwrap")
    if not binary:
        raise UserError(
            "reward.require_isolation=namespaces needs bubblewrap, and no bwrap is on PATH; install bubblewrap or use "
            "reward.require_isolation=full"
        )
    prefix = [binary, "--unshare-all", "--die-with-parent", "--new-session", "--dev", "/dev", "--cap-drop", "ALL"]
    ours = {os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix), str(Path(_ROOT, "or1_megatron"))}
    for path in sorted(path for path in {*ours, *isolation.SYSTEM_PATHS} if os.path.exists(path)):
        prefix += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    return [*prefix, "--"]


# ---- the server


def serve(handle: int) -> None:
    """The fork server's life, until its client is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    isolation.die_with_parent()
    sys.path.remove(_ROOT)
    control = socket.socket(fileno=handle)
    names = session.preloaded_names()
    rules = isolation.landlock_rules(isolation.readable_paths())
    if rules >= 0:
        rules = os.dup2(rules, _RULES_AT, inheritable=False)
    filtered = isolation.can_filter()
    level = "full" if rules >= 0 and filtered else "partial" if rules >= 0 or filtered else "rlimits"
    description = f"landlock {isolation.landlock_version()}, seccomp {'on' if filtered else 'missing'}, rlimits"
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    gc.freeze()
    control.send(json.dumps({"level": level, "description": description}).encode())
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
            _child(request, control, descriptors, rules, filtered, names)
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(json.dumps({"pid": pid}).encode())


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


def _child(
    request: dict[str, Any],
    control: socket.socket,
    descriptors: list[int],
    rules: int,
    filtered: bool,
    names: dict[str, Any],
) -> None:
    """Locks itself down and plays its role. Never returns."""
    try:
        isolation.die_with_parent()
        os.setsid()
        control.close()
        _CHILDREN[request["role"]](request, descriptors, rules, filtered, names)
    finally:
        os._exit(1)


def _lock(request: dict[str, Any], keep: int, rules: int, filtered: bool) -> None:
    """Closes every descriptor above `keep` and gives everything up."""
    os.closerange(keep + 1, _RULES_AT)
    os.chdir("/")
    isolation.set_limits(request["memory_mb"], request["cpu_s"])
    isolation.drop_capabilities()
    isolation.enter(rules, filtered)


def _place(descriptors: list[int]) -> None:
    """Moves the descriptors to 3, 4, ... (first out of the way, so that none overwrites another)."""
    high = [os.dup2(descriptor, 100 + place) for place, descriptor in enumerate(descriptors)]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, 3 + place)


def _program(request: dict[str, Any], descriptors: list[int], rules: int, filtered: bool, names: dict) -> None:
    """code, stdin, stdout"""
    code, stdin, stdout = descriptors
    payload = json.loads(_read_all(code))
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _lock(request, 2, rules, filtered)
    session.run_program(payload["code"], names)


def _tested(request: dict[str, Any], descriptors: list[int], rules: int, filtered: bool, names: dict) -> None:
    """code, inbox, outbox"""
    payload = json.loads(_read_all(descriptors[0]))
    _quiet()
    _place(descriptors[1:])
    _lock(request, 4, rules, filtered)
    session.run_tested(payload["code"], payload["prelude"], names, 3, 4)


def _referee(request: dict[str, Any], descriptors: list[int], rules: int, filtered: bool, names: dict) -> None:
    """tests, inbox, outbox, verdict"""
    payload = json.loads(_read_all(descriptors[0]))
    _quiet()
    _place(descriptors[1:])
    _lock(request, 5, rules, filtered)
    referee.run_referee(payload, 3, 4, 5)


def _quiet() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _read_all(descriptor: int) -> bytes:
    parts = []
    place = 0
    while part := os.pread(descriptor, 2**24, place):
        parts.append(part)
        place += len(part)
    return b"".join(parts)


_CHILDREN = {"program": _program, "tested": _tested, "referee": _referee}


def memory_file(content: bytes) -> int:
    """Descriptor of an unnamed file that holds `content`, at its start."""
    handle = os.memfd_create("or1", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]
    os.lseek(handle, 0, os.SEEK_SET)
    return handle
