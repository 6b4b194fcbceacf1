"""A recipe of `or1 prepare` -> its steps with typed options. YAML, `inherits` and key=value as in launch/recipes.

    name: math
    data: ../problems                                   # ${data} in any value is this
    steps:
      mine: {do: rows, files: ["${data}/mine.jsonl"]}   # `do` names the kind of step
      more: {do: rows, files: ["${data}/more.parquet"]} # the rest are its options
      all: {join: [mine, more]}
      short: {do: keep_length, most: 2000}              # of the step before, or `from: NAME`
    write: {from: short, path: data/math.parquet}

A recipe that inherits another one may change a step's options, add steps, and take one out:
`short: null`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from or1_megatron.errors import UserError
from or1_megatron.prepare.catalog import CATALOG
from or1_megatron.prepare.step import SourceStep, Step, TableStep, option
from or1_megatron.recipe import check_list, layers, override_tree

T = TypeVar("T")


@dataclass(frozen=True)
class Write:
    """The file that `or1 train` reads."""

    path: str = option("???", "the file, .parquet")
    from_: str = option("", "the step whose rows are written; default: the last one")
    instruction_suffix: str = option("", "appended to math problems; or data.instruction_suffix when training")
    card: bool = option(False, "also write a card of the file beside it, .md with pictures")
    overwrite: bool = option(False, "replace a file that another recipe, or another state of this one, has written")


@dataclass(frozen=True)
class Settings:
    """The keys of a recipe beside `steps` and `write`."""

    name: str = option("prepare", "name of the recipe, for you")
    seed: int = option(0, "of every random choice")
    data: str = option("", "a folder of yours; ${data} in the recipe stands for it")
    cache: str = option(".cache/prepare", "where finished steps are kept, each with the rows that it dropped")
    workers: int = option(0, "processes per machine; 0: one per core. Does not change the outcome")
    ray: str = option("", "host:port of a Ray cluster that judges rows where that is done one by one; local: one here")


@dataclass(frozen=True)
class Node:
    """A step of the recipe. `step` is None for a join: all rows of the inputs, one after the other."""

    name: str
    step: Step | None
    options: Any
    inputs: tuple[str, ...]  # the steps whose rows it gets; none for a source
    reads: tuple[str, ...] = ()  # further steps at whose rows it looks


@dataclass(frozen=True)
class Recipe:
    origin: str
    settings: Settings
    nodes: dict[str, Node]
    write: Write


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads, merges and checks. Raises UserError, one line each; reads none of the sources' files."""
    trees = [*layers(Path(path), ()), *[override_tree(text) for text in overrides or []]]
    tree = _merged(trees)
    origin = str(path)
    steps, write = tree.pop("steps", None), tree.pop("write", None)
    known = [*_names(Settings), "steps", "write"]
    for name in tree:
        if name not in known:
            raise UserError(f"{origin}: unknown key {name}; {_near(name, known)}")
    if not isinstance(steps, dict) or not steps:
        raise UserError(f"{origin}: `steps` must be a mapping of names to steps; see or1 prepare --help")
    if not isinstance(write, dict):
        raise UserError(f"{origin}: `write` is missing; e.g. write: {{path: data/math.parquet}}")
    nodes: dict[str, Node] = {}
    before = ""
    for name, spec in steps.items():
        if spec is None:
            continue
        nodes[name] = _node(f"{origin}: steps.{name}", name, spec, before)
        before = name
    for node in nodes.values():
        for wanted in (*node.inputs, *node.reads):
            _check_step(f"{origin}: steps.{node.name}", wanted, nodes)
    written = typed(Write, write, f"{origin}: write")
    written = replace(written, from_=written.from_ or before)
    _check_step(f"{origin}: write", written.from_, nodes)
    if not written.path.endswith(".parquet"):
        raise UserError(f"{origin}: write.path={written.path} must end with .parquet")
    settings = typed(Settings, tree, origin)
    if settings.workers < 0:
        raise UserError(f"{origin}: workers={settings.workers}; use 1 or more, or 0 for one per core")
    return Recipe(origin, settings, nodes, written)


def _merged(trees: list[tuple[str, dict]]) -> dict[str, Any]:
    """Later trees go over earlier ones; ${...} is put in."""
    try:
        merged = OmegaConf.merge(*[OmegaConf.create(tree) for _, tree in trees])
        whole = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        where = getattr(error, "full_key", None) or "value"
        reason = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ").strip('"')
        advice = f"; export it, or give {where}=VALUE" if reason.startswith("Environment variable") else ""
        raise UserError(f"{trees[-1][0]}: {where}: {reason}{advice}") from None
    assert isinstance(whole, dict)
    return {str(name): value for name, value in whole.items()}


def _node(place: str, name: str, spec: Any, before: str) -> Node:
    if not isinstance(spec, dict) or ("do" in spec) == ("join" in spec):
        raise UserError(f"{place}: {spec!r:.80} is no step; it is {{do: KIND, ...}} or {{join: [STEP, STEP]}}")
    options = {str(option): value for option, value in spec.items()}
    if "join" in options:
        inputs = options.pop("join")
        if not isinstance(inputs, list) or not inputs or options:
            raise UserError(f"{place}: {spec!r:.80}: a join has a list of steps and no options")
        return Node(name, None, None, tuple(map(str, inputs)))
    kind = str(options.pop("do"))
    if kind not in CATALOG:
        raise UserError(f"{place}: there is no step {kind!r}; {_near(kind, CATALOG)}")
    step = CATALOG[kind]
    source = options.pop("from", None)
    values = typed(step.options, options, f"{place} ({kind})")
    if isinstance(step, SourceStep):
        if source is not None:
            raise UserError(f"{place}: {kind} reads files, not the rows of {source!r}; drop `from`")
        return Node(name, step, values, ())
    if not (source or before):
        raise UserError(f"{place}: {kind} is the first step and has no rows; put a source before it, or `from: NAME`")
    reads = tuple(step.reads(values)) if isinstance(step, TableStep) else ()
    return Node(name, step, values, (str(source or before),), reads)


def typed(kind: type[T], tree: dict[str, Any], place: str) -> T:
    """An object of the dataclass `kind`. Raises UserError: unknown option, missing one, wrong type.

    A field `from_` is the option `from`; lists become tuples.
    """
    names = _names(kind)
    lists = {field.name: str(field.type).startswith("tuple[") for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in tree.items():
        if name not in names:
            raise UserError(f"{place}: unknown option {name}; {_near(name, names)}")
        if lists[names[name]]:
            check_list(place, name, value)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), {names[name]: value for name, value in tree.items()})
        missing = sorted(map(str, OmegaConf.missing_keys(merged)))
        if missing:
            raise UserError(f"{place}: {', '.join(missing)} must be set")
        values = OmegaConf.to_container(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{place}: {getattr(error, 'full_key', '') or 'value'}: {str(error).splitlines()[0]}") from None
    assert isinstance(values, dict)
    try:
        return kind(**{str(n): tuple(v) if isinstance(v, list) else v for n, v in values.items()})
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _names(kind: type) -> dict[str, str]:
    """Option -> field."""
    return {field.name.removesuffix("_"): field.name for field in fields(kind)}


def _check_step(place: str, name: str, nodes: dict[str, Node]) -> None:
    if name not in nodes:
        raise UserError(f"{place}: there is no step named {name!r}; {_near(name, nodes)}")


def _near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}There are {', '.join(known)}" if known else "it takes none"
