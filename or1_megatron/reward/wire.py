"""Python values between two processes that do not trust each other: a flat table of nodes in JSON, no pickle.

    {"root": ref, "nodes": [node, ...]}       ref: a JSON scalar, or [index] into nodes

A list, tuple, dict or object is a node, so shared and cyclic structure survives, and long linked lists do not nest.
Only builtin containers, numbers, text, dates and the classes that the receiver names are ever built. Anything else
travels as a handle: a number under which its owner keeps it (see session.py). `known` are objects that both sides
already hold, in the order of the nodes that first carried them: a reply refers to them by index and updates them in
place, which is how a function that changes its argument is tested.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

_SCALARS = (bool, str, float, type(None))
_SMALL = 2**53
_SEQUENCES: dict[type, str] = {
    list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque",
}  # fmt: skip
_BUILD: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "frozenset": frozenset}
_TYPES = (int, float, str, bool, bytes, complex, list, tuple, set, frozenset, dict, type(None))
_TYPES_BY_NAME = {item.__name__: item for item in _TYPES}
_DATES: dict[str, Any] = {item.__name__: item for item in (date, datetime, time)}
_SHELLS: dict[str, Callable[[], Any]] = {
    "list": list, "set": set, "deque": deque, "dict": dict, "Counter": Counter, "OrderedDict": OrderedDict,
}  # fmt: skip


def encode(root: Any, known: list[Any], classes: dict[str, type], handle: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """The message for `root`; `known` grows by every object that got a node.

    handle: makes the node of an object that cannot travel, e.g. a generator or an instance of another class.
    """
    index = {id(item): place for place, item in enumerate(known)}
    nodes: list[Any] = []

    def ref(value: Any) -> Any:
        kind = type(value)
        if kind in _SCALARS:
            return value
        if kind is int and -_SMALL < value < _SMALL:
            return value
        place = index.get(id(value))
        if place is None:
            place = index[id(value)] = len(known)
            known.append(value)
        return [place]

    root_ref = ref(root)
    while len(nodes) < len(known):
        nodes.append(_node(known[len(nodes)], ref, classes, handle))
    return {"root": root_ref, "nodes": nodes}


def _node(value: Any, ref: Callable[[Any], Any], classes: dict[str, type], handle: Callable[[Any], list[Any]]) -> list:
    kind = type(value)
    if kind in _SEQUENCES:
        return [_SEQUENCES[kind], [ref(item) for item in value]]
    if kind in (dict, defaultdict, Counter, OrderedDict):
        name = "dict" if kind is defaultdict else kind.__name__
        return [name, [[ref(key), ref(item)] for key, item in value.items()]]
    if classes.get(kind.__name__) is kind and hasattr(value, "__dict__"):
        return ["object", kind.__name__, [[name, ref(item)] for name, item in vars(value).items()]]
    if isinstance(value, type) and value in _TYPES:
        return ["type", value.__name__]
    if isinstance(value, int):
        return ["int", hex(int(value))]
    if isinstance(value, float):
        return ["float", float(value)]
    if isinstance(value, str):
        return ["str", str.__str__(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, Fraction | Decimal):
        return [type(value).__name__, str(value)]
    if kind in _DATES.values():
        return [kind.__name__, value.isoformat()]
    if kind is timedelta:
        return ["timedelta", [value.days, value.seconds, value.microseconds]]
    if isinstance(value, range):
        return ["range", [hex(value.start), hex(value.stop), hex(value.step)]]
    if isinstance(value, tuple | list | set | frozenset | dict):  # a namedtuple, say: its plain form
        plain = next(base for base in (tuple, list, set, frozenset, dict) if isinstance(value, base))
        items = value.items() if isinstance(value, dict) else value
        return [plain.__name__, [[ref(k), ref(v)] for k, v in items] if plain is dict else [ref(v) for v in items]]
    if type(value).__module__ == "numpy":  # scalars and arrays compare as their plain values
        return _node(value.tolist(), ref, classes, handle)
    return handle(value)


class Malformed(ValueError):
    """The other side sent something that is no message."""


def decode(
    message: dict[str, Any], known: list[Any], classes: dict[str, type], open_handle: Callable[[list[Any]], Any]
) -> Any:
    """The root value. Objects in `known` are updated in place; raises Malformed."""
    try:
        return _Decoder(message["nodes"], known, classes, open_handle).run(message["root"])
    except (KeyError, IndexError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise Malformed(f"{type(error).__name__}: {str(error)[:200]}") from None


class _Decoder:
    def __init__(self, nodes: list[Any], known: list[Any], classes: dict[str, type], open_handle: Callable):
        self._nodes, self._known, self._classes, self._open_handle = nodes, known, classes, open_handle
        self._values: list[Any] = [_MISSING] * len(nodes)

    def run(self, root: Any) -> Any:
        for place, node in enumerate(self._nodes):
            if node[0] in _SHELLS or node[0] == "object":
                self._values[place] = self._shell(place, node)
        for place in range(len(self._nodes)):
            self._value(place)
        # Sets and dicts last: hashing a member needs the member whole.
        for late in (False, True):
            for place, node in enumerate(self._nodes):
                if (node[0] in ("set", "dict", "Counter", "OrderedDict")) == late:
                    self._fill(self._values[place], node)
        self._known[len(self._known) :] = self._values[len(self._known) :]
        return self._ref(root)

    def _shell(self, place: int, node: list[Any]) -> Any:
        if place < len(self._known) and type(self._known[place]).__name__ == (
            node[1] if node[0] == "object" else node[0]
        ):
            return self._known[place]
        if node[0] == "object":
            kind: Any = self._classes[node[1]]
            return kind.__new__(kind)
        return _SHELLS[node[0]]()

    def _value(self, place: int) -> Any:
        if self._values[place] is not _MISSING:
            return self._values[place]
        kind, content = self._nodes[place][0], self._nodes[place][1]
        if kind in _BUILD:
            value = _BUILD[kind]([self._ref(item) for item in content])
        elif kind == "int":
            value = int(content, 16)
        elif kind == "float":
            value = float(content)
        elif kind == "str":
            value = str(content)
        elif kind == "bytes":
            value = bytes.fromhex(content)
        elif kind == "complex":
            value = complex(*content)
        elif kind == "Fraction":
            value = Fraction(content)
        elif kind == "Decimal":
            value = Decimal(content)
        elif kind in _DATES:
            value = _DATES[kind].fromisoformat(content)
        elif kind == "timedelta":
            value = timedelta(*content)
        elif kind == "range":
            value = range(*(int(item, 16) for item in content))
        elif kind == "type":
            value = _TYPES_BY_NAME[content]
        elif kind == "handle":
            value = self._open_handle(self._nodes[place])
        else:
            raise ValueError(f"unknown node {kind!r}")
        self._values[place] = value
        return value

    def _ref(self, ref: Any) -> Any:
        return self._value(ref[0]) if isinstance(ref, list) else ref

    def _fill(self, value: Any, node: list[Any]) -> None:
        kind = node[0]
        if kind == "list":
            value[:] = [self._ref(item) for item in node[1]]
        elif kind in ("set", "deque"):
            value.clear()
            (value.update if kind == "set" else value.extend)([self._ref(item) for item in node[1]])
        elif kind in ("dict", "Counter", "OrderedDict"):
            value.clear()
            for key, item in node[1]:
                value[self._ref(key)] = self._ref(item)
        elif kind == "object":
            vars(value).clear()
            for name, item in node[2]:
                vars(value)[name] = self._ref(item)


_MISSING = object()
