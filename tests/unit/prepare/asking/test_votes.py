"""Votes over the wire, from a server on loopback that is as bad as the test wants it. Real servers: tests/e2e."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from planted.rows import Rows

from or1_megatron.errors import UserError
from or1_megatron.prepare.asking.endpoint import Endpoint, key_from
from or1_megatron.prepare.asking.judge import VotesOptions
from or1_megatron.prepare.asking.votes import STEPS, KeepOptions, collect_votes, open_keep, ready
from or1_megatron.prepare.step import Drop, Finished
from tests.unit.prepare.tables import context, row

KEY = "sk-secret-0123456789"
ROWS = [row(n, f"Problem {n}: how much is {n} + {n}? {'x' * (n % 3)}") for n in range(9)]
ROWS.append(row(9, "print hello", ability="code"))


class Server:
    """`behave(number of the request, body)` gives a status, "drop", "hang", or None for an honest answer."""

    def __init__(self, behave: Callable[[int, dict[str, Any]], Any], most: int = 99):
        self.times: list[float] = []
        self.bodies: list[dict[str, Any]] = []
        self.answered: Counter[tuple[str, str]] = Counter()  # (model, problem) -> votes given
        self.keys: set[str | None] = set()
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.times)
                    outer.times.append(time.monotonic())
                    outer.bodies.append(body)
                    outer.keys.add(self.headers["Authorization"])
                how = behave(number, body)
                if how == "drop":
                    self.close_connection = True
                    return self.connection.close()
                if how == "hang":
                    time.sleep(2.5)
                    self.close_connection = True
                    return None
                if how is not None:
                    status, headers = how if isinstance(how, tuple) else (how, {})
                    return self.send(status, {"error": f"no: {self.headers['Authorization']}"}, headers)
                asked = body["messages"][0]["content"]
                count = min(body.get("n", 1), most)
                with lock:
                    outer.answered[body["model"], asked] += count
                replies = [ballot(body["model"], asked, body["seed"] + i) for i in range(count)]
                choices = [{"message": {"content": text}, "finish_reason": "stop"} for text in replies]
                self.send(200, {"choices": choices, "usage": {"prompt_tokens": 100, "completion_tokens": 7 * count}})
                return None

            def send(self, status: int, answer: dict, headers: dict[str, str] | None = None) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def ballot(model: str, asked: str, seed: int) -> str:
    """Problems that end in x are disliked; one reply in five is no vote. A function of what was asked only."""
    if seed % 5 == 0:
        return "I cannot say."
    good = model == "lenient" or "x\n" not in asked
    return f"All is said.\nVERDICT: {'KEEP' if good else 'DROP'}"


def options(server: Server, **changes: Any) -> VotesOptions:
    given = VotesOptions(("strict", "lenient"), (server.url,), votes=8, per_request=3, concurrency=3)
    return replace(given, **{"timeout_s": 2.0, **changes})


def outcome(wanted: VotesOptions, scratch: Path, said: list[str] | None = None, done: list[int] | None = None) -> dict:
    said = said if said is not None else []
    rows = collect_votes(Rows(ROWS, batch=3), wanted, context(scratch, said, done))
    return {one["uid"]: one for one in rows}


@pytest.fixture
def healthy() -> Iterator[Server]:
    with Server(lambda number, body: None) as server:
        yield server


def votes_of(one: Any) -> dict[str, list[int]]:
    return json.loads(one["info"])["quality"]


def test_all_judges_vote_on_every_problem(healthy: Server, tmp_path: Path):
    said: list[str] = []
    done: list[int] = []
    found = outcome(options(healthy), tmp_path, said, done)
    assert list(found) == [one["uid"] for one in ROWS] and found["t/9"] == ROWS[9]
    assert sum(done) == len(ROWS)
    for number in range(9):
        votes = votes_of(found[f"t/{number}"])
        assert list(votes) == ["strict", "lenient"] and {sum(each) for each in votes.values()} == {8}
        assert votes["lenient"][1] == 0 and votes["strict"][0 if number % 3 else 1] == 0
    assert said[0] == "quality_votes: 9 problems x 2 judges x 8 votes; 0 of 144 votes are there"
    assert "strict: 2700 tokens in, 504 out by the server's count, 0 requests repeated" in "\n".join(said)
    assert healthy.keys == {None} and set(healthy.answered.values()) == {8}


def test_enough_votes_keep_a_problem():
    voted = [{"a": [k, 16 - k, 0], "b": [2, 10, 4]} for k in (6, 7, 16)]
    rows = [row(n, "?", info=json.dumps({"quality": quality})) for n, quality in enumerate(voted)]

    def dropped(**bounds: Any) -> list[str]:
        judge = open_keep(KeepOptions(**bounds))
        return [kept.detail if isinstance(kept := judge(one), Drop) else "" for one in rows]

    assert dropped() == ["8 of 32, needs 9", "", ""]
    assert dropped(keep=10, models=("a",)) == ["6 of 16, needs 10", "7 of 16, needs 10", ""]
    judge = open_keep(KeepOptions())
    assert judge(ROWS[9]) == ROWS[9], "code is not judged"
    with pytest.raises(UserError, match="keep_quality: t/0 has votes of nobody, not of any judge; run quality_votes"):
        judge(ROWS[0])
    with pytest.raises(UserError, match="keep_quality: t/1 has votes of a, b, not of a, c"):
        open_keep(KeepOptions(models=("a", "c")))(rows[1])
    with pytest.raises(UserError, match=r"keep=33 of 32 votes drops everything \(t/1\); use fewer"):
        open_keep(KeepOptions(keep=33))(rows[1])
    with pytest.raises(UserError, match="t/7: info.quality is 'high', not the votes of judges"):
        judge(row(7, "?", info=json.dumps({"quality": "high"})))
    with pytest.raises(UserError, match="keep=0 must be above 0"):
        KeepOptions(keep=0)


def test_a_server_in_trouble_changes_nothing(healthy: Server, tmp_path: Path):
    troubles: list[Any] = [(429, {"Retry-After": "0"}), "drop", 503, "hang", (429, {"Retry-After": formatdate(1)})]

    def behave(number: int, body: dict[str, Any]) -> Any:
        return troubles[number // 4] if number % 4 == 1 and number // 4 < len(troubles) else None

    said: list[str] = []
    with Server(behave) as server:
        found = outcome(options(server), tmp_path / "a", said)
        assert set(server.answered.values()) == {8}
        assert len(server.times) == 9 * 2 * 3 + len(troubles)
    assert found == outcome(options(healthy), tmp_path / "b")
    repeated = [int(line.split()[-3]) for line in said if line.endswith("requests repeated")]
    assert sum(repeated) == len(troubles)


def test_a_server_that_gives_one_reply_at_a_time(tmp_path: Path):
    with Server(lambda number, body: None, most=1) as server:
        found = outcome(options(server), tmp_path)
        assert set(server.answered.values()) == {8}
    assert all(sum(votes) == 8 for votes in votes_of(found["t/0"]).values())


def test_after_retry_after_no_thread_asks_too_early():
    def behave(number: int, body: dict[str, Any]) -> Any:
        return (429, {"Retry-After": "1"}) if number == 0 else None

    with Server(behave) as server, Endpoint(server.url, "strict", timeout_s=5) as endpoint:
        asking = [threading.Thread(target=endpoint.replies, args=("?", 1), kwargs=SPEC) for _ in range(4)]
        asking[0].start()
        while endpoint.asked_again == 0:
            time.sleep(0.005)
        for thread in asking[1:]:
            thread.start()
        for thread in asking:
            thread.join()
        assert len(server.times) == 5 and min(server.times[1:]) - server.times[0] >= 1.0


SPEC: dict[str, Any] = {"temperature": 1.0, "max_tokens": 8, "seed": 1}


def test_it_gives_up_in_one_line_and_goes_on_later(tmp_path: Path):
    with Server(lambda number, body: 503 if number >= 10 else None) as server:
        with pytest.raises(UserError) as caught:
            outcome(options(server, patience_s=1.0), tmp_path)
        first = sum(server.answered.values())
    message = str(caught.value)
    assert "HTTP 503" in message and "patience_s=1" in message and "\n" not in message
    assert message.endswith("the votes so far are kept: run the same command again to go on")
    assert 20 <= first <= 30
    said: list[str] = []
    with Server(lambda number, body: None) as server:
        resumed = outcome(options(server), tmp_path, said)
        assert sum(server.answered.values()) == 2 * 9 * 8 - first, "only the votes that are missing are asked for"
        assert said[0].endswith(f"{first} of 144 votes are there")
        outcome(options(server), tmp_path)
        assert sum(server.answered.values()) == 2 * 9 * 8 - first, "nothing is missing the third time"
        assert resumed == outcome(options(server), tmp_path / "at once")


def test_the_estimate_comes_first_and_may_be_all(healthy: Server, tmp_path: Path):
    said: list[str] = []
    priced = options(healthy, price_in=(2.0,), price_out=(10.0, 0.0), estimate_only=True)
    with pytest.raises(Finished, match="nothing is written; estimate_only=false votes"):
        outcome(priced, tmp_path, said)
    assert healthy.times == []
    # 9 problems x 3 requests x about 1,260 characters / 4 = 8,500; 9 x 8 replies x 150 tokens = 10,800.
    assert said[1].startswith(
        "  strict: 27 requests, about 0.008 M tokens in, 0.011 M out; at 2 in and 10 out a million"
    )
    assert said[1].endswith("million: 0.12") and said[2].endswith("0.011 M out; at 2 in and 0 out a million: 0.02")
    assert said[-1].startswith("  in all about 0.14 (tokens: 4 characters, replies: 150 each)")


def test_the_key_comes_from_the_environment_and_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with Server(lambda number, body: 401) as server, pytest.raises(UserError) as caught:
        outcome(options(server, key_env=("JUDGE_KEY",)), tmp_path)
    assert server.keys == {f"Bearer {KEY}"}
    assert "HTTP 401" in str(caught.value) and KEY not in str(caught.value) and len(server.times) <= 6
    assert all(KEY not in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.setenv("JUDGE_KEY", KEY + "\nX-Other: 1")
    with pytest.raises(UserError, match="holds more than an API key") as caught:
        key_from("JUDGE_KEY")
    assert KEY not in str(caught.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="JUDGE_KEY is not set; export the API key in it"):
        outcome(options(server, key_env=("JUDGE_KEY",)), tmp_path)


def test_a_problem_that_the_server_does_not_take(tmp_path: Path):
    def behave(number: int, body: dict[str, Any]) -> Any:
        return 400 if "Problem 3:" in body["messages"][0]["content"] else None

    with Server(behave) as server:
        found = outcome(options(server, concurrency=1), tmp_path)
    assert votes_of(found["t/3"]) == {"strict": [0, 0, 8], "lenient": [0, 0, 8]}
    assert sum(votes_of(found["t/0"])["strict"][:2]) > 0
    with Server(lambda number, body: 400) as server, pytest.raises(UserError, match=r"refuses t/\d+: HTTP 400"):
        outcome(options(server), tmp_path / "all")


def test_what_is_no_server(tmp_path: Path):
    for address in ("localhost:8000", "http://h:8000:8000/v1"):
        with pytest.raises(UserError, match=f"'{address}' is no http"):
            ready(options_at(address))
    with Server(lambda number, body: (200, {})) as server, pytest.raises(UserError, match="no chat completion"):
        outcome(options(server), tmp_path)
    with pytest.raises(UserError, match="ConnectError"):
        outcome(options_at("http://127.0.0.1:9/v1"), tmp_path)


def options_at(url: str) -> VotesOptions:
    return VotesOptions(("strict",), (url,), votes=16, concurrency=2, patience_s=0.5)


def test_the_step_is_offered():
    assert [step.name for step in STEPS] == ["quality_votes", "keep_quality"]
