"""A chat model behind OpenAI's protocol, asked from many threads, with patience for a server that has none.

Asked again: 408, 409, 425, 429, 5xx, timeouts and broken connections; half a second after Retry-After where it is
given, else after 0.5, 1, 2, ... at most 60 s. All waits vary at random, so that they do not come back together. While
a server asks to be left alone, every thread waits. Everything else is an error at once.
"""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx

from or1_megatron.errors import UserError

_AGAIN = frozenset({408, 409, 425, 429})
_BAD_REQUEST = frozenset({400, 413, 422})
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0


class Refused(Exception):
    """The server does not take this question, for instance because it is too long."""


class Stopped(Exception):
    """Another thread has given up."""


@dataclass(frozen=True)
class Reply:
    text: str
    cut: bool  # at the length limit


def key_from(variable: str) -> str:
    """The API key in an environment variable; empty for no variable. Raises UserError, which never holds the key."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"key_env={variable}: the environment variable {variable} is not set; export the API key in it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"key_env={variable}: the environment variable {variable} holds more than an API key")
    return key


def check_address(url: str) -> None:
    """Raises UserError."""
    try:
        sound = httpx.URL(url).host and url.startswith(("http://", "https://"))
    except httpx.InvalidURL:
        sound = False
    if not sound:
        raise UserError(f"endpoint {url!r} is no http:// or https:// address, e.g. http://127.0.0.1:8000/v1")


class Endpoint:
    """Context manager over one model at one server. `replies` may be called from `connections` threads."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        timeout_s: float = 120.0,
        patience_s: float = 600.0,
        connections: int = 32,
        stop: threading.Event | None = None,
    ):
        """patience_s: how long a request is tried. stop: set by whoever gives up; waiting threads raise Stopped."""
        check_address(url)
        self.model, self._key, self._patience_s = model, key, patience_s
        self._address = url.rstrip("/") + "/chat/completions"
        self._stop = stop or threading.Event()
        self._lock = threading.Lock()
        self._left_alone_until = 0.0
        self.tokens_in = self.tokens_out = self.asked_again = 0  # as the server counts them
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def replies(self, question: str, count: int, *, temperature: float, max_tokens: int, seed: int) -> list[Reply]:
        """Between 1 and `count` replies: not every server gives several at once.

        Raises Refused, Stopped, or UserError when the server cannot be used or answers nothing for patience_s.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        if count > 1:
            body["n"] = count
        answer = self._post(body)
        try:
            choices = answer.json()["choices"]
            found = [_reply(choice) for choice in choices]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._error(f"answered no chat completion: {answer.text[:200]!r}; check the address") from None
        if not found:
            raise self._error("answered without a choice; check the address and the model's name")
        with self._lock:
            usage = answer.json().get("usage") or {}
            self.tokens_in += usage.get("prompt_tokens") or 0
            self.tokens_out += usage.get("completion_tokens") or 0
        return found[:count]

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        started, wait_s = time.monotonic(), _FIRST_WAIT_S
        while True:
            self._wait_until_welcome()
            try:
                answer = self._client.post(self._address, json=body)
            except httpx.TransportError as error:
                failure, asked_s = f"{type(error).__name__} {error}".strip(), None
            else:
                if answer.status_code == 200:
                    return answer
                failure = f"HTTP {answer.status_code} {' '.join(answer.text.split())[:200]}".strip()
                if answer.status_code in _BAD_REQUEST:
                    raise Refused(self._hide(failure))
                if answer.status_code not in _AGAIN and answer.status_code < 500:
                    raise self._error(f"answered {failure}; check the address, the model's name and the API key")
                asked_s = _retry_after(answer.headers.get("Retry-After"))
            pause_s = (wait_s if asked_s is None else _FIRST_WAIT_S) * random.uniform(0.5, 1.0) + (asked_s or 0.0)
            spent = time.monotonic() - started
            if spent + pause_s > self._patience_s:
                raise self._error(f"was asked again for {spent:.0f} s (patience_s={self._patience_s:g}): {failure}")
            with self._lock:
                self.asked_again += 1
                if asked_s is not None:
                    self._left_alone_until = max(self._left_alone_until, time.monotonic() + asked_s)
            if self._stop.wait(pause_s):
                raise Stopped
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _wait_until_welcome(self) -> None:
        while (left_s := self._left_alone_until - time.monotonic()) > 0:
            if self._stop.wait(left_s):
                raise Stopped
        if self._stop.is_set():
            raise Stopped

    def _error(self, what: str) -> UserError:
        return UserError(self._hide(f"{self.model} at {self._address} {what}"))

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _reply(choice: dict[str, Any]) -> Reply:
    text = choice["message"].get("content")
    return Reply(text if isinstance(text, str) else "", choice.get("finish_reason") == "length")


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or an HTTP date; None where there is none that can be read."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
