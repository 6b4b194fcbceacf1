"""What runs inside the sandbox: a program on its input, or a solution under test and, in another process, its referee.

The referee holds the tests. To it the solution is a `Remote`: calling it sends the arguments to the other process and
brings the result back as plain values (wire.py), so every comparison happens where the tested code is not. What the
tested code can do to its own process (patch builtins, `__eq__`, sys.exit, atexit, catch everything, exit with 0, write
on any descriptor) changes at most the values that it sends. Standard library only.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import select
import struct
import sys
import time
import types
from typing import Any

from or1_megatron.reward import wire

EXIT_MEMORY = 77  # a hint for the verdict; the tested code may forge it and gains nothing
MAX_FRAME = 64 * 2**20
MAX_ITEMS = 1_000_000
_STOPS = (StopIteration, StopAsyncIteration)
# Star imports that LiveCodeBench puts before every solution, and people's solutions rely on.
_STARS = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io json "
    "typing"
).split()
TEST_MODULES = frozenset({*_STARS, "sys", "time", "cmath", "fractions", "decimal", "numbers", "itertools", "array"})


def _preloaded_names() -> dict[str, Any]:
    """Python's builtins, and more names that every solution starts with; none is shadowed (math.pow, io.open)."""
    names: dict[str, Any] = {}
    for name in (*_STARS, "sys", "time", "fractions", "decimal", "array", "enum", "dataclasses"):
        module = importlib.import_module(name)
        if name in _STARS:
            public = getattr(module, "__all__", [key for key in vars(module) if not key.startswith("_")])
            names |= {key: getattr(module, key) for key in public if not hasattr(builtins, key)}
    modules = {name: importlib.import_module(name) for name in (*_STARS, "sys", "time", "fractions", "decimal")}
    return {**vars(builtins), **names, **modules}


class Stage:
    """What a solution finds when it starts: names, and as a program text files on descriptors 0 and 1. The fork server
    sets it up, since that takes a child longer than most solutions do."""

    def __init__(self):
        """Descriptors 0 and 1 must be a file at its start and a pipe, as they will be in the child."""
        self.names = _preloaded_names()
        given, written = io.FileIO(0, closefd=False), io.FileIO(1, "w", closefd=False)
        sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(given), "utf-8", "surrogateescape")
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.BufferedWriter(written), "utf-8", "surrogateescape")


def run_program(code: str, stage: Stage) -> None:
    """A whole program, as `python solution.py` would run it. Never returns."""
    status = 1
    try:
        status = _run_main(code, stage)
    finally:
        with contextlib.suppress(BaseException):
            if threading := sys.modules.get("threading"):  # imported by the program or not at all, see forkserver.py
                for thread in threading.enumerate():
                    if thread is not threading.current_thread() and not thread.daemon:
                        thread.join()
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__):  # a program may have put another in the place of the first
            with contextlib.suppress(BaseException):
                if stream is not None:
                    stream.flush()
        os._exit(status)


def _run_main(code: str, stage: Stage) -> int:
    main = _fresh_main(stage.names)
    try:
        exec(compile(code, "solution.py", "exec"), main)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except MemoryError:
        return EXIT_MEMORY
    except BaseException:
        return 1
    return 0


def _fresh_main(names: dict[str, Any]) -> dict[str, Any]:
    module = types.ModuleType("__main__")
    # Known as builtins are, so that a name counts as the solution's only when the solution defines it.
    vars(module)["__builtins__"] = names
    sys.modules["__main__"] = module
    return vars(module)


