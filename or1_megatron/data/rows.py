"""Rows of other people's files, one after the other: .json, .jsonl, .parquet, the first two also gzipped.

A row that cannot be read is a `BadRow`, and the reader goes on with the next where the file allows it: a line of .jsonl
is a row of its own; a .json has to be sound up to the end. Memory is that of the largest rows, not of the file.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from or1_megatron.errors import UserError

SUFFIXES = (".json", ".jsonl", ".parquet", ".json.gz", ".jsonl.gz")
_PARQUET_ROWS, _PARQUET_BYTES = 1024, 8 * 2**20  # read at once: rows of code problems hold megabytes of tests
_CHUNK = 2**20  # bytes of .json read at once
_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()
_HUB = re.compile(r"(?P<identity>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+?))?(:(?P<pattern>.+))?")


@dataclass(frozen=True)
class BadRow:
    """`reason` is one of: not UTF-8, not JSON, not an object."""

    reason: str
    detail: str


def is_row_file(name: str) -> bool:
    return name.endswith(SUFFIXES)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """("line 3" or "row 3", the row), counted from 1. Text that is no UTF-8 holds lone surrogates where they are
    escaped in the file; raw bytes of that kind make a BadRow. Raises UserError: missing, of unknown kind, corrupt."""
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.is_dir() else f"{path} is a folder; give a file")
    if not is_row_file(path.name):
        raise UserError(f"{path} is of no known kind; use one of {', '.join(SUFFIXES)}")
    # pyarrow's errors are ValueErrors and OSErrors
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
            return
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            by_line = path.name.removesuffix(".gz").endswith(".jsonl")
            yield from _lines(file) if by_line else _json_rows(file)
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}; get the file anew") from None


def sound_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row. Raises UserError as read_rows does, and at the first bad row."""
    for where, row in read_rows(path):
        if isinstance(row, BadRow):
            raise UserError(f"{path} {where} is {row.reason}: {row.detail}")
        yield f"{path} {where}", row


def _object(row: Any) -> dict[str, Any] | BadRow:
    return row if isinstance(row, dict) else BadRow("not an object", f"holds a {type(row).__name__}")


def _lines(file: BufferedIOBase) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = _without_mark(line)
        if not line.strip():
            continue
        try:
            yield f"line {number}", _object(json.loads(line.decode()))
        except UnicodeDecodeError as error:
            yield f"line {number}", BadRow("not UTF-8", f"byte 0x{line[error.start]:02x} at {error.start}")
        except (ValueError, RecursionError) as error:
            yield f"line {number}", BadRow("not JSON", str(error))


def _without_mark(start: bytes) -> bytes:
    """Without UTF-8's byte order mark. Raises ValueError for UTF-16."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16, not UTF-8")
    return start.removeprefix(codecs.BOM_UTF8)


def _json_rows(file: BufferedIOBase) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Of a list, or of values one behind the other. Only the part around the next value is in memory."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text = decode(_without_mark(file.read(_CHUNK))).lstrip()
    in_list, text = text.startswith("["), text.removeprefix("[")
    number, position = 0, 0
    while True:
        position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]
        closed = in_list and text.startswith("]", position)
        value, end = _next_value(text, position) if not closed else (None, -1)
        if not closed and end in (-1, len(text)):  # the value may go on behind what has been read
            # as much again as there is: a long value is tried a few times, not once for each chunk
            chunk = file.read(max(_CHUNK, len(text) - position))
            more = decode(chunk, not chunk)
            if chunk or more:
                text, position = text[position:] + more, 0
                continue
        if end < 0:
            if isinstance(value, ValueError) or in_list != closed:
                raise ValueError(f"row {number + 1}: {value or 'the list is not closed'}")
            if closed and (text[position + 1 :] + decode(file.read(_CHUNK))).strip():
                raise ValueError(f"behind the list of {number} rows there is more")
            return
        number += 1
        try:
            text[position:end].encode()
            yield f"row {number}", _object(value)
        except UnicodeEncodeError as error:
            yield f"row {number}", BadRow("not UTF-8", f"byte 0x{ord(text[position + error.start]) & 0xFF:02x}")
        position = end


def _next_value(text: str, position: int) -> tuple[Any, int]:
    """(value, where it ends), or (why there is none, or None at the end of the text; -1)."""
    if position == len(text):
        return None, -1
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        return error, -1


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    from pyarrow import parquet

    number = 0
    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        widest = max([1.0, *(group.total_byte_size / group.num_rows for group in groups if group.num_rows)])
        for batch in file.iter_batches(max(1, min(_PARQUET_ROWS, int(_PARQUET_BYTES / widest)))):
            try:
                rows: list[dict[str, Any] | BadRow] = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [_parquet_row(batch, index) for index in range(batch.num_rows)]
            for row in rows:
                number += 1
                yield f"row {number}", row


def _parquet_row(batch: Any, index: int) -> dict[str, Any] | BadRow:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte 0x{error.object[error.start]:02x}")


def is_hub_name(name: str) -> bool:
    """OWNER/NAME[@REVISION][:PATTERN]; what ends like a file's name is none."""
    return _HUB.fullmatch(name) is not None and (":" in name or not is_row_file(name))


def hub_files(name: str, patterns: list[str]) -> list[Path]:
    """The files of a data set on the Hugging Face hub, in its cache: those of the name's own pattern, else of
    `patterns`, sorted. Raises UserError: no network, no such data set, no such file."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    found = _HUB.fullmatch(name)
    assert found, name
    identity, revision = found["identity"], found["revision"]
    patterns = [found["pattern"]] if found["pattern"] else patterns
    try:
        folder = Path(snapshot_download(identity, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:  # the hub's own errors and those of the network are OSErrors
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise UserError(
            f"data set {identity} could not be had from the hub ({type(error).__name__}: {reason}); on a machine "
            "without network give its file instead"
        ) from None
    below = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = [path for name, path in below.items() if any(fnmatch(name, pattern) for pattern in patterns)]
    if not paths:
        raise UserError(f"data set {identity}: no file of it matches {' or '.join(patterns)}; use {identity}:FILE")
    return paths


def origin_of(path: Path) -> str:
    """How others find the file: of one in the hub's cache OWNER/NAME@REVISION:FILE, else the path as it is."""
    parts = path.parts
    for index, part in enumerate(parts[:-3]):
        if part.startswith("datasets--") and parts[index + 1] == "snapshots":
            identity = part.removeprefix("datasets--").replace("--", "/", 1)
            return f"{identity}@{parts[index + 2][:12]}:{'/'.join(parts[index + 3 :])}"
    return str(path)
