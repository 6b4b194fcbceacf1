"""The run's processes as Ray sees them: answers awaited with an eye on all of them, and who died when one did.

Whoever waits also pings every process, so the death of an idle one is noticed within seconds. One that lives but brings
nothing until the deadline counts as dead: a collective that hangs, a file system that no longer answers. So does one
whose call fails as devices, collectives and vLLM's own processes fail. While a thread
tends some of them, as that of a rollout under way tends the engines, the others do not look after these.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from or1_megatron.errors import RunFailure, StopRequested, UserError, WorkerDied

_PING_INTERVAL_S = 5.0
# What faults of a device, of a collective or of a process behind a worker arrive as. Anything else is a mistake, which
# a new start would only make again.
_FAULTS = (RuntimeError, TimeoutError)


class Workers:
    """All processes of a run and their logs. `wait` and `drain` raise WorkerDied, or what a process raised.

    deadline_s: the longest that a wait may go without one answer.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._logs: dict[Any, Path] = {}
        self._pings: dict[Any, Any] = {}
        self._pinged: dict[Any, float] = {}  # when
        self._tended: dict[Any, int] = {}  # by which thread

    def add(self, worker: Any, log: Path) -> None:
        self._logs[worker] = log

    def name(self, worker: Any) -> str:
        return self._logs[worker].stem

    def forget(self, worker: Any) -> None:
        """It is not missed any more."""
        self._pings.pop(worker, None)
        self._logs.pop(worker)

    @contextmanager
    def tending(self, workers: Sequence[Any]) -> Iterator[None]:
        """Meanwhile only this thread is told when one of these dies."""
        mine = dict.fromkeys(workers, threading.get_ident())
        self._tended |= mine
        try:
            yield
        finally:
            for worker in mine:
                self._tended.pop(worker, None)

    def _mine(self) -> list[Any]:
        """All but those that another thread tends."""
        me = threading.get_ident()
        return [worker for worker in list(self._logs) if self._tended.get(worker, me) == me]

    def wait(self, refs: list[Any]) -> list[Any]:
        """Results in order; the first failure of any of them, or of any other worker, ends the wait."""
        results: dict[Any, Any] = {}
        pending, last = list(refs), time.monotonic()
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=1.0)
            last = time.monotonic() if done else last
            results |= {ref: self._get(ref) for ref in done}
            self._heartbeat()
            self._raise_if_late(last, self._mine())
        return [results[ref] for ref in refs]

    def drain(
        self,
        streams: dict[Any, Any],
        *,
        fetch: bool = True,
        stopped: Callable[[], bool] | None = None,
        replace: Callable[[WorkerDied], dict[Any, Any]] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """(worker, item) of several streaming calls (stream -> its worker) as they come; references instead of values
        unless `fetch`. `replace` gives streams in place of those whose worker died; without it, or when it raises, that
        ends the draining. `stopped` is asked all the time and raises StopRequested.
        """
        pending, last = dict(streams), time.monotonic()
        while pending:
            ready: list[Any] = ray.wait(list(pending), num_returns=1, timeout=1.0, fetch_local=False)[0]
            if stopped and stopped():
                raise StopRequested("stopped during the rollout")
            last = time.monotonic() if ready else last
            try:
                self._heartbeat()
                self._raise_if_late(last, list(pending.values()))
                for stream in ready:
                    try:
                        ref = next(stream)
                    except StopIteration:
                        del pending[stream]
                        continue
                    yield pending[stream], self._get(ref) if fetch else ref
            except WorkerDied as died:
                if replace is None:
                    raise
                pending = {stream: worker for stream, worker in pending.items() if worker not in died.workers}
                pending |= replace(died)
                last = time.monotonic()

    def _heartbeat(self) -> None:
        now = time.monotonic()
        for worker in self._mine():
            if now - self._pinged.get(worker, 0.0) < _PING_INTERVAL_S:
                continue
            self._pinged[worker] = now
            ping = self._pings.get(worker)
            if ping is not None:
                if not ray.wait([ping], timeout=0)[0]:
                    continue  # busy; its own call reports its death
                self._get(ping)
            self._pings[worker] = worker.ping.remote()

    def _get(self, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, (UserError, RunFailure)) or (isinstance(cause, OSError) and cause.errno):
                raise cause from None
            self._raise_if_dead()
            asked = [worker for worker in self._logs if worker._actor_id == ref.task_id().actor_id()]
            if asked and isinstance(cause, _FAULTS):
                raise WorkerDied(f"{self.name(asked[0])} failed: {cause!r}", str(error), asked) from None
            raise RunFailure(f"{cause!r}", str(error)) from None
        except RayError as error:  # the process died, or with its node what it had answered
            self._raise_if_dead()
            raise RunFailure(f"a process of the run died: {error}") from None

    def _raise_if_dead(self) -> None:
        """Names those that died: a peer's broken connection is often reported before the death itself."""
        dead, _ = self._unanswering(self._mine())
        if dead:
            raise self._died(dead, "died") from None

    def _raise_if_late(self, last: float, awaited: list[Any]) -> None:
        if time.monotonic() - last > self._deadline_s:
            dead, busy = self._unanswering(awaited)
            silent = f"brought nothing for {self._deadline_s / 60:g} minutes (deadline_minutes)"
            raise self._died(dead or busy or awaited, "died" if dead else silent)

    def _unanswering(self, asked: list[Any]) -> tuple[list[Any], list[Any]]:
        """The dead, and those too busy to answer a ping within three seconds."""
        pings = {worker: worker.ping.remote() for worker in asked}
        deadline = time.monotonic() + 3.0
        dead, busy = [], []
        for worker, ping in pings.items():
            try:
                ray.get(ping, timeout=max(0.0, deadline - time.monotonic()))
            except RayActorError:
                dead.append(worker)
            except RayError:
                busy.append(worker)
        return dead, busy

    def _died(self, workers: list[Any], how: str) -> WorkerDied:
        names = ", ".join(self.name(worker) for worker in workers)
        log = self._logs[workers[0]]
        return WorkerDied(f"{names} {how}; the log is {log}", _tail(log), workers)


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.is_file() else ""
