"""Steps that a pipeline must survive: slow ones, and one that takes its process with it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from or1_megatron.prepare import pool
from or1_megatron.prepare.catalog import CATALOG
from or1_megatron.prepare.step import Context, Drop, JudgeRow, Row, RowStep, Step, Table, TableStep, option

ROOT = Path(__file__).resolve().parents[3]
NUM_ROWS = 3000


@dataclass(frozen=True)
class SlowOptions:
    log: str = option("", "a line for each row that was judged", in_key=False)
    seconds: float = option(0.0, "of each row", in_key=False)


def open_slow(options: SlowOptions) -> JudgeRow:
    def judge(row: Row) -> Row | Drop:
        time.sleep(options.seconds)
        if options.log:
            with open(options.log, "a") as log:
                log.write(row["uid"] + "\n")
        if row["answer"].endswith("7"):
            return Drop("seven", row["answer"])
        return row | {"solution": f"by {row['answer']}"}

    return judge


def run_slowly(table: Table, options: SlowOptions, context: Context) -> Iterator[Row | tuple[str, Drop]]:
    """Notes each batch in scratch, as a step does that goes on where it was."""
    for batch in table.batches():
        time.sleep(options.seconds)
        (context.scratch / batch[0]["uid"].replace("/", "-")).touch()
        for row in batch:
            yield (row["uid"], Drop("three")) if row["answer"].endswith("3") else row


@dataclass(frozen=True)
class DeadlyOptions:
    limit: float = option(300.0, "seconds that a row, or a batch, may take")


def open_deadly(options: DeadlyOptions) -> JudgeRow:
    pool.BATCH_LIMIT_S = pool.ROW_LIMIT_S = options.limit  # of this process alone

    def judge(row: Row) -> Row | Drop:
        if row["problem"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if row["problem"] == "hang":
            time.sleep(600)
        if row["problem"] == "fail":
            raise ZeroDivisionError("of the step's own")
        return row

    return judge


STEPS: tuple[Step, ...] = (
    RowStep("slow", SlowOptions, open_slow),
    TableStep("slow_table", SlowOptions, run_slowly),
    RowStep("deadly", DeadlyOptions, open_deadly),
)


def write_rows(path: Path, num_rows: int) -> None:
    """num_rows rows for the source `rows`."""
    import json

    with path.open("w") as file:
        for i in range(num_rows):
            row = {"uid": f"s/{i}", "source": "s", "ability": "math", "problem": f"{'x' * (i % 90)} {i}?"}
            file.write(json.dumps({**row, "answer": str(i), "info": json.dumps({"index": i})}) + "\n")


def write_recipe(root: Path) -> Path:
    """A recipe, whose source has NUM_ROWS rows, for a cache and a training file below `root`."""
    write_rows(root / "rows.jsonl", NUM_ROWS)
    path = root / "recipe.yaml"
    path.write_text(
        f"data: {root}\ncache: {root / 'cache'}\nworkers: 1\nsteps:\n"
        "  all: {do: rows, files: ['${data}/rows.jsonl']}\n"
        "  slow: {do: slow}\n"
        "  some: {do: sample, rows: 2400}\n"
        "  threes: {do: slow_table}\n"
        f"write: {{path: {root / 'out' / 'train.parquet'}}}\n"
    )
    return path


def outcome(folder: Path) -> dict[str, bytes]:
    """Bytes of every table of a cache, by the step's folder, and of the written files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


if __name__ == "__main__":
    from or1_megatron.cli import main
    from tests.unit.prepare import odd_steps  # by this name the processes of a pool know them

    CATALOG.update({step.name: step for step in odd_steps.STEPS})
    sys.exit(main(["prepare", *sys.argv[1:]]))
