"""What a step of `or1 prepare` is: rows in, rows out, and a reason for every row that is dropped.

A row is one problem (`SCHEMA`). Three kinds of step:

- a SourceStep reads files of others;
- a RowStep judges each row by itself; rows are dealt to worker processes, and to nodes, in batches;
- a TableStep sees the whole table, batch by batch, and may keep what it has found so far in `Context.scratch`, which
  outlives an interruption.

Neither may depend on the number of workers or on the order in which they finish.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from or1_megatron.errors import UserError

_REASON = re.compile("[a-z0-9_]+")

Row = dict[str, Any]  # one problem, the fields of SCHEMA

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),  # unique in the table: SOURCE/NUMBER
        ("source", pa.string()),  # becomes data_source
        ("ability", pa.string()),  # math or code
        ("problem", pa.string()),  # the question alone, without an instruction how to answer
        ("answer", pa.string()),  # the gold answer, or tests as JSON: becomes reward_model.ground_truth
        ("solution", pa.string()),  # the reference solution; empty where the source has none
        ("licence", pa.string()),  # SPDX where there is one, else the source's words
        ("origin", pa.string()),  # file or hub id, and row in it
        ("info", pa.string()),  # JSON object: what else is known; becomes extra_info
    ]
)


@dataclass(frozen=True)
class Drop:
    """Why a row goes no further. `reason` is one of few, counted, in_this_form; `detail` is about this row."""

    reason: str
    detail: str = ""

    def __post_init__(self) -> None:
        assert _REASON.fullmatch(self.reason), self.reason


class Unusable(ValueError):
    """No use can be made of a row, or of its tests; `drop` says why."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail or reason)
        self.drop = Drop(reason, detail)


class Finished(Exception):
    """A TableStep was asked for no rows, only for what it has told by now: the preparation ends here, and well."""


def information(row: Row) -> dict[str, Any]:
    """What `info` holds. Raises UserError when it is no JSON object."""
    try:
        info = json.loads(row["info"] or "{}")
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict):
        raise UserError(f"row {row['uid']}: info={row['info']!r:.60} is no JSON object")
    return info


def with_information(row: Row, **more: Any) -> Row:
    """The row with more in `info`, or something else under a name that is there."""
    return {**row, "info": json.dumps({**information(row), **more}, ensure_ascii=False)}


class Table(Protocol):
    """Rows that a step before has written; read as often as wanted, in one order."""

    @property
    def num_rows(self) -> int: ...

    def batches(self, columns: list[str] | None = None) -> Iterator[list[Row]]:
        """A few thousand rows at a time, in order; of `columns` only, when given."""
        ...


@dataclass(frozen=True)
class Context:
    """What a step is given beside its options."""

    seed: int
    workers: int  # processes on this machine
    scratch: Path  # a folder of the step's own; emptied when the step is complete
    tables: Mapping[str, Table] = field(default_factory=dict)  # other steps' rows, which the options name
    progress: Callable[[int], None] = lambda rows: None  # rows done since the last call
    message: Callable[[str], None] = print


JudgeRow = Callable[[Row], Row | Drop]
REQUIRED = MISSING  # as an option's default: it has none


def option(default: Any, meaning: str, *, in_key: bool = True) -> Any:
    """A field of a step's options, or of a recipe; `meaning` is what --help says.

    in_key: whether rows depend on it. What a step has done is found again whatever the other options are.
    """
    return field(default=default, metadata={"help": meaning, "in_key": in_key})


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError; for an option's `__post_init__`, so that a recipe is refused before it runs."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is not known; give {' or '.join(choices)}")


def check_positive(options: Any, *names: str) -> None:
    """Raises UserError; for an options' `__post_init__`."""
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"{name}={getattr(options, name)} must be above 0")


@dataclass(frozen=True)
class SourceStep:
    """`read` yields the files' rows, one after the other; (uid, Drop) for one that cannot be used."""

    name: str
    options: type  # a frozen dataclass of `option`s; refuses in __post_init__ what no row could come of
    files: Callable[[Any], list[Path]]  # what it reads, fetched when need be; their content is in the cache's key
    read: Callable[[Any, list[Path]], Iterator[Row | tuple[str, Drop]]]
    version: int = 1  # raised when the outcome for the same input changes: older caches are then not used


@dataclass(frozen=True)
class RowStep:
    """`open` is called once in every worker with the step's options, and returns the judge of one row."""

    name: str
    options: type
    open: Callable[[Any], JudgeRow]
    version: int = 1


@dataclass(frozen=True)
class TableStep:
    """`run` yields every row of the table once, in order, as it is kept (changed or not), or (uid, Drop)."""

    name: str
    options: type
    run: Callable[[Table, Any, Context], Iterator[Row | tuple[str, Drop]]]
    version: int = 1
    reads: Callable[[Any], list[str]] = lambda options: []  # names of the other steps whose tables it wants
    # Raises UserError for what the machine lacks (a model, a key); called before any step of the recipe is run.
    ready: Callable[[Any], None] = lambda options: None
    # What the rows depend on outside of the recipe, such as a model's weights: JSON that is in the cache's key.
    depends_on: Callable[[Any], Any] = lambda options: None


Step = SourceStep | RowStep | TableStep
