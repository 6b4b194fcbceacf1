"""Source steps, one for each published set: files of others -> rows of SCHEMA, with licence and origin.

A file is named by its path, by a pattern, by its folder, or by a data set on the Hugging Face hub. A relative path that
is not here is looked for below the folder that the environment's OR1_PROBLEMS names, as for benchmarks.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from or1_megatron.data.rows import BadRow, hub_files, is_hub_name, is_row_file, origin_of, read_rows
from or1_megatron.errors import UserError
from or1_megatron.prepare.sources.code_sets import CODE_SCHEMAS
from or1_megatron.prepare.sources.math_sets import MATH_SCHEMAS
from or1_megatron.prepare.sources.schemas import Problem, Schema
from or1_megatron.prepare.step import Drop, Row, SourceStep, Unusable, option

SCHEMAS = {schema.name: schema for schema in (*MATH_SCHEMAS, *CODE_SCHEMAS)}

# An APPS problem is a folder of these.
_APPS_QUESTION = "question.txt"
_APPS_FILES = (_APPS_QUESTION, "solutions.json", "input_output.json", "starter_code.py", "metadata.json")


@dataclass(frozen=True)
class SourceOptions:
    files: tuple[str, ...] = option(
        (),
        "paths, patterns with *, folders, or OWNER/NAME[@REVISION][:PATTERN] on the hub; without any, the "
        "set as it is published on the hub",
    )
    subsets: tuple[str, ...] = option((), "only these parts of the source, by its own names; without any, all")
    name: str = option("", "what the rows' source is called; default: the kind of step")
    licence: str = option("", "of these files, where it is not the published set's")


def source_files(schema: Schema, options: SourceOptions) -> list[Path]:
    """Every file that is read, fetched when need be. Raises UserError: none, missing, twice."""
    names = options.files or ((schema.hub,) if schema.hub else ())
    if not names:
        raise UserError(f"source {schema.name}: give files=[...]; it comes from {schema.home}")
    paths: list[Path] = []
    for name in names:
        found = _found(schema, name)
        twice = {path.resolve() for path in paths} & {path.resolve() for path in found}
        if twice:
            raise UserError(f"source {schema.name}: files names {min(twice)} twice; name it once")
        paths += found
    return paths


def _found(schema: Schema, name: str) -> list[Path]:
    path = Path(name).expanduser()
    below = os.environ.get("OR1_PROBLEMS", "")
    if below and not path.is_absolute() and not path.exists() and not glob.glob(str(path)):
        path = Path(below) / path
    if path.is_dir():
        return _in_folder(schema, path)
    if path.exists():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if matches:
        return [file for match in matches for file in (_in_folder(schema, match) if match.is_dir() else [match])]
    if is_hub_name(name):
        return hub_files(name, ["*train*.parquet", "*train*.jsonl", "*train*.json"])
    places = f"neither here nor in OR1_PROBLEMS={below}" if below else "not here, and OR1_PROBLEMS is not set"
    raise UserError(f"source {schema.name}: {name} is {places}; give a file, a folder or a hub id OWNER/NAME[:PATTERN]")


def _in_folder(schema: Schema, folder: Path) -> list[Path]:
    """The files that hold rows; of APPS all that belong to a problem."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    problems = {path.parent for path in found if path.name == _APPS_QUESTION} if schema.name == "apps" else set()
    if problems:
        return [path for path in found if path.parent in problems and path.name in _APPS_FILES]
    rows = [path for path in found if is_row_file(path.name)]
    if not rows:
        raise UserError(f"source {schema.name}: {folder} holds no .json, .jsonl or .parquet file")
    return rows


