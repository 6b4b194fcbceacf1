"""Who may import what, and how large things may grow. The checker is a pure function of one file's path and text.

Each rule has a case below that breaks it, so that no rule can pass by looking at nothing.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = ("or1_megatron", "launch", "slurm", "tools", "benchmarks")

# From the innermost ring to the outermost; a module may import its own ring and those inside it.
RINGS = (
    ("config", "sections", "validate", "recipe", "types", "errors", "architecture"),
    ("parallel", "rl", "profiling"),
    ("actor", "rollout", "reward", "data"),
    ("cluster", "processes", "handover"),
    (
        *("train", "run", "inputs", "evaluate", "collect", "update", "runstate", "display", "runfolder", "runfiles"),
        *("driver_lock", "metrics", "boards", "surplus"),
        *("timeline", "doctor", "dryrun", "status", "plan", "accuracy", "responses", "report"),
    ),
    ("convert", "compare", "verify", "peers", "scoring", "prepare"),
    ("cli", "arguments", "commands", "__main__"),
)
STRANGERS = frozenset(RINGS[2])  # meet only in outer rings: an actor that knows its engine cannot be placed elsewhere

# Heavy library -> the one place that may import it. Benchmarks may, to measure the peers.
HEAVY = {
    "megatron": "or1_megatron/actor/",
    "transformer_engine": "or1_megatron/actor/",
    "vllm": "or1_megatron/rollout/",
    "ray": "or1_megatron/cluster/",
}
RAY_START = "slurm/ray_node.py"  # the command `ray start` itself, with more patience
DEVICE_SEAM = "or1_megatron/parallel/device.py"
NO_MEANING = frozenset({"utils", "util", "common", "misc", "helpers"})
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60


def check_source(path: str, source: str) -> list[str]:
    """The broken rules of one file; `path` is relative to the repository, with slashes."""
    tree = ast.parse(source)
    imports = [(line, name) for node in ast.walk(tree) for line, name in _imported_names(path, node)]
    found = _check_names_and_sizes(path, source, tree)
    found += _check_heavy(path, imports)
    found += _check_device_seam(path, tree)
    if path.startswith("or1_megatron/"):
        found += _check_rings(path, imports)
    return found


def _imported_names(path: str, node: ast.AST) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of all that one node imports; `from a import b` gives a.b, a module or not."""
    if isinstance(node, ast.Import):
        return [(node.lineno, alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = path.removesuffix(".py").split("/")[: -node.level] if node.level else []
        base = ".".join([*package, *([node.module] if node.module else [])])
        return [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__"):
            return [(node.lineno, str(node.args[0].value))]
    return []


def _room(dotted: str) -> str | None:
    """or1_megatron.parallel.device -> parallel; None for other packages and for the bare package."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "or1_megatron" and len(parts) > 1 else None


def _check_rings(path: str, imports: list[tuple[int, str]]) -> list[str]:
    ring_of = {room: index for index, rooms in enumerate(RINGS) for room in rooms}
    own = path.removesuffix(".py").split("/")[1]
    if own == "__init__":
        return [f"{path}:{line}: the package's __init__ imports {name}" for line, name in imports if _room(name)]
    if own not in ring_of:
        return [f"{path}: {own} is in no ring; place it in RINGS"]
    found = []
    for line, name in imports:
        room = _room(name)
        if room is None or room == own:
            continue
        if room not in ring_of:
            found.append(f"{path}:{line}: {name} is in no ring")
        elif own in STRANGERS and room in STRANGERS:
            found.append(f"{path}:{line}: {own} imports {room}; they meet only in outer rings")
        elif ring_of[room] > ring_of[own]:
            found.append(f"{path}:{line}: {own} imports {room}, which lies further out")
    return found


def _check_heavy(path: str, imports: list[tuple[int, str]]) -> list[str]:
    found = []
    for line, name in imports:
        place = HEAVY.get(name.split(".")[0])
        if place and not path.startswith((place, "benchmarks/")) and (path, name.split(".")[0]) != (RAY_START, "ray"):
            found.append(f"{path}:{line}: imports {name}; only {place} may")
    return found


def _check_device_seam(path: str, tree: ast.Module) -> list[str]:
    if path == DEVICE_SEAM:
        return []
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "is_available" and ast.unparse(node.value).endswith("cuda"):
            lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "torch.cuda":
            lines += [node.lineno for alias in node.names if alias.name == "is_available"]
    return [f"{path}:{line}: asks torch for CUDA; only {DEVICE_SEAM} may, use its has_cuda()" for line in lines]


def _check_names_and_sizes(path: str, source: str, tree: ast.Module) -> list[str]:
    found = []
    meaningless = NO_MEANING.intersection(path.removesuffix(".py").split("/"))
    if meaningless:
        found.append(f"{path}: the name {min(meaningless)} says nothing about what is inside")
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines; at most {MAX_FILE_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines; at most {MAX_FUNCTION_LINES}")
    return found


def _files() -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for name in SOURCE_ROOTS for file in (ROOT / name).rglob("*.py"))


def test_every_source_file_keeps_the_rules():
    files = _files()
    assert f"{SOURCE_ROOTS[0]}/config.py" in files, "the checker looks at the wrong folder"
    found = [broken for file in files for broken in check_source(file, (ROOT / file).read_text())]
    assert not found, "\n" + "\n".join(found)


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
BROKEN = {
    "outward": ("or1_megatron/rl/loss.py", "from or1_megatron.actor import mesh", "further out"),
    "outward, plain import": ("or1_megatron/config.py", "import or1_megatron.rl.loss", "further out"),
    "outward, from the package": ("or1_megatron/cluster/joining.py", "from or1_megatron import train", "further out"),
    "outward, relative": ("or1_megatron/rl/loss.py", "from ..cluster import start", "further out"),
    "outward, in a function": ("or1_megatron/train.py", "def f():\n    import or1_megatron.cli", "further out"),
    "actor knows rollout": ("or1_megatron/actor/actor.py", "from or1_megatron.rollout import sync", "meet only"),
    "rollout knows actor": ("or1_megatron/rollout/sync.py", "from ..actor.mesh import Mesh", "meet only"),
    "data knows reward": ("or1_megatron/data/prompts.py", "from or1_megatron.reward import service", "meet only"),
    "no ring": ("or1_megatron/stray.py", "", "in no ring"),
    "imports what has no ring": ("or1_megatron/train.py", "import or1_megatron.stray", "in no ring"),
    "package imports": ("or1_megatron/__init__.py", "from or1_megatron.config import load", "__init__ imports"),
    "megatron": ("or1_megatron/train.py", "from megatron.core import parallel_state", "actor/ may"),
    "transformer_engine": ("or1_megatron/parallel/vocab.py", "import transformer_engine", "actor/ may"),
    "vllm": ("or1_megatron/actor/actor.py", "def f():\n    from vllm import LLM", "rollout/ may"),
    "ray": ("or1_megatron/rollout/engine.py", "import ray", "cluster/ may"),
    "ray in Slurm's node program": ("slurm/node.py", "import ray", "cluster/ may"),
    "another library in Ray's start": ("slurm/ray_node.py", "import vllm", "rollout/ may"),
    "ray, by name": ("launch/start.py", "import importlib\nimportlib.import_module('ray')", "cluster/ may"),
    "cuda": ("tools/convert/verify.py", "import torch\ntorch.cuda.is_available()", "has_cuda"),
    "cuda, not called": ("or1_megatron/train.py", "from torch import cuda\nask = cuda.is_available", "has_cuda"),
    "cuda, imported": ("or1_megatron/train.py", "from torch.cuda import is_available", "has_cuda"),
    "name": ("or1_megatron/rl/utils.py", "", "says nothing"),
    "name of a folder": ("tools/common/x.py", "", "says nothing"),
    "long file": ("slurm/submit.py", "x = 1\n" * (MAX_FILE_LINES + 1), "351 lines"),
    "long function": ("benchmarks/sync.py", LONG_FUNCTION, "61 lines"),
}


@pytest.mark.parametrize(("path", "source", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_rule_catches(path: str, source: str, words: str):
    found = check_source(path, source)
    assert len(found) == 1 and words in found[0], found


FINE = {
    "inward": ("or1_megatron/actor/actor.py", "from or1_megatron.parallel import device\nimport megatron.core"),
    "same room": (
        "or1_megatron/rollout/engine.py",
        "from . import worker\nfrom or1_megatron.rollout.sync import push\nimport vllm",
    ),
    "Ray's start": ("slurm/ray_node.py", "from ray._private import services"),
    "ray at home": ("or1_megatron/cluster/cluster.py", "import ray\nfrom or1_megatron.actor.actor import Actor"),
    "a name that only begins alike": ("or1_megatron/train.py", "import raylib"),
    "the seam": (DEVICE_SEAM, "import torch\ntorch.cuda.is_available()"),
    "a peer in a benchmark": ("benchmarks/vocab.py", "import megatron.core"),
    "just short enough": ("slurm/submit.py", "x = 1\n" * (MAX_FILE_LINES - 60) + "def f():\n" + "    x = 1\n" * 59),
}


@pytest.mark.parametrize(("path", "source"), FINE.values(), ids=FINE.keys())
def test_rule_lets_through(path: str, source: str):
    assert check_source(path, source) == []
