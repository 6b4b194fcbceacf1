"""`or1 prepare RECIPE`: the steps that the written file needs, each taken from the cache or run, then the file.

A step's outcome lies in CACHE/KIND-KEY: rows.parquet, drops.parquet (each dropped row with its reason) and step.json
(counts). The folder has that name when it is complete; until then it is .KIND-KEY.partial, where an interrupted step
goes on.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from or1_megatron.errors import DISK_FULL, UserError
from or1_megatron.parallel.file_sums import publish_text, sync, take_lock
from or1_megatron.prepare.card import other_files, write_card
from or1_megatron.prepare.execute import DROPS, ROWS, Execution, Outcome
from or1_megatron.prepare.graph import order, step_key
from or1_megatron.prepare.progress import Bars, counts_table, line
from or1_megatron.prepare.recipe import Node, Recipe, Write
from or1_megatron.prepare.step import Finished, SourceStep, TableStep
from or1_megatron.prepare.summary import StepCounts
from or1_megatron.prepare.tables import FORMAT, StoredTable
from or1_megatron.prepare.training_file import write_training_file, written_key

_FORMAT_FILE = "format.json"
_LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a step, for the table at the end."""

    name: str
    kind: str
    outcome: Outcome
    seconds: float
    cached: bool
    folder: Path


def prepare(recipe: Recipe) -> list[Report]:
    """Runs what is not in the cache, writes the file, prints counts; ends early, with what has been done, where a step
    was asked for no rows. Raises UserError, RunFailure."""
    settings, write = recipe.settings, recipe.write
    steps = order(recipe.nodes, write.from_)
    files = {node.name: _files(node) for node in steps}
    keys: dict[str, str] = {}
    for node in steps:
        with _placed(node):
            keys[node.name] = step_key(node, settings.seed, keys, files[node.name])
    path, key = Path(write.path), _output_key(keys[write.from_], write.instruction_suffix)
    is_there = _check_outputs(write, key)
    cache = Path(settings.cache)
    with _errors_told(f"the cache {cache}", cache):
        _open_cache(cache)
    folders = {node.name: cache / f"{_kind(node)}-{keys[node.name][:16]}" for node in steps}
    for node in steps:
        if isinstance(node.step, TableStep) and not folders[node.name].is_dir():
            with _placed(node):
                node.step.ready(node.options)
    reports: list[Report] = []
    tables: dict[str, StoredTable] = {}
    with Bars() as bars:
        for name in recipe.nodes.keys() - files.keys():
            bars.message(f"step {name} is not run: {path} does not need it")
        for node in steps:
            try:
                reports.append(_step(node, folders[node.name], recipe, tables, files[node.name], bars))
            except Finished as end:
                bars.message(str(end))
                return reports
            tables[node.name] = StoredTable(folders[node.name] / ROWS)
            bars.message(line(reports[-1]))
    print(counts_table(reports))
    table = tables[write.from_]
    if is_there:
        print(f"{path} holds these {table.num_rows:,} problems already")
    else:
        with _errors_told(f"{path}", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a killed one
                left.unlink(missing_ok=True)
            write_training_file(table, path, write.instruction_suffix, key)
        print(f"{path}: {table.num_rows:,} problems")
    if write.card:
        with _errors_told(f"the card of {path}", path):
            card, *_ = write_card(path.with_suffix(".md"), settings.name, [_counts(r) for r in reports], table, key)
        print(card)
    return reports


def _counts(report: Report) -> StepCounts:
    done = report.outcome
    dropped = StoredTable(report.folder / DROPS)
    return StepCounts(report.name, report.kind, done.rows_in, done.rows_out, done.drops, dropped)


def _check_outputs(write: Write, key: str) -> bool:
    """Whether the file holds these rows already. Raises UserError for what is not ours to replace, before the steps."""
    path, there = Path(write.path), written_key(Path(write.path))
    others = [] if there in (None, key) else [path]
    if write.card:
        others += other_files(path.with_suffix(".md"), key)
    if others and not write.overwrite:
        raise UserError(
            f"{others[0]} exists with other content; name another file with write.path, or replace it with --overwrite"
        )
    if there != key:
        _check_writable(path)
    return there == key


def _check_writable(path: Path) -> None:
    """Before hours are spent on what cannot be written."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK, effective_ids=True):
        raise UserError(f"write.path={path}: {above} is no folder, or you may not write there; name another place")


def _files(node: Node) -> list[Path]:
    """Of a source; raises UserError for one that is not there."""
    if not isinstance(node.step, SourceStep):
        return []
    with _placed(node):
        paths = node.step.files(node.options)
    for path in paths:
        if not path.is_file():
            lack = "is a folder; give a file" if path.is_dir() else "does not exist"
            raise UserError(f"steps.{node.name}: {path} {lack}")
    return paths


@contextmanager
def _placed(node: Node) -> Iterator[None]:
    """Says of which step a UserError is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"steps.{node.name}: {error}") from None


