"""Messages between the service and its workers: values in JSON, and behind them a text as it is.

    sizes of both (two little-endian 32-bit numbers), JSON, UTF-8

A response of a megabyte is so neither escaped nor parsed on its way.
"""

from __future__ import annotations

import json
import struct
from typing import Any

_SIZES = struct.Struct("<II")
_LONE_SURROGATES = "surrogatepass"  # a tokenizer may bring them


def frame(values: dict[str, Any], text: str = "") -> bytes:
    head, body = json.dumps(values).encode(), text.encode("utf-8", _LONE_SURROGATES)
    return _SIZES.pack(len(head), len(body)) + head + body


def take_frame(received: bytearray) -> tuple[dict[str, Any], str] | None:
    """The first message, which leaves the buffer; None while it is not whole."""
    if len(received) < _SIZES.size:
        return None
    head, body = _SIZES.unpack_from(received)
    begin = _SIZES.size + head
    if len(received) < begin + body:
        return None
    values = json.loads(received[_SIZES.size : begin])
    text = received[begin : begin + body].decode("utf-8", _LONE_SURROGATES)
    del received[: begin + body]
    return values, text
