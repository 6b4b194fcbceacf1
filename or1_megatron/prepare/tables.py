"""Rows on the disk: parquet in equal row groups, and the journal of a step that is under way.

The bytes of a table depend on its rows alone: however they came in, they are laid out anew in groups of
`ROWS_PER_GROUP` rows, or fewer where those would be more than `BYTES_PER_GROUP`.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from or1_megatron.errors import UserError
from or1_megatron.prepare.step import SCHEMA, Drop, Row

FORMAT = 1  # raised when anything changes that a cache's tables or journals depend on: SCHEMA, groups, batches
ROWS_PER_GROUP = 2048
BYTES_PER_GROUP = 32 * 2**20
BATCH_ROWS = 256  # that are judged, and journalled, at a time

# What a step has done with rows: `reason` is null where a row is kept.
JUDGED = pa.schema([*SCHEMA, pa.field("reason", pa.string()), pa.field("detail", pa.string())])


def table_of(rows: list[Row], schema: pa.Schema = SCHEMA) -> pa.Table:
    """Raises UserError naming a row whose values are not text, or no text that can be stored."""
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowException, UnicodeError) as error:
        for row in rows:
            for name in SCHEMA.names:
                try:
                    pa.array([row.get(name)], pa.string())
                except (pa.ArrowException, UnicodeError):
                    raise UserError(f"row {row.get('uid')!r}: {name}={row[name]!r:.60} is not storable text") from None
        raise AssertionError(f"rows do not fit {schema.names}: {error}") from None


def dropped(uid: str, drop: Drop) -> Row:
    """A row of JUDGED of which no more is known than its uid."""
    return dict.fromkeys(SCHEMA.names, "") | {"uid": uid, "reason": drop.reason, "detail": drop.detail}


def to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


class TableWriter:
    """A parquet file of `schema`, written group by group. A context manager."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._schema = schema
        self._file = parquet.ParquetWriter(path, schema, compression="zstd")
        self._pending: list[pa.Table] = []
        self._group_rows = self._group_bytes = 0

    def write(self, rows: pa.Table) -> None:
        begin = 0
        for i, size in enumerate(_row_bytes(rows), 1):
            self._group_rows += 1
            self._group_bytes += size
            if self._group_rows == ROWS_PER_GROUP or self._group_bytes >= BYTES_PER_GROUP:
                self._pending.append(rows.slice(begin, i - begin))
                self._flush()
                begin = i
        self._pending.append(rows.slice(begin))

    def _flush(self) -> None:
        group = pa.concat_tables(self._pending).combine_chunks().cast(self._schema)
        if group.num_rows:
            self._file.write_table(group, row_group_size=group.num_rows)
        self._pending, self._group_rows, self._group_bytes = [], 0, 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None and self._pending:
            self._flush()
        self._file.close()


def _row_bytes(rows: pa.Table) -> list[int]:
    """Bytes of text in each row, but for that in lists."""
    total = np.zeros(rows.num_rows, np.int64)
    while any(pa.types.is_struct(column.type) for column in rows.columns):
        rows = rows.flatten()
    for column in rows.columns:
        if pa.types.is_string(column.type):
            lengths = compute.call_function("binary_length", [column])
            total += compute.fill_null(lengths, 0).to_numpy()
    return total.tolist()


class StoredTable:
    """Rows that a step has written; a `Table` of step.py."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._num_rows = parquet.read_metadata(path).num_rows
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be read ({reason}); remove {path.parent}, then it is made anew") from None

    @property
    def num_rows(self) -> int:
        return self._num_rows

    def groups(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        with parquet.ParquetFile(self.path) as file:
            for i in range(file.num_row_groups):
                yield file.read_row_group(i, columns=columns, use_threads=False)

    def batches(self, columns: list[str] | None = None) -> Iterator[list[Row]]:
        for group in self.groups(columns):
            yield group.to_pylist()

    def slices(self) -> Iterator[pa.Table]:
        """At most BATCH_ROWS rows each; never across a group's end."""
        for group in self.groups():
            for begin in range(0, group.num_rows, BATCH_ROWS):
                yield group.slice(begin, BATCH_ROWS)


_FRAME = struct.Struct("<QQI")  # batch, bytes, CRC-32 of them


class Journal:
    """The finished batches of a step under way, in the order in which they were finished.

    A batch counts when all its bytes are there: what a kill has cut off is cut off when the file is opened again.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0
        size = os.fstat(self._file).st_size
        while self._end + _FRAME.size <= size:
            number, length, checksum = _FRAME.unpack(os.pread(self._file, _FRAME.size, self._end))
            begin = self._end + _FRAME.size
            data = os.pread(self._file, length, begin) if begin + length <= size else b""
            if len(data) != length or zlib.crc32(data) != checksum:
                break
            self._places[number] = (begin, length)
            self._end = begin + length
        os.ftruncate(self._file, self._end)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def append(self, number: int, data: bytes) -> None:
        frame = memoryview(_FRAME.pack(number, len(data), zlib.crc32(data)) + data)
        end = self._end
        while frame:  # the kernel may take less than all, above all of a disk that is nearly full
            done = os.pwrite(self._file, frame, end)
            frame, end = frame[done:], end + done
        self._places[number] = (self._end + _FRAME.size, len(data))
        self._end = end

    def __getitem__(self, number: int) -> bytes:
        begin, length = self._places[number]
        return os.pread(self._file, length, begin)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._file)