class Channel:
    """Length-prefixed JSON on two descriptors."""

    def __init__(self, inbox: int, outbox: int):
        self._inbox, self._outbox = inbox, outbox

    def send(self, message: Any, deadline: float | None) -> None:
        """Raises Deadline, or Ended when nobody reads any more."""
        data = json.dumps(message).encode()
        data = memoryview(struct.pack("<I", len(data)) + data)
        try:
            while data:
                _wait([], [self._outbox], deadline)
                data = data[os.write(self._outbox, data[: select.PIPE_BUF]) :]  # so much never blocks now
        except OSError:
            raise Ended from None

    def receive(self, deadline: float | None) -> Any:
        """Raises Deadline, Ended, or wire.Malformed."""
        size = struct.unpack("<I", self._exactly(4, deadline))[0]
        if size > MAX_FRAME:
            raise wire.Malformed(f"a value of {size} bytes")
        try:
            return json.loads(self._exactly(size, deadline))
        except (ValueError, RecursionError) as error:
            raise wire.Malformed(str(error)[:200]) from None

    def _exactly(self, size: int, deadline: float | None) -> bytes:
        parts = []
        while size:
            _wait([self._inbox], [], deadline)
            part = os.read(self._inbox, min(size, 2**20))
            if not part:
                raise Ended
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _wait(reading: list[int], writing: list[int], deadline: float | None) -> None:
    if deadline and not any(select.select(reading, writing, [], max(0.0, deadline - time.monotonic()))):
        raise Deadline


class Ended(BaseException):
    """The other process is gone. Not an Exception: a test's own `except Exception` must not catch it."""


class Deadline(BaseException):
    """A call took longer than one test may."""


# ---- the tested side


def run_tested(code: str, prelude: str, stage: Stage, inbox: int, outbox: int) -> None:
    """Serves the referee's calls on a solution. Never returns."""
    status = 1
    try:
        _Tested(code, prelude, stage.names, Channel(inbox, outbox)).serve()
        status = 0
    except MemoryError:
        status = EXIT_MEMORY
    finally:  # whatever else was raised
        os._exit(status)


class _Tested:
    def __init__(self, code: str, prelude: str, names: dict[str, Any], channel: Channel):
        self._channel, self._handles = channel, []
        self._main = _fresh_main(names)
        self._main["__name__"] = "solution"
        self._failure: BaseException | None = None
        self._shared: list[str] = []
        try:
            exec(compile(prelude, "prelude.py", "exec"), self._main)
            self._shared = [name for name, item in self._main.items() if isinstance(item, type)]
            exec(compile(code, "solution.py", "exec"), self._main)
        except MemoryError:
            raise
        except BaseException as error:
            self._failure = error

    def serve(self) -> None:
        while True:
            request = self._channel.receive(None)
            known: list[Any] = []
            classes = {name: self._main[name] for name in self._shared if isinstance(self._main.get(name), type)}
            try:
                if self._failure is not None:
                    raise self._failure
                result = self._answer(request, known, classes)
                reply = {"value": wire.encode(result, known, classes, self._keep)}
            except MemoryError:
                raise
            except BaseException as error:
                reply = {"error": [[kind.__name__ for kind in type(error).__mro__], str(error)[:500]]}
            self._channel.send(reply, None)

    def _answer(self, request: dict[str, Any], known: list[Any], classes: dict[str, type]) -> Any:
        operation, target = request["operation"], request["target"]
        if operation == "evaluate":
            return _called_here(eval(target, {**self._main, "__builtins__": {}}))
        if operation == "function":
            return _called_here(self._function(target))
        if operation == "defined":
            return [name for name in target if name in self._main]
        item = self._handles[target]
        if operation == "attribute":
            return getattr(item, request["name"])
        if operation == "set_attribute":
            return setattr(item, request["name"], self._decode(request["arguments"], known, classes))
        if operation == "items":
            return list(itertools.islice(item, MAX_ITEMS))
        if operation == "truth":
            return bool(item)
        args, kwargs = self._decode(request["arguments"], known, classes)
        return item(*args, **kwargs)

    def _function(self, name: str) -> Any:
        """Of that name, or the method of that name where there is a class Solution with one."""
        solution = self._main.get("Solution")
        if isinstance(solution, type) and hasattr(solution, name):
            return getattr(solution(), name)
        if name not in self._main:
            raise NameError(f"name {name!r} is not defined")
        return self._main[name]

    def _decode(self, arguments: dict[str, Any], known: list[Any], classes: dict[str, type]) -> Any:
        return wire.decode(arguments, known, classes, lambda node: self._handles[node[1]])

    def _keep(self, item: Any) -> list[Any]:
        self._handles.append(item)
        return ["handle", len(self._handles) - 1]