def _kind(node: Node) -> str:
    return node.step.name if node.step else "join"


def _output_key(key: str, suffix: str) -> str:
    return hashlib.sha256(f"{key}\n{suffix}".encode()).hexdigest()


def _open_cache(cache: Path) -> None:
    """Makes the folder, or checks that it is of this program's format."""
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / _FORMAT_FILE
    if not file.exists():
        publish_text(file, json.dumps({"format": FORMAT}) + "\n")
        return
    try:
        found = json.loads(file.read_text())["format"]
    except (ValueError, KeyError, TypeError):
        found = "unknown"
    if found != FORMAT:
        raise UserError(
            f"the cache {cache} holds tables of format {found}, this program's are of format {FORMAT}; name another "
            "with cache=DIR, or remove it"
        )


@contextmanager
def _errors_told(what: str, place: Path) -> Iterator[None]:
    """Errors of the file system as one line with what to do about it."""
    try:
        yield
    except OSError as error:
        where = error.filename or place
        if error.errno in DISK_FULL:
            raise UserError(
                f"{what}: the disk is full at {where}; free some space, or name another disk with cache=DIR or "
                "write.path=FILE, then run the same again: finished steps and batches are kept"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise UserError(f"{what}: {error.strerror}: {where}; put that right, or name another place") from None
        raise


def _step(
    node: Node, folder: Path, recipe: Recipe, tables: dict[str, StoredTable], files: list[Path], bars: Bars
) -> Report:
    partial = folder.with_name(f".{folder.name}.partial")
    kind = _kind(node)
    if folder.is_dir():
        _remove(partial)  # killed after it was published
        kept = _read_outcome(folder)
        return Report(node.name, kind, kept, 0.0, True, folder)
    started = time.monotonic()
    total = sum(tables[name].num_rows for name in node.inputs) or None
    out = partial / "out"
    with (
        _errors_told(f"step {node.name}", partial),
        _locked(partial, node.name),
        bars.step(node.name, total) as advance,
    ):
        out.mkdir(exist_ok=True)
        execution = Execution(node, partial, tables, recipe.settings, files, advance, bars.message)
        try:
            outcome = execution.run(out)
            (out / "step.json").write_text(json.dumps(_description(node, recipe, outcome), indent=2) + "\n")
            for name in (ROWS, DROPS, "step.json"):
                sync(out / name)
            sync(out)
            out.rename(folder)
        except BaseException:
            _remove(out)  # gives its space back; journal and scratch stay
            if not any(path.name != _LOCK for path in partial.iterdir()):
                _remove(partial)  # nothing to go on with
            raise
        sync(folder.parent)
        _remove(partial)
    return Report(node.name, kind, outcome, time.monotonic() - started, False, folder)


@contextmanager
def _locked(partial: Path, name: str) -> Iterator[None]:
    partial.mkdir(exist_ok=True)
    try:
        with (partial / _LOCK).open("a+") as lock:
            if not take_lock(lock):
                raise UserError(f"step {name}: another process is at it in {partial}; wait for that one")
            yield
    finally:
        with suppress(OSError):
            partial.rmdir()  # NFS keeps an open file that was removed with its folder


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _description(node: Node, recipe: Recipe, outcome: Outcome) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "recipe": recipe.settings.name,
        "step": node.name,
        "do": _kind(node),
        "options": dataclasses.asdict(node.options) if node.step else {},
        "rows_in": outcome.rows_in,
        "rows_out": outcome.rows_out,
        "drops": dict(sorted(outcome.drops.items())),
    }


def _read_outcome(folder: Path) -> Outcome:
    try:
        known = json.loads((folder / "step.json").read_text())
        return Outcome(known["rows_in"], known["rows_out"], Counter(known["drops"]))
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder} is damaged: no sound step.json; remove it, then it is made anew") from None
