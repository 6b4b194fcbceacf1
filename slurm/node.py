"""What the batch job runs on every node of an attempt: Ray, and on the first node the driver.

    python node.py RUN ATTEMPT      (started by train.sbatch with one srun; standard library only)

The nodes meet in the attempt's folder on the shared file system:

    head.json      the first node: Ray answers there, others may join; written when its health check has passed
    stop           the batch script: save and end (its first word says why)
    failed/NODE    a node: why it ended early
    result.json    the first node: how the driver ended; everybody else ends then

Every process carries OR1_ATTEMPT in its environment, by which it is found again: also when Slurm's daemon died and the
job was restarted elsewhere, for then the attempt's number in ../current moves on and what is left here ends itself.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ports
import progress

POLL_S = 1.0
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


class Ended(Exception):
    """This node is done; `code` is the driver's, or that of what went wrong here."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


class Supervisor:
    """One node of one attempt."""

    def __init__(self, run: Path, attempt: Path):
        self.run, self.attempt = run, attempt
        self.job = json.loads((run / "slurm" / "job.json").read_text())
        self.index = int(os.environ["SLURM_NODEID"])
        self.num_nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        self.name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.ports = ports.of_job(int(os.environ["SLURM_JOB_ID"]))
        self.gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
        self.children: dict[str, subprocess.Popen] = {}
        self.stopping = False
        self.local = Path(f"/tmp/or1-{os.getuid()}-{os.environ['SLURM_JOB_ID']}")  # short: sockets lie in it

    def supervise(self) -> None:
        """Runs until the attempt is over; raises Ended."""
        os.chdir(self.job["workdir"])
        _raise_open_files()
        alone = self.num_nodes == 1
        self.address, interface = ports.own_address(self._peer(), self.job["interface"], alone=alone)
        self._environment(interface)
        if self.index == 0:
            self._start_head()
            self._lead()
        else:
            head = self._await_head()
            self._start_ray(f"--address={head}")
            while True:
                self._check()

    def _peer(self) -> str:
        """Some other node: the route to it is the one that the nodes have between them."""
        hosts = os.environ["OR1_NODES"].split(",")
        return next((host for host in hosts if host != self.name), self.name)

    def _environment(self, interface: str) -> None:
        hosts = os.environ["OR1_NODES"]
        code = str(self.run / "slurm" / "code")
        wanted = {
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": interface,
            "VLLM_HOST_IP": self.address,
            "OR1_MEETING_PORT": str(self.ports["meeting"]),
            "OMP_WAIT_POLICY": "PASSIVE",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }
        wanted.update(settings(self.run / "slurm" / "cluster.env"))
        os.environ.update({name: os.environ.get(name, value) for name, value in wanted.items()})
        os.environ.pop("RAY_ADDRESS", None)  # of whoever's shell the job was submitted from
        os.environ["OR1_RUN"], os.environ["OR1_ATTEMPT"] = str(self.run), str(self.attempt)
        os.environ["RAY_AUTH_MODE"] = "token"  # this job's own: nobody else's Ray takes us, ours takes nobody else
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(self.attempt.parent / ".token")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH", "")]))
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), hosts, self.address, "localhost"]))
        print(f"node {self.name} ({self.index} of {self.num_nodes}), {self.address} on {interface}, {self.gpus} GPUs")
        for name in sorted(os.environ):
            if name.startswith(("NCCL_", "GLOO_", "CUDA_", "OR1_", "RAY_", "TORCH_", "VLLM_")):
                print(f"  {name}={masked(name, os.environ[name])}", flush=True)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None and len(visible.split(",")) != self.gpus:
            raise Ended(1, f"CUDA_VISIBLE_DEVICES={visible} does not name the {self.gpus} GPUs of the job")

    def _start_ray(self, *words: str) -> None:
        patience = str(self.job["start_deadline_s"])
        command = [self.job["python"], str(Path(__file__).with_name("ray_node.py")), patience, "start", "--block"]
        command += words
        command += [f"--node-ip-address={self.address}", "--num-cpus=1", f"--num-gpus={self.gpus}"]
        command += [f"--object-store-memory={int(self.job['object_store_gb'] * 2**30)}", "--disable-usage-stats"]
        command += ["--include-log-monitor=false"]  # every process has a log of its own
        command += [f"--{name}-port={self.ports[name]}" for name in ports.OF_A_NODE]
        command += [f"--min-worker-port={self.ports['first worker']}", f"--max-worker-port={self.ports['last worker']}"]
        self._start("ray", command)

    def _start(self, name: str, command: list[str]) -> None:
        with (self.attempt / f"{name}-{self.name}.log").open("ab") as log:
            self.children[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _start_head(self) -> None:
        """Ray's head, and the others' leave to join when its health check passes."""
        head = f"{self.address}:{self.ports['gcs']}"
        own = [f"--port={self.ports['gcs']}", f"--ray-client-server-port={self.ports['ray-client-server']}"]
        self._start_ray("--head", *own, "--include-dashboard=false", f"--temp-dir={self.local}")
        check = [self.job["python"], "-m", "ray.scripts.scripts", "health-check", f"--address={head}"]
        deadline = time.monotonic() + self.job["start_deadline_s"]
        while subprocess.run(check, check=False, capture_output=True).returncode:
            self._check()
            if time.monotonic() > deadline:
                raise Ended(1, f"Ray's head does not answer at {head} after {self.job['start_deadline_s']} s")
        write(self.attempt / "head.json", json.dumps({"address": head, "node": self.name}))

    def _await_head(self) -> str:
        deadline = time.monotonic() + self.job["start_deadline_s"]
        while True:
            os.listdir(self.attempt)  # makes a network file system look again
            path = self.attempt / "head.json"
            if path.is_file():
                return json.loads(path.read_text())["address"]
            if time.monotonic() > deadline:
                raise Ended(1, f"the first node has no Ray after {self.job['start_deadline_s']} s")
            self._check()

    def _lead(self) -> None:
        """The first node: waits for every GPU, runs the driver and watches over it."""
        address = json.loads((self.attempt / "head.json").read_text())["address"]
        os.environ["RAY_ADDRESS"] = address
        os.environ["OR1_RAY_NODES"] = str(self.num_nodes)
        os.environ["OR1_RAY_GPUS"] = str(self.num_nodes * self.gpus)
        os.environ["OR1_RAY_DEADLINE_S"] = str(int(self.job["start_deadline_s"]))
        self._start("joining", [self.job["python"], "-m", "or1_megatron.cluster"])
        while self.children["joining"].poll() is None:
            self._check(but="joining")
        if self.children.pop("joining").returncode:
            raise Ended(1, f"Ray is not whole: {tail(self.attempt / f'joining-{self.name}.log')}")
        print(tail(self.attempt / f"joining-{self.name}.log"), flush=True)
        self.job["steps"] = os.environ.get("OR1_STEPS") or self.job["steps"]  # of a chain: its stage's, or the last
        watch = progress.Watch(self.run, self.job["stall_s"], float(os.environ.get("OR1_END", "inf")))
        self._start("driver", progress.command(self.run, self.attempt, self.job))
        driver = self.children["driver"]
        while driver.poll() is None:
            self._check(but="driver")
            stop = self.attempt / "stop"
            if not stop.exists() and watch.time_is_short():
                write(stop, "time is short: what is left is one step, a save and a minute\n")
            hears = self.job["program"] or progress.hears(self.run, driver.pid)
            if stop.exists() and not self.stopping and hears:
                self.stopping = True
                print(f"asking the driver to save and end: {stop.read_text().strip()}", flush=True)
                driver.send_signal(signal.SIGUSR1)
            if watch.stalled():
                raise Ended(1, f"stalled: nothing new in {self.run} for {watch.stall_s / 60:.0f} minutes")
        code = driver.returncode
        words = tail(self.attempt / f"driver-{self.name}.log") if code else "done"
        raise Ended(code if code >= 0 else 128 - code, f"the driver ended with {code}: {words}" if code else words)

    def _check(self, but: str = "") -> None:
        """Waits a moment; raises Ended when a process of this node, another node or the whole attempt is over."""
        time.sleep(POLL_S)
        for name, child in self.children.items():
            if name != but and child.poll() is not None:
                words = tail(self.attempt / f"{name}-{self.name}.log")
                self._raise_if_over()
                raise Ended(1, f"{name} ended with {child.returncode}: {words}")
        self._raise_if_over()

    def _raise_if_over(self) -> None:
        current = (self.attempt.parent / "current").read_text().strip()
        if current != self.attempt.name:
            raise Ended(1, f"{current} has begun: this is what was left of {self.attempt.name}")
        if self.index and (self.attempt / "result.json").exists():
            raise Ended(0, "the first node is done")
        for path in (self.attempt / "failed").iterdir():
            if path.name != self.name and not path.name.startswith("."):
                raise Ended(1, f"{path.name}: {path.read_text().strip()}")

    def end(self, ended: Ended) -> int:
        """Says how it ended where the others look, then ends this node's processes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        print(f"node {self.name} ends: {ended}", flush=True)
        current = (self.attempt.parent / "current").read_text().strip()
        if current == self.attempt.name:
            if self.index == 0:
                write(self.attempt / "result.json", json.dumps({"code": ended.code, "reason": str(ended)}))
            elif ended.code:
                write(self.attempt / "failed" / self.name, f"{ended}\n")
        end_processes(self.attempt, self.children)
        logs = self.local / "session_latest" / "logs"
        if ended.code not in (0, 130) and logs.is_dir():
            for name in ("raylet.out", "gcs_server.out", "dashboard_agent.log"):
                if (logs / name).is_file():
                    shutil.copy(logs / name, self.attempt / f"{name.partition('.')[0]}-{self.name}.log")
        shutil.rmtree(self.local, ignore_errors=True)
        return ended.code


def end_processes(attempt: Path, children: dict[str, subprocess.Popen]) -> None:
    """TERM, then KILL (Ray would drain for 30 s), to everything on this node that carries the attempt's mark."""
    mine = marked(attempt)
    for number, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        end = time.monotonic() + seconds
        for pid in mine:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        while (mine := marked(attempt) | {pid for pid in mine if _parent(pid)}) and time.monotonic() < end:
            for child in children.values():
                child.poll()
            time.sleep(0.1)


def marked(attempt: Path) -> set[int]:
    """Processes of this node that carry the attempt's mark, and theirs: this one and the dead ones apart.

    Ray's agents write their title over the environment that the mark is in, so they are known by their parent only.
    """
    mark = f"OR1_ATTEMPT={attempt}\0".encode()
    found, parents = set(), {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = _parent(int(path.name))
            if mark in (path / "environ").read_bytes() + b"\0":
                found.add(int(path.name))
        except OSError:
            continue
    found.discard(os.getpid())
    while theirs := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= theirs
    return {pid for pid in found if _parent(pid)}


def _parent(pid: int) -> int:
    """0 for one that is gone or only waits to be reaped."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state in "ZX" else int(parent)


def settings(path: Path) -> dict[str, str]:
    """NAME=VALUE lines; '#' begins a comment."""
    lines = [line.split("#", 1)[0].strip() for line in path.read_text().splitlines()] if path.is_file() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines if "=" in line)}


def masked(name: str, value: str) -> str:
    return "***" if any(word in name.upper() for word in SECRET_WORDS) else value


def tail(log: Path, lines: int = 3) -> str:
    """The last lines, joined to one."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    return " | ".join([line for line in text.splitlines() if line.strip()][-lines:])


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.rename(path)


def _raise_open_files(wanted: int = 65535) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Ended(128 + number, f"received {signal.Signals(number).name}")


def main() -> int:
    run, attempt = Path(sys.argv[1]), Path(sys.argv[2])
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, _terminate)
    supervisor = Supervisor(run, attempt)
    try:
        supervisor.supervise()
    except Ended as ended:
        return supervisor.end(ended)
    except Exception as error:
        return supervisor.end(Ended(1, f"{type(error).__name__}: {error}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
