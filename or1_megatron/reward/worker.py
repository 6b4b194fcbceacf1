"""A verifier process: `python -m or1_megatron.reward.worker MEMORY_MB`; JSON lines in, JSON lines out.

Prints {"ready": true} when its imports are done, then one {"verdict": ...} per {"response", "ground_truth"} line.
Its protocol has a descriptor of its own, so nothing that a library prints can disturb it. Ends at end of input or
with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

from or1_megatron.reward import math

_PR_SET_PDEATHSIG = 1


def main(memory_mb: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to the whole group; the parent decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, memory_mb * 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    math.score("\\boxed{1}", ("2",))  # loads the parser now, not within the first task's deadline
    print(json.dumps({"ready": True}), file=channel)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps({"verdict": _score(task)}), file=channel)


def _score(task: dict) -> str:
    try:
        return math.score(task["response"], tuple(task["ground_truth"]))
    except MemoryError:
        raise  # the process ends; its parent reports it, never a silent zero
    except Exception as error:  # sympy raises nearly anything on strange input
        print(f"unparsable: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
        return "unparsable"


if __name__ == "__main__":
    main(int(sys.argv[1]))
