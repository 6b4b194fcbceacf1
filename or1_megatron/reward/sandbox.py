"""The client of the fork server that gives each run of unknown code a process of its own; see forkserver.py."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from or1_megatron.errors import UserError
from or1_megatron.reward import isolation

_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from or1_megatron.reward import forkserver; "
    "forkserver.serve(sys.argv[1], int(sys.argv[2]))"
)
_START_TIMEOUT_S = 60.0
_CLEAN_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "HOME": "/nonexistent",
    "LD_BIND_NOW": "1",
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
    """A fork server and the children it makes; `level` is what isolation.LEVELS it reached. Raises SandboxFailed."""

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
        try:
            hello = self._receive()
        except SandboxFailed:
            self.close()
            raise
        self.level, self.description = hello["level"], hello["description"]
        if bubblewrap and self.level == "full":
            self.level = "namespaces"

    def start(self, role: str, descriptors: list[int], cpu_s: int) -> int:
        """A child in `role` (see forkserver.py) with the given descriptors; returns its pid. Raises SandboxFailed."""
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


def memory_file(content: bytes) -> int:
    """Descriptor of an unnamed file that holds `content`, at its start."""
    handle = os.memfd_create("or1", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]
    os.lseek(handle, 0, os.SEEK_SET)
    return handle
