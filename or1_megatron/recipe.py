"""Recipe file + `key=value` overrides -> validated Config; an unknown key says which key was meant."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from or1_megatron.config import Config, all_keys
from or1_megatron.errors import UserError
from or1_megatron.validate import validate


class _Loader(yaml.SafeLoader):
    """on, off, yes and no are words, as in YAML 1.2; a key that is true or false takes them all the same."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if first in "tTfF" or not tag.endswith(":bool")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        """YAML itself would keep the last of equal keys and drop the others, a whole block at once."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":  # a mapping as key is refused below
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"{key.value} comes twice, in lines {lines[key.value]} and {line}; join them")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def load(recipe: str | Path, overrides: list[str] | None = None) -> Config:
    """Recipe file + `key=value` overrides -> validated Config. Raises UserError, one line each.

    A recipe may name another one, relative to its own place, as `inherits`: what it says itself goes over that.
    """
    return from_tree([*layers(Path(recipe), ()), *[override_tree(text) for text in overrides or []]])


def layers(path: Path, inheriting: tuple[Path, ...]) -> list[tuple[str, dict]]:
    """(origin, tree) of the recipe and of those it inherits from, the farthest first."""
    if path.resolve() in inheriting:
        raise UserError(f"recipe {path} inherits from itself: {' -> '.join(map(str, (*inheriting, path.resolve())))}")
    if path.is_dir():
        run = f"; of a run: or1 train --resume {path}" if (path / "config.yaml").is_file() else ""
        raise UserError(f"recipe {path} is a folder; give a YAML file{run}")
    if not path.is_file():
        raise UserError(f"recipe {path} does not exist; there are some in launch/recipes/ and launch/recipes/data/")
    try:
        tree = yaml.load(path.read_text(), _Loader) or {}
    except (yaml.YAMLError, ValueError) as error:  # no UTF-8, a date that there is not
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} holds a {type(tree).__name__}; it must be a mapping of configuration keys")
    parent = tree.pop("inherits", None)
    if parent is not None and not isinstance(parent, str):
        raise UserError(f"recipe {path}: inherits={parent!r} must be the name of one recipe file")
    above = layers(path.parent / parent, (*inheriting, path.resolve())) if parent else []
    return [*above, (str(path), tree)]


def from_tree(layers: list[tuple[str, dict]]) -> Config:
    """Merges (origin, nested mapping) layers over the defaults and validates the result."""
    merged = OmegaConf.structured(Config)
    for origin, tree in layers:
        _check_names(origin, tree)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(tree))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{origin}: {getattr(error, 'full_key', '') or 'value'}: {reason}") from None
    try:  # ${...} is put in here
        missing = sorted(OmegaConf.missing_keys(merged))
        config = None if missing else OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{layers[-1][0]}: {getattr(error, 'full_key', '') or 'value'}: {reason}") from None
    if missing:
        raise UserError(f"{layers[0][0]}: {', '.join(missing)} must be set")
    assert isinstance(config, Config)
    validate(config)
    return config


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def override_tree(text: str) -> tuple[str, dict]:
    """`key=value` as (origin, nested mapping). Raises UserError."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"override {text!r} is not key=value, e.g. optimizer.lr=1e-6")
    leaf = _value(value)
    for part in reversed(name.split(".")):
        leaf = {part: leaf}
    return f"override {text!r}", leaf


def _value(text: str) -> Any:
    """A number, true, false, null, a [list], a {mapping} or "quoted text" as YAML reads them; else the text as it is,
    whose blanks, lines, colons and # YAML would take for its own."""
    kinds = {"[": list, "{": dict, '"': str, "'": str}
    kind = kinds.get(text.lstrip()[:1])
    if kind is None and (text != text.strip() or "#" in text):
        return text
    try:
        found = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        return text
    null = found is None and text in ("null", "Null", "NULL", "~")
    return found if null or isinstance(found, kind or bool | int | float) else text


def _leaves(tree: dict, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        found += _leaves(value, dotted + ".") if isinstance(value, dict) and value else [(dotted, value)]
    return found


def check_list(origin: str, name: str, value: Any) -> None:
    """Raises UserError for what is no list; ${...} may become one, and ??? leaves what was before."""
    if isinstance(value, list) or (isinstance(value, str) and ("${" in value or value == "???")):
        return
    said = "" if value in (None, {}) else value
    raise UserError(f"{origin}: {name}={said} must be a list; write {name}=[{said}]")


def _check_names(origin: str, tree: dict) -> None:
    types = {item.name: item.type for item in all_keys()}
    known = list(types)
    for name, value in _leaves(tree):
        if name in types:
            if types[name].startswith("list["):
                check_list(origin, name, value)
            continue
        section = [item for item in known if item.startswith(name + ".")]
        if section:
            raise UserError(f"{origin}: {name} is a section; set one of its keys, e.g. {section[0]}")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        last = name.rsplit(".", 1)[-1]
        near = near or [item for item in known if item.rsplit(".", 1)[-1] == last][:1]
        hint = f"did you mean {near[0]}?" if near else "`or1 train --help` lists all keys"
        raise UserError(f"{origin}: unknown key {name}; {hint}")
