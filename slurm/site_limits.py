"""What this cluster would refuse, asked before anything is written. Standard library only, Python 3.8 or newer.

`sbatch --test-only` finds too many nodes, GPUs or CPUs and an unknown partition; a time above the partition's limit,
an account or a QOS that are not one's own it lets through, and the job then waits for ever.
"""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess


class Refused(Exception):
    """One line: what, the value, the fix."""


def minutes(text: str) -> float | None:
    """Slurm's times (MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM[:SS]) in minutes; None: no limit. Raises Refused."""
    if text.lower() in ("infinite", "unlimited", "0"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise Refused(f"--time {text} is no time; use D-HH:MM:SS, HH:MM:SS or minutes")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match.group(1):
        return days * 1440 + first * 60 + second + third / 60
    if match.group(4):
        return first * 60 + second + third / 60
    return first + second / 60


def ask(*words: str) -> str | None:
    """What a Slurm command, or git, prints; None where it fails or is not there."""
    if shutil.which(words[0]) is None:
        return None
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def check(partition: str, time: str, nodes: int, gpus: int, account: str, qos: str) -> None:
    """Raises Refused for the first thing that this cluster would not run."""
    if shutil.which("sbatch") is None:
        raise Refused("no sbatch on PATH: submit from a login node; without Slurm use launch/ray_cluster.sh")
    rows = [line.split("|") for line in (ask("sinfo", "-h", "-o", "%P|%D|%l|%G|%a") or "").splitlines()]
    if not rows:
        raise Refused("sinfo shows no partition: is Slurm's controller up?")
    names = sorted({row[0].rstrip("*") for row in rows})
    refusals = []
    for name in partition.split(","):  # Slurm takes the first that can run the job
        wanted = [row for row in rows if (row[0].rstrip("*") == name if name else row[0].endswith("*"))]
        if not wanted:
            raise Refused(f"--partition {name or '(none)'} is none of this cluster's: {', '.join(names)}")
        refusals.append(_refusal(wanted, time, nodes, gpus))
    if all(refusals):
        raise Refused(refusals[0])
    _check_account(account, qos)


def _refusal(partition: list[list[str]], time: str, nodes: int, gpus: int) -> str:
    """Why this partition, sinfo's rows of it, would not run the job; empty when it would."""
    name, limit = partition[0][0].rstrip("*"), minutes(partition[0][2])
    if all(row[4] != "up" for row in partition):
        return f"partition {name} is down"
    there = sum(int(row[1]) for row in partition if _gpus(row[3]) >= gpus)
    if there < nodes:
        return f"--nodes {nodes}: partition {name} has {there} nodes with {gpus} GPUs"
    asked = minutes(time)
    if limit is not None and (asked is None or asked > limit):
        return f"--time {time} is above the limit of partition {name}, {partition[0][2]}"
    return ""


def _gpus(gres: str) -> int:
    """'gpu:h800:8(S:0-1),x:1' -> 8."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


def _check_account(account: str, qos: str) -> None:
    """Where the cluster keeps accounts: is this one's own?"""
    words = ("sacctmgr", "-n", "-P", "show", "assoc", "user=" + getpass.getuser(), "format=account,qos")
    rows: list[list[str]] = []
    if (account or qos) and shutil.which("sacctmgr"):
        rows = [line.split("|") for line in (ask(*words) or "").splitlines() if "|" in line]
    if not rows:
        return
    accounts = sorted({row[0] for row in rows})
    if account and account not in accounts:
        raise Refused(f"--account {account} is none of yours: {', '.join(accounts)}")
    qualities = sorted({name for row in rows if not account or row[0] == account for name in row[1].split(",")})
    if qos and qos not in qualities:
        raise Refused(f"--qos {qos} is none of yours: {', '.join(qualities)}")
