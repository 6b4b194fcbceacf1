"""The two ways a command ends badly, and the exit code each one carries.

`UserError`: the input is at fault. One line that names the place, the value and the fix; exit code 2; nothing
has been written. `RunFailure`: a part of a running system died or disagreed; exit code 1.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk itself, a quota, a file's largest size


def either(numbers: list[int]) -> str:
    """Choices as words: '1, 2 or 4'."""
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def no_folder(path: Path) -> str:
    """Why `path` is no folder, in words."""
    return "is a file" if path.exists() else "does not exist"


class UserError(ValueError):
    """Bad input. The message is one line: what, where, the value, the fix."""

    exit_code = 2


class RunFailure(RuntimeError):
    """A process died, a deadline passed or a probe failed while a run was going on.

    `log_tail` holds the last lines that the dead process wrote, for the terminal.
    """

    exit_code = 1

    def __init__(self, message: str, log_tail: str = ""):
        super().__init__(message)
        self.log_tail = log_tail


class WorkerDied(RunFailure):
    """A rank or an engine died, failed or brought nothing until the deadline. `workers` are these, as cluster/ knows
    them."""

    def __init__(self, message: str, log_tail: str, workers: list[Any]):
        super().__init__(message, log_tail)
        self.workers = workers


class StopRequested(RuntimeError):
    """Ctrl-C or SIGTERM: the run saves the last completed step and ends; exit code 130."""

    exit_code = 130
