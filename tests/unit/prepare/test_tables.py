"""The files between two steps: row groups, and a journal that was torn."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from or1_megatron.errors import UserError
from or1_megatron.prepare import tables


def test_row_groups_are_the_same_however_rows_come_in(tmp_path: Path):
    rows = [dict.fromkeys(tables.SCHEMA.names, "") | {"uid": str(i), "problem": "y" * (i % 7)} for i in range(5000)]
    whole = tables.table_of(rows)
    for name, portion in (("a", 5000), ("b", 77)):
        with tables.TableWriter(tmp_path / name, tables.SCHEMA) as file:
            for begin in range(0, len(rows), portion):
                file.write(whole.slice(begin, portion))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    table = tables.StoredTable(tmp_path / "a")
    assert [group.num_rows for group in table.groups()] == [2048, 2048, 904]
    assert [row for batch in table.batches() for row in batch] == rows


def test_a_torn_journal_keeps_what_is_whole(tmp_path: Path):
    with tables.Journal(tmp_path / "j") as journal:
        for number in (2, 0, 1):
            journal.append(number, bytes([number]) * 100)
    whole = (tmp_path / "j").read_bytes()
    for cut in (1, 99, 105, 119):  # within the last frame's payload and header
        (tmp_path / "j").write_bytes(whole[:-cut])
        with tables.Journal(tmp_path / "j") as journal:
            assert [number in journal for number in (2, 0, 1)] == [True, True, False]
            journal.append(1, b"again")
            assert (journal[0], journal[1], journal[2]) == (b"\0" * 100, b"again", b"\2" * 100)
    (tmp_path / "j").write_bytes(whole[:150] + b"!" + whole[151:])
    with tables.Journal(tmp_path / "j") as journal:
        assert 2 in journal and 0 not in journal and 1 not in journal


def test_text_that_cannot_be_stored_is_named():
    with pytest.raises(UserError, match="row 'a': problem='.ud800' is not storable text"):
        tables.table_of([{"uid": "a", "problem": "\ud800"}])
    assert tables.table_of([]).schema == tables.SCHEMA and isinstance(tables.table_of([]), pa.Table)
