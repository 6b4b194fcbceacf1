"""Steps for problems of any kind: rows of the common schema, some sources, some lengths, a random sample."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from or1_megatron.data.rows import SUFFIXES, BadRow, is_row_file, read_rows
from or1_megatron.errors import UserError
from or1_megatron.prepare.step import (
    REQUIRED,
    SCHEMA,
    Context,
    Drop,
    JudgeRow,
    Row,
    RowStep,
    SourceStep,
    Step,
    Table,
    TableStep,
    check_positive,
    option,
)

_MOST_NAMED = 5  # uids that no row has


@dataclass(frozen=True)
class RowsOptions:
    files: tuple[str, ...] = option(REQUIRED, f"with the fields of a row, all of them text: {', '.join(SUFFIXES)}")

    def __post_init__(self) -> None:
        for name in self.files:
            if not is_row_file(name):
                raise UserError(f"{name}: rows are read from {', '.join(SUFFIXES)}")


def _read_rows(options: RowsOptions, files: list[Path]) -> Iterator[Row | tuple[str, Drop]]:
    for path in files:
        for place, row in read_rows(path):
            if isinstance(row, BadRow):
                raise UserError(f"{path} {place} is {row.reason}: {row.detail}")
            if not isinstance(row.get("uid"), str):
                raise UserError(f"{path} {place}: {row!r:.60} is no row with a uid")
            missing = [name for name in ("source", "ability", "problem", "answer") if not row.get(name)]
            if missing:
                yield row["uid"], Drop("empty", f"no {', '.join(missing)}")
            else:
                origin = row.get("origin") or f"{path.name} {place}"
                yield {name: row.get(name) or "" for name in SCHEMA.names} | {"origin": origin}


@dataclass(frozen=True)
class LengthOptions:
    least: int = option(1, "characters of the problem, at least")
    most: int = option(10_000, "characters of the problem, at most")

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise UserError(f"least={self.least}, most={self.most}: use 0 <= least <= most")


def _open_length(options: LengthOptions) -> JudgeRow:
    def judge(row: Row) -> Row | Drop:
        length = len(row["problem"])
        if length < options.least:
            return Drop("too_short", f"{length} characters")
        return Drop("too_long", f"{length} characters") if length > options.most else row

    return judge


@dataclass(frozen=True)
class SourcesOptions:
    sources: tuple[str, ...] = option(REQUIRED, "those that are kept")


def _open_sources(options: SourcesOptions) -> JudgeRow:
    return lambda row: row if row["source"] in options.sources else Drop("other_source", row["source"])


@dataclass(frozen=True)
class DropOptions:
    uids: tuple[str, ...] = option(REQUIRED, "of the rows that are taken out by hand")


def _drop(table: Table, options: DropOptions, context: Context) -> Iterator[Row | tuple[str, Drop]]:
    """A uid that no row has is told, not refused: a step before may have dropped that row."""
    left = dict.fromkeys(options.uids)
    uids = frozenset(left)
    for batch in table.batches():
        for row in batch:
            left.pop(row["uid"], None)
            yield (row["uid"], Drop("by_hand")) if row["uid"] in uids else row
        context.progress(len(batch))
    if left:
        context.message(f"drop_rows: no row has {len(left)} of {len(uids)} uids: {', '.join([*left][:_MOST_NAMED])}")


@dataclass(frozen=True)
class SampleOptions:
    rows: int = option(REQUIRED, "how many are kept; all of them when there are no more")

    def __post_init__(self) -> None:
        check_positive(self, "rows")


def _sample(table: Table, options: SampleOptions, context: Context) -> Iterator[Row | tuple[str, Drop]]:
    """The rows whose uids have the smallest hashes: which ones depends on the seed and the uids alone."""

    def rank(uid: str) -> bytes:
        return hashlib.blake2b(f"{context.seed}/{uid}".encode(), digest_size=16).digest()

    uids = (row["uid"] for batch in table.batches(["uid"]) for row in batch)
    kept = set(heapq.nsmallest(options.rows, map(rank, uids)))
    for batch in table.batches():
        for row in batch:
            yield row if rank(row["uid"]) in kept else (row["uid"], Drop("not_sampled"))
        context.progress(len(batch))


STEPS: tuple[Step, ...] = (
    SourceStep("rows", RowsOptions, lambda options: [Path(name) for name in options.files], _read_rows),
    RowStep("keep_length", LengthOptions, _open_length),
    RowStep("keep_sources", SourcesOptions, _open_sources),
    TableStep("drop_rows", DropOptions, _drop),
    TableStep("sample", SampleOptions, _sample),
)
