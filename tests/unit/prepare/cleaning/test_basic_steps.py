"""Rows that are taken out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from planted.rows import Rows, context, row

from or1_megatron.prepare.catalog import CATALOG
from or1_megatron.prepare.cleaning.basic_steps import DropOptions
from or1_megatron.prepare.step import Drop, TableStep


def dropped(scratch: Path, *uids: str) -> tuple[list[str], list[str]]:
    """(uids of the dropped rows of t/0 to t/4, what was said)."""
    step, said = CATALOG["drop_rows"], []
    assert isinstance(step, TableStep)
    told = replace(context(scratch, workers=1), message=said.append)
    items = step.run(Rows([row(f"t/{i}", "1 + 1?") for i in range(5)], batch=2), DropOptions(uids), told)
    return [item[0] for item in items if isinstance(item, tuple) and item[1] == Drop("by_hand")], said


def test_rows_go_by_hand(tmp_path: Path) -> None:
    assert dropped(tmp_path, "t/3", "t/1", "t/1") == (["t/1", "t/3"], [])


def test_uids_that_no_row_has_are_told(tmp_path: Path) -> None:
    assert dropped(tmp_path, "t/3", "nope/1", "t/7") == (["t/3"], ["drop_rows: no row has 2 of 3 uids: nope/1, t/7"])