def read_source(schema: Schema, options: SourceOptions, paths: list[Path]) -> Iterator[Row | tuple[str, Drop]]:
    """Every row of every file, in order, numbered through. Raises UserError: a file that is not of this schema, or
    that cannot be read, or that holds no row."""
    name = options.name or schema.name
    wanted, met, seen = frozenset(options.subsets), set(), {}
    for number, (place, found) in enumerate(_rows(schema, paths), 1):
        try:
            if isinstance(found, BadRow):
                raise Unusable(re.sub(r"\W+", "_", found.reason.lower()), found.detail)
            subset = schema.subset_of(found)
            met.add(subset)
            if wanted and subset not in wanted:
                raise Unusable("other_subset", subset)
            problem = schema.read(found)
            if problem is None:
                raise Unusable("fields_missing", f"found {', '.join(found)}")
            if problem.identity and seen.setdefault(problem.identity, place) != place:
                raise Unusable("duplicate_id", f"{problem.identity} is also at {seen[problem.identity]}")
            source = f"{name}-{subset}" if schema.named_by_subset and subset else name
            row = _row(problem, f"{name}/{number}", source, options.licence or schema.licence, place)
        except Unusable as unusable:
            yield f"{name}/{number}", Drop(unusable.drop.reason, _printable(f"{place}: {unusable.drop.detail}"))
            continue
        yield row
    absent = wanted - met
    if absent:
        raise UserError(
            f"source {schema.name}: no row is of subset {', '.join(sorted(absent))}; there are "
            f"{', '.join(sorted(met - {''})[:30]) or 'none'}"
        )


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _row(problem: Problem, uid: str, source: str, licence: str, place: str) -> Row:
    row = {
        "uid": uid,
        "source": problem.source or source,
        "ability": problem.ability,
        "problem": problem.text,
        "answer": problem.answer,
        "solution": problem.solution,
        "licence": licence,
        "origin": place,
        "info": json.dumps(problem.info, ensure_ascii=False, default=str),
    }
    for column, text in row.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, written as an escape
            raise Unusable("not_utf_8", f"{column} holds U+{ord(text[error.start]):04X}") from None
    return row


def _rows(schema: Schema, paths: list[Path]) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(place, row) of all files. The first row that can be read tells whether a file is of the schema."""
    for path in paths:
        if path.name in _APPS_FILES:
            if path.name == _APPS_QUESTION:
                yield _origin(path.parent), _apps_folder(path.parent)
            continue
        fits, first_bad = False, ""
        for where, row in read_rows(path):
            if isinstance(row, BadRow):
                first_bad = first_bad or f"{where} is {row.reason}: {row.detail}"
            elif not fits:
                _check_fields(schema, path, row)
                fits = True
            yield f"{_origin(path)} {where}", row
        if not fits:
            why = f"holds no row that can be read: {first_bad}" if first_bad else "is empty"
            raise UserError(f"source {schema.name}: {path} {why}; get the file anew")


def _check_fields(schema: Schema, path: Path, row: dict[str, Any]) -> None:
    if any(form.fits(row) for form in schema.forms):
        return
    others = [other.name for other in SCHEMAS.values() if any(form.fits(row) for form in other.forms)]
    advice = f"use source {' or '.join(others)}" if others else "give a file of that set"
    raise UserError(
        f"source {schema.name}: the fields of {path} do not fit: found {', '.join(row) or 'none'}; expected "
        f"{schema.expected}; {advice}"
    )


def _origin(path: Path) -> str:
    below = os.environ.get("OR1_PROBLEMS", "")
    return str(path.relative_to(below)) if below and path.is_relative_to(below) else origin_of(path)


def _apps_folder(folder: Path) -> dict[str, Any] | BadRow:
    row: dict[str, Any] = {"problem_id": f"{folder.parent.name}/{folder.name}", "input_output": "", "solutions": ""}
    names = {"question": _APPS_QUESTION, "solutions": "solutions.json", "input_output": "input_output.json"}
    try:
        for field_name, name in {**names, "starter_code": "starter_code.py"}.items():
            if (folder / name).is_file():
                row[field_name] = (folder / name).read_bytes().decode()
        metadata = folder / "metadata.json"
        return {**(json.loads(metadata.read_bytes()) if metadata.is_file() else {}), **row}
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte 0x{error.object[error.start]:02x}")
    except (ValueError, TypeError) as error:
        return BadRow("not JSON", f"metadata.json: {error}")


STEPS = tuple(
    SourceStep(schema.name, SourceOptions, partial(source_files, schema), partial(read_source, schema), schema.version)
    for schema in SCHEMAS.values()
)
