"""One service per run: scores responses in processes that it can lose without losing anything else.

A thread of the parent hands tasks to workers over sockets and keeps their deadlines. Invariants:
  - every submitted task gets exactly one verdict, whatever dies; verdicts do not depend on the order of tasks;
  - a stuck check costs its own process only: once it has computed for long enough while others wait (patience.py),
    it is paused and a fresh worker takes its place; paused checks go on together when nothing waits; at the deadline:
    `timeout`. Answers that may get stuck are begun first, so that their deadlines pass while the others are checked;
  - a check that was paused has company when it goes on, and gets more time (WorkerProcess.is_out_of_time);
  - a worker that dies is replaced and its task tried again; after _ATTEMPTS the verdict is `infrastructure_error`,
    which has no reward. A task that crashes its worker twice by itself (a stack overflow in C) gets `memory`;
  - submit() waits while max_queued tasks wait.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from or1_megatron.errors import RunFailure
from or1_megatron.profiling.spans import CAPACITY, Span
from or1_megatron.reward.jobs import Job, take_for
from or1_megatron.reward.math import may_take_long
from or1_megatron.reward.patience import Patience
from or1_megatron.reward.problem import BROKEN_TESTS, Task, code_tests
from or1_megatron.reward.processes import Lost, Template, WorkerProcess
from or1_megatron.reward.response import reasoning_is_open
from or1_megatron.reward.session import EXIT_MEMORY
from or1_megatron.reward.tally import Tally
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Sample, Verdict

_BLOCKED_S = 1.0
_MAX_BACKGROUND = 32  # per worker: forks of one template, a few MB each unless the check itself grows
_ATTEMPTS = 5
_FAILED_STARTS = 30  # in a row; a template counts for ten workers
_CODE_SLACK_S = 30.0  # code keeps its own time; the parent's deadline is for a worker that fails to
_TICK_S = 0.01
_LOOK_S = 0.002  # between two looks at the deadlines
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


def task_of(sample: Sample) -> Task:
    """What there is to check about a sample."""
    prompt = sample.prompt
    is_open = reasoning_is_open(prompt.text)
    return Task(sample.text, prompt.ground_truth, prompt.data_source, sample.truncated, is_open)


class RewardService:
    """Context manager. Verdicts come as futures, in any order; plain processes and one thread, with Ray or without."""

    def __init__(self, config: RewardConfig, log_dir: Path | None = None):
        self._config = config
        self._scratch = tempfile.TemporaryDirectory(prefix="or1-reward-") if log_dir is None else None
        logs = Path(self._scratch.name) if self._scratch else Path(str(log_dir))
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / "reward.log"
        self._waiting: deque[Job] = deque()
        self._room = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._wake_from, self._wake_to = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_from, selectors.EVENT_READ)
        self._template: Template | None = None
        self._workers: list[WorkerProcess] = []
        self.spans: deque[Span] = deque(maxlen=CAPACITY)  # of the workers' checks
        self._failed_starts = 0
        self._failure: RunFailure | None = None
        self._closing = False
        self._tally = Tally()
        self._patience = Patience()
        self._next_look = 0.0
        self._hungry = True  # a new task may have to be noticed
        self._thread = threading.Thread(target=self._run, name="reward-service", daemon=True)

    def __enter__(self) -> RewardService:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Of the workers, and last of the template."""
        template = self._template
        return [worker.pid for worker in self._workers] + ([template.pid] if template else [])

    def submit(self, task: Task) -> Future[Verdict]:
        """The verdict on a response, later; waits while max_queued others wait.

        The future raises RunFailure when the service cannot work at all, or is closed.
        """
        future: Future[Verdict] = Future()
        is_code = code_tests(task.ground_truth, task.data_source) is not None
        limit = self._config.code_total_s + _CODE_SLACK_S if is_code else self._config.timeout_s
        job = Job(task, future, limit, is_code, urgent=not is_code and may_take_long(task.response))
        with self._room:
            self._room.wait_for(lambda: self._failure or self._closing or len(self._waiting) < self._config.max_queued)
            if self._failure or self._closing:
                future.set_exception(self._failure or RunFailure("the reward service was closed"))
                return future
            (self._waiting.appendleft if job.urgent else self._waiting.append)(job)
        if self._hungry:
            self._wake()
        return future

    def check_failure_rate(self, verdicts: list[Verdict]) -> None:
        """Raises RunFailure when more of them than max_failure_rate are infrastructure errors. A problem with broken
        tests is nobody's failure but its own, unless most are like that."""
        failed = [verdict for verdict in verdicts if verdict.failed]
        broken = sum(verdict.detail.startswith(BROKEN_TESTS) for verdict in failed)
        most = self._config.max_failure_rate
        if len(failed) - broken > most * len(verdicts) or 2 * broken > len(verdicts):
            raise RunFailure(
                f"{len(failed)} of {len(verdicts)} responses could not be checked, more than reward.max_failure_rate="
                f"{most}; the last one: {failed[-1].detail}",
                self._log_tail(),
            )

    def take_metrics(self) -> dict[str, float]:
        """Since the last call: checks per verdict, retries, workers replaced; check time in ms, as a histogram too."""
        return self._tally.take()

    def close(self) -> None:
        """Ends every process; unfinished checks fail."""
        with self._room:
            self._closing = True
            self._room.notify_all()
        self._wake()
        if self._thread.is_alive():
            self._thread.join()
        for handle in (self._wake_from, self._wake_to):
            os.close(handle)
        self._selector.close()
        if self._scratch:
            self._scratch.cleanup()

    # ---- the service's own thread

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is awake enough
            os.write(self._wake_to, b".")

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # a fault of ours must not leave the run waiting for ever
            self._failure = RunFailure(f"the reward service failed: {type(error).__name__}: {error}", self._log_tail())
            if not isinstance(error, RunFailure):
                raise
            self._failure = error
        finally:
            self._end()

    def _loop(self) -> None:
        while not self._closing:
            self._hungry = True
            self._fill()
            self._hungry = not self._workers or not all(worker.job for worker in self._workers)
            busy = not self._workers or any(worker.job for worker in self._workers)
            for key, events in self._selector.select(_TICK_S if busy else None):
                if key.data is None:
                    os.read(self._wake_from, 65536)
                else:
                    self._serve(key.data, events)
            self._keep_deadlines()

    def _fill(self) -> None:
        """Gives waiting tasks to idle workers, and starts the workers that are missing."""
        front = [worker for worker in self._workers if not worker.in_background]
        idle = [worker for worker in front if worker.ready and worker.job is None]
        while self._waiting and idle:
            worker = idle.pop()
            others = [other.gold for other in front if other is not worker]
            with self._room:
                job = take_for(worker.gold, others, self._waiting)
                self._room.notify()
            worker.begin(job, job.task.question(), job.task.response)
            self._watch(worker)
        for _ in range(self._config.num_workers - len(front)):
            self._start_worker()

    def _start_worker(self) -> None:
        try:
            if self._template is None:
                self._template = Template(asdict(self._config), self.log, self.spans)
            worker = self._template.fork()
        except (Lost, OSError):  # OSError: no process can be started now
            self._lose_template()
            self._count_failed_starts(10)
            return
        self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)

    def _lose_template(self) -> None:
        """Its workers die with it, and each is then found dead and its task given to another."""
        if self._template is not None:
            self._template.close()
            self._template = None

    def _count_failed_starts(self, number: int) -> None:
        self._failed_starts += number
        if self._failed_starts >= _FAILED_STARTS:
            raise RunFailure(f"no reward worker starts; see {self.log}", self._log_tail())

    def _watch(self, worker: WorkerProcess) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.wants_to_write else 0)
        if self._selector.get_key(worker.channel).events != events:
            self._selector.modify(worker.channel, events, worker)

    def _serve(self, worker: WorkerProcess, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            worker.flush()
            self._watch(worker)
        if events & selectors.EVENT_READ:
            try:
                while (message := worker.read()) is not None:
                    self._answered(worker, message)
                    if worker not in self._workers:
                        return
                    if worker.job is None:
                        return
            except Lost:
                self._died(worker)

    def _answered(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        if "ready" in message:
            worker.ready, self._failed_starts = True, 0
            return
        job, spent = worker.end(), time.monotonic() - worker.started
        worker.num_done += 1
        if not (worker.in_background or job.is_code):
            self._patience.note(spent)
        if "error" in message:
            self._retry(job, message["error"])
        else:
            self._finish(job, message["verdict"], spent, message["detail"])
        outgrown = message.get("rss_mb", 0) > self._config.recycle_mb
        if worker.in_background or outgrown or worker.num_done >= self._config.recycle_tasks:
            self._tally.count("workers_recycled", not worker.in_background)
            self._remove(worker)

    def _died(self, worker: WorkerProcess) -> None:
        job = worker.end()
        status = self._remove(worker)
        if not worker.ready:
            self._count_failed_starts(1)
        if job is None:
            return
        self._tally.count("workers_died")
        killed_by = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else 0
        if status is not None and os.WIFEXITED(status) and os.WEXITSTATUS(status) == EXIT_MEMORY:
            spent = time.monotonic() - worker.started
            self._finish(job, "memory", spent, f"more than {self._config.memory_mb} MiB")
            return
        if killed_by in _CRASHES:
            job.crashes += 1
            if job.crashes == 2:
                self._finish(job, "memory", time.monotonic() - worker.started, f"crashed twice, signal {killed_by}")
                return
        self._retry(job, f"its worker died ({f'signal {killed_by}' if killed_by else f'status {status}'})")

    def _retry(self, job: Job, reason: str) -> None:
        job.attempts += 1
        if job.attempts >= _ATTEMPTS:
            self._finish(job, "infrastructure_error", 0.0, reason)
            return
        self._tally.count("retries")
        self._waiting.appendleft(job)

    def _finish(self, job: Job, name: str, seconds: float, detail: str) -> None:
        self._tally.finish(name, seconds)
        job.future.set_result(Verdict(name, seconds, detail))

    def _keep_deadlines(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        busy = [worker for worker in self._workers if worker.job is not None]
        late = [worker for worker in busy if not worker.paused and worker.is_out_of_time(worker.job.limit_s)]
        for worker in late:  # all at once: each that runs on delays the removal of the others
            worker.kill()
        for worker in late:
            job, spent = worker.end(), now - worker.started
            self._remove(worker)
            self._finish(job, "timeout", spent, f"after {spent:.1f} s")
        in_background = sum(worker.in_background for worker in self._workers)
        for worker in [worker for worker in self._workers if worker.job is not None]:
            spent, job = now - worker.started, worker.job
            if worker.paused:
                if not self._waiting or spent >= job.limit_s:
                    worker.resume(job.limit_s)
            elif (
                self._waiting
                and in_background < _MAX_BACKGROUND * self._config.num_workers
                and not (worker.in_background or job.is_code)
                and (spent >= _BLOCKED_S or worker.cpu_spent() >= self._patience.seconds(worker.num_done))
            ):
                worker.pause()
                in_background += 1

    def _remove(self, worker: WorkerProcess) -> int | None:
        """Ends a worker; its wait status, None when its template is gone."""
        worker.kill()
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        worker.close()
        if self._template is None or worker.template is not self._template:
            return None  # it died with its template
        try:
            return self._template.reap(worker.pid)
        except Lost:
            self._lose_template()
            return None

    def _end(self) -> None:
        for worker in self._workers:
            worker.kill()
        if self._template is not None:
            self._template.close()
        failure = self._failure or RunFailure("the reward service was closed")
        with self._room:
            jobs = [*self._waiting, *(worker.job for worker in self._workers if worker.job)]
            self._waiting.clear()
            self._closing = True
            self._room.notify_all()
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        for job in jobs:
            job.future.set_exception(failure)

    def _log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""
