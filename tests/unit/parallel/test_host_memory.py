"""In a process of its own, as what is set holds for all of it: the same tensors again need no new pages, and all pages
are given back when asked."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, resource, sys, psutil, torch
from or1_megatron.parallel.host_memory import keep_freed_memory, trim_host_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = torch.ones(1 << 10)
    a, b = torch.ones(12 << 20), torch.ones(1 << 20)  # 48 and 4 MiB
    del a
    after = torch.ones(1 << 10)
    del b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(10):  # some holes are a little too small for what comes next
    faults()
again = faults()
resident = psutil.Process().memory_info().rss
trim_host_memory()
print(json.dumps({"faults": again, "given back": resident - psutil.Process().memory_info().rss}))
"""


def measure(how: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_freed_memory_is_kept_until_it_is_trimmed() -> None:
    kept, left = measure("keep"), measure("leave")
    assert left["faults"] > 10_000, "malloc keeps large tensors by itself: this test shows nothing"
    assert kept["faults"] < 100
    assert kept["given back"] > 40 << 20


THREAD = """
import resource, threading, torch
from or1_megatron.parallel.host_memory import keep_freed_memory

def work():
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        large, last = [torch.ones(12 << 20) for _ in range(3)], torch.ones(1 << 20)
        del large
        after = torch.ones(1 << 10)
        del last, after
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults = []
keep_freed_memory()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults[-1])
"""


def test_what_another_thread_frees_is_kept_too() -> None:
    done = subprocess.run([sys.executable, "-c", THREAD], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100
