"""A real Slurm on this machine for a test, and jobs submitted to it as a user does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
STUB = Path(__file__).with_name("stub_program.py")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")


def missing() -> str:
    """Why no Slurm can be started here; empty when it can."""
    if os.geteuid() != 0:
        return "needs root, to give every node of a Slurm its own namespaces"
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)}: apt-get install --no-install-recommends slurm-wlm munge iproute2"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], check=False).returncode:
        return "needs leave to make namespaces (a container without CAP_SYS_ADMIN?)"
    return ""


class SlurmCluster:
    """Context manager: starts nodes, stops them and everything in them."""

    def __init__(self, shared: Path, nodes: int, gpus: int = 1, names: str = "", also: str | Path = ""):
        self.shared = shared
        self.root = Path(f"/tmp/or1-slurm-{os.getpid()}-{time.monotonic_ns() % 10**6}")
        self.names = names.split() or [f"node{i + 1}" for i in range(nodes)]
        self._settings = {
            "NODES": str(nodes),
            "GPUS": str(gpus),
            "NAMES": names,
            "SHARED": f"{REPOSITORY} {shared} {also}",
        }

    def __enter__(self) -> SlurmCluster:
        try:
            subprocess.run([SCRIPT, "start", self.root], check=True, env={**os.environ, **self._settings}, timeout=90)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([SCRIPT, "stop", self.root], check=False, timeout=60)

    def login(
        self, *command: str | Path, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the login node."""
        return subprocess.run(
            [self.root / "login", *command], check=False, capture_output=True, text=True, timeout=120,
            cwd=cwd or self.shared, env={**os.environ, **environment},
        )  # fmt: skip

    def submit(
        self, recipe: Path, *words: str, run: Path | None = None, cwd: Path | None = None, **environment: str
    ) -> Job:
        """Submits by slurm/submit.py, by default into a folder of its own; asserts that it was taken."""
        run = run or self.shared / f"run-{len(list(self.shared.glob('run-*')))}"
        done = self.try_submit(recipe, f"--run-dir={run}", *words, cwd=cwd, **environment)
        assert done.returncode == 0, done.stderr
        return Job(self, run, (run / "slurm" / "jobs").read_text().split()[-1])

    def try_submit(
        self, recipe: Path, *words: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        script = REPOSITORY / "slurm" / "submit.py"
        options = (f"--python={sys.executable}", "--object-store-gb=0.1", "--time=30", "--lead=5", "--gpus-per-node=1")
        return self.login("python3", script, recipe, *options, *words, cwd=cwd, **environment)

    def stub(self, recipe: Path, *words: str, steps: int = 400, run: Path | None = None, **environment: str) -> Job:
        """Submits the stub in place of training, for so many steps."""
        return self.submit(
            recipe, f"--program={STUB}", *words, run=run, cwd=None, STUB_STEPS=str(steps), **environment
        )  # fmt: skip

    def pid(self, name: str, program: str = "") -> int:
        """The process whose death is the node's power cut, or one of the node's programs (bash is its init)."""
        top = psutil.Process(int((self.root / "run" / f"{name}.pid").read_text()))
        return top.pid if not program else next(p.pid for p in top.children(recursive=True) if p.name() == program)

    def inside(self, name: str) -> list[str]:
        """The command that enters a node."""
        return ["nsenter", f"--target={self.pid(name, 'init')}", "--net", "--pid", "--mount", "--uts", "--ipc"]

    def boot(self, name: str) -> None:
        subprocess.run([self.root / "boot", str(self.names.index(name))], check=True)

    def on(self, name: str, *command: str) -> subprocess.Popen[str]:
        """Starts a command on the node, as another program of that node."""
        return subprocess.Popen([*self.inside(name), *command], text=True, stdout=subprocess.PIPE)


class Job:
    """One submitted job."""

    def __init__(self, cluster: SlurmCluster, run: Path, id: str):
        self.cluster, self.run, self.id = cluster, run, id

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in (self.run / "slurm").glob("*.out"))

    def record(self) -> str:
        return self.cluster.login("scontrol", "show", "job", self.id).stdout

    def show(self, field: str) -> str:
        found = [word.partition("=")[2] for word in self.record().split() if word.startswith(f"{field}=")]
        return found[0] if found else ""

    def rows(self) -> list[dict]:
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def await_steps(self, steps: int, timeout_s: float = 150) -> None:
        self._await(lambda: len(self.rows()) >= steps, f"{steps} steps", timeout_s)

    def await_state(self, *states: str, timeout_s: float = 150) -> str:
        self._await(lambda: self.show("JobState") in states, f"state {states}", timeout_s)
        return self.show("JobState")

    def await_text(self, text: str, timeout_s: float = 150) -> None:
        self._await(lambda: text in self.log, text, timeout_s)

    def hosts(self) -> list[str]:
        return self.cluster.login("scontrol", "show", "hostnames", self.show("NodeList")).stdout.split()

    def _await(self, reached, what: str, timeout_s: float) -> None:  # noqa: ANN001
        deadline = time.monotonic() + timeout_s
        pending_since = float("inf")
        while not reached():
            now = time.monotonic()
            assert now < deadline, f"not in {timeout_s} s: {what}\n{self.record()}\n{self.log}\n{self.tails()}"
            if self.show("JobState") != "PENDING":
                pending_since = float("inf")
            elif now > (pending_since := min(pending_since, now)) + 3:
                # A requeued job waits for two minutes. Begun at once, it would be ended by the news that its batch
                # script before has ended.
                pending_since = float("inf")
                self.cluster.login("scontrol", "update", f"JobId={self.id}", "StartTime=now")
            time.sleep(0.5)

    def tails(self) -> str:
        logs = sorted(self.run.glob("slurm/job-*/attempt-*/*.log"))
        return "\n".join(f"{path.relative_to(self.run)}: {path.read_text()[-600:]}" for path in logs)

    def cancel(self) -> None:
        self.cluster.login("scancel", self.id)
        self.await_state("CANCELLED", "COMPLETED", "FAILED", timeout_s=60)
