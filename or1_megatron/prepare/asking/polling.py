"""The judges asked about every problem that lacks votes of theirs, and the votes counted as they come."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

from or1_megatron.errors import UserError
from or1_megatron.prepare.asking.endpoint import Endpoint, Refused, Reply, Stopped
from or1_megatron.prepare.asking.judge import Judge, VotesOptions, question, vote
from or1_megatron.prepare.asking.model import content_sum, opened, waves
from or1_megatron.prepare.ledger import Ledger
from or1_megatron.prepare.step import Context, Row, Table
from or1_megatron.types import Prompt


class Tally:
    """Votes so far, in memory and in the ledger. Threads may add to it."""

    def __init__(self, ledger: Ledger, votes: int, progress: Callable[[int], None]):
        """votes: of all judges together on a problem; `progress` is told when they are there."""
        self._ledger, self._lock = ledger, threading.Lock()
        self._votes, self._progress = votes, progress
        self._counts: dict[tuple[str, int, str], list[int]] = {}
        self._totals: Counter[tuple[str, int]] = Counter()
        self.complete = 0  # problems with all votes
        for record in ledger.records:
            self._add((record["uid"], record["of"], record["model"]), record["votes"])

    def _add(self, key: tuple[str, int, str], votes: list[int]) -> None:
        with self._lock:
            before = self._counts.get(key, [0, 0, 0])
            self._counts[key] = [a + b for a, b in zip(before, votes, strict=True)]
            self._totals[key[:2]] += sum(votes)
            if self._totals[key[:2]] == self._votes:
                self.complete += 1
                self._progress(1)

    def of(self, row: Row, judge: Judge) -> list[int]:
        """[keep, drop, no vote]"""
        return self._counts.get((row["uid"], content_sum(row), judge.name), [0, 0, 0])

    def add(self, uid: str, of: int, judge: Judge, replies: list[Reply]) -> None:
        votes = [vote(reply.text, cut=reply.cut) for reply in replies]
        self.put(uid, of, judge, [votes.count(kind) for kind in (True, False, None)])

    def put(self, uid: str, of: int, judge: Judge, votes: list[int]) -> None:
        self._ledger.append({"uid": uid, "of": of, "model": judge.name, "votes": votes})
        self._add((uid, of, judge.name), votes)


class Halt(threading.Event):
    """Set by the first failure, which it remembers."""

    failure: BaseException | None = None

    def because(self, failure: BaseException) -> None:
        if self.failure is None and not isinstance(failure, Stopped):
            self.failure = failure
        self.set()


def ask_endpoints(table: Table, keys: dict[Judge, str], options: VotesOptions, context: Context, tally: Tally) -> None:
    """All judges with an endpoint at the same time; the first failure ends it for all. Raises UserError."""
    halt = Halt()
    with ExitStack() as running:
        polls = []
        for judge, key in keys.items():
            endpoint = Endpoint(
                judge.endpoint,
                judge.model,
                key=key,
                timeout_s=options.timeout_s,
                patience_s=options.patience_s,
                connections=options.concurrency,
                stop=halt,
            )
            polls.append(_Poll(judge, running.enter_context(endpoint), options, context.seed, tally, halt))
        threads = [threading.Thread(target=poll.run, args=(table,), name=poll.judge.name) for poll in polls]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # on Ctrl-C too
            halt.set()
            for thread in threads:
                thread.join()
    if isinstance(halt.failure, UserError):
        raise UserError(f"{halt.failure}; the votes so far are kept: run the same command again to go on") from None
    if halt.failure is not None:
        raise halt.failure
    for poll in polls:
        context.message(
            f"quality_votes: {poll.judge.name}: {poll.endpoint.tokens_in} tokens in, {poll.endpoint.tokens_out} out by "
            f"the server's count, {poll.endpoint.asked_again} requests repeated"
        )


class _Poll:
    """One judge asked about every problem, options.concurrency of them at a time."""

    def __init__(self, judge: Judge, endpoint: Endpoint, options: VotesOptions, seed: int, tally: Tally, halt: Halt):
        self.judge, self.endpoint = judge, endpoint
        self._options, self._seed, self._tally, self._halt = options, seed, tally, halt
        self._answered = False

    def run(self, table: Table) -> None:
        """Until all votes are there or `halt` is set, which a failure here does, too."""
        try:
            running: set[Future[None]] = set()
            with ThreadPoolExecutor(self._options.concurrency, "vote") as pool:
                for rows in table.batches():
                    for row in rows:
                        missing = self._options.votes - sum(self._tally.of(row, self.judge))
                        if self._options.judges(row) and missing > 0 and not self._halt.is_set():
                            running.add(pool.submit(self._ask, row, missing))
                        if len(running) >= 2 * self._options.concurrency:
                            running = wait(running, return_when=FIRST_COMPLETED).not_done
        except BaseException as failure:  # told by the thread that waits
            self._halt.because(failure)

    def _ask(self, row: Row, missing: int) -> None:
        of = content_sum(row)
        try:
            while missing > 0:
                replies = self._replies(row, missing)
                if replies is None:
                    return self._tally.put(row["uid"], of, self.judge, [0, 0, missing])
                self._tally.add(row["uid"], of, self.judge, replies)
                missing -= len(replies)
        except BaseException as failure:
            self._halt.because(failure)

    def _replies(self, row: Row, missing: int) -> list[Reply] | None:
        """None when the server, which has taken others, does not take this problem."""
        text = f"{self._seed}/{row['uid']}/{self.judge.name}/{self._options.votes - missing}"
        try:
            replies = self.endpoint.replies(
                question(row["problem"]),
                min(missing, self._options.per_request),
                temperature=self._options.temperature,
                max_tokens=self._options.max_tokens,
                seed=int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1,
            )
        except Refused as refusal:
            if self._answered:
                return None
            raise UserError(f"{self.judge.name} refuses {row['uid']}: {refusal}") from None
        self._answered = True
        return replies


def ask_engines(table: Table, judge: Judge, options: VotesOptions, context: Context, tally: Tally) -> None:
    """One judge by the project's engines; whole sets of votes only."""
    from or1_megatron.rollout.engine import SamplingSpec

    under_way: dict[str, int] = {}
    with opened(judge.model, options.settings, context) as model:

        def asked(row: Row) -> Prompt | None:
            if not options.judges(row) or sum(tally.of(row, judge)):
                return None
            prompt = model.prompt(row, question(row["problem"]))
            if prompt is None:
                tally.put(row["uid"], content_sum(row), judge, [0, 0, options.votes])
            else:
                under_way[row["uid"]] = content_sum(row)
            return prompt

        sampling = SamplingSpec(
            temperature=options.temperature, top_p=1.0, max_response_length=options.max_tokens, seed=context.seed
        )
        for wave in waves(table, options.wave, asked):
            cluster = model.start()
            engines = cluster.num_engines
            for group in cluster.generate([wave[i::engines] for i in range(engines)], options.votes, sampling):
                replies = [Reply(sample.text, sample.truncated) for sample in group.samples]
                uid = group.prompt.uid
                tally.add(uid, under_way.pop(uid), judge, replies)