def _called_here(function: Any) -> Any:
    """`f = tuple`, too, is a solution that answers here: the class itself would travel as a value."""
    builtin = isinstance(function, type) and function.__module__ == "builtins"
    return functools.partial(function) if builtin else function


# ---- the referee's side


class Session:
    """The referee's end: asks the solution's process and counts how often."""

    def __init__(self, channel: Channel, timeout_s: float, *, may_stop: bool):
        """may_stop: the tests know what to do with a StopIteration, which would else end a loop of theirs."""
        self._channel, self._timeout_s = channel, timeout_s
        self._refused = () if may_stop else _STOPS
        self.classes: dict[str, type] = {}
        self.num_calls = 0

    def ask(self, operation: str, target: Any, **more: Any) -> Any:
        return self._ask({"operation": operation, "target": target, **more}, [])

    def call(self, handle: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.num_calls += 1
        return self.pass_on("call", handle, [args, kwargs])

    def pass_on(self, operation: str, handle: int, value: Any, **more: Any) -> Any:
        """Asks with a value; what the solution changes inside it changes here too."""
        known: list[Any] = []
        arguments = wire.encode(value, known, self.classes, _handle_of)
        return self._ask({"operation": operation, "target": handle, "arguments": arguments, **more}, known)

    def _ask(self, request: dict[str, Any], known: list[Any]) -> Any:
        deadline = time.monotonic() + self._timeout_s
        self._channel.send(request, deadline)
        reply = self._channel.receive(deadline)
        if not isinstance(reply, dict) or ("error" not in reply and "value" not in reply):
            raise wire.Malformed("neither a value nor an error")
        if "error" in reply:
            raise _exception(reply["error"], self._refused)
        return wire.decode(reply["value"], known, self.classes, lambda node: Remote(self, int(node[1])))


def _exception(described: Any, refused: tuple[type, ...]) -> Exception:
    """The builtin exception nearest to the one that the solution raised."""
    try:
        names, text = described
        for name in names:
            kind = getattr(builtins, str(name), None)
            if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, refused):
                return kind(f"{names[0]}: {text}")
        return RuntimeError(f"{names[0]}: {text}")
    except (TypeError, ValueError, IndexError):
        return RuntimeError("the solution failed without saying how")


def _handle_of(item: Any) -> list[Any]:
    if isinstance(item, Remote):
        return ["handle", object.__getattribute__(item, "_handle")]
    raise TypeError(f"a {type(item).__name__} cannot be passed to the solution")


class Remote:
    """Something that lives in the solution's process. Equal to nothing but itself."""

    def __init__(self, session: Session, handle: int):
        object.__setattr__(self, "_session", session)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._session.call(self._handle, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._session.ask("attribute", self._handle, name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._session.pass_on("set_attribute", self._handle, value, name=name)

    def __iter__(self) -> Any:
        return iter(self._session.ask("items", self._handle))

    def __bool__(self) -> bool:
        return self._session.ask("truth", self._handle) is True

    def __len__(self) -> int:
        try:
            return self._session.ask("attribute", self._handle, name="__len__")()
        except AttributeError as error:  # list() asks a generator too, and goes on after a TypeError only
            raise TypeError(str(error)) from None

    def __getitem__(self, key: Any) -> Any:
        return self._session.ask("attribute", self._handle, name="__getitem__")(key)


class Namespace(dict):
    """Globals of test code. A name that the tests do not define is the solution's, unless it is a known module."""

    def __init__(self, session: Session, overridden: frozenset[str]):
        """overridden: names of builtins that are the solution's all the same."""
        super().__init__()
        self.session, self.overridden = session, overridden

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self.overridden:
            raise KeyError(name)  # and Python looks there
        if name in TEST_MODULES:
            return importlib.import_module(name)
        return self.session.ask("function", name)
