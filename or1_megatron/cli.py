"""The command `or1`. Parses, calls, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the input is at fault, 130 stopped by the user, 141 nobody reads what it prints
any more (`| head`). Libraries are imported by the subcommand that needs them, so `or1 --help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import sys
import textwrap

from or1_megatron.arguments import build_parser
from or1_megatron.commands import COMMANDS
from or1_megatron.errors import DISK_FULL, RunFailure, StopRequested, UserError

# Of a file or folder that the user named.
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """argparse takes no further words behind an option that follows the first ones: RECIPE --dry-run key=value."""
    parser = build_parser()
    options, behind = parser.parse_known_args(arguments)
    if behind and (
        options.command not in ("train", "eval", "plan", "prepare") or any(word.startswith("-") for word in behind)
    ):
        parser.error(f"unrecognized arguments: {' '.join(behind)}")
    if behind:
        options.words += behind
    return options


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone. What is still meant for it is dropped then."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in pipe.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parse(arguments)
    try:
        code = COMMANDS[options.command](options)
        sys.stdout.flush()  # here, where it is known what a reader that has gone means
        return code
    except UserError as error:
        print(f"or1: error: {error}", file=sys.stderr)
        return error.exit_code
    except RunFailure as error:
        print(f"or1: run failed: {error}", file=sys.stderr)
        if error.log_tail:
            print(textwrap.indent(error.log_tail.rstrip("\n"), "  | "), file=sys.stderr)
        return error.exit_code
    except StopRequested as error:
        print(f"or1: stopped: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("or1: stopped", file=sys.stderr)
        return StopRequested.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        if error.errno in _UNUSABLE and error.filename:
            print(f"or1: error: {error.filename}: {error.strerror}", file=sys.stderr)
            return UserError.exit_code
        if error.errno not in DISK_FULL:
            raise
        place = f" at {error.filename}" if error.filename else ""
        print(f"or1: error: the disk is full{place}; free some space or set runs_dir to another disk", file=sys.stderr)
        return UserError.exit_code
