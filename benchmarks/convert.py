"""Conversion between Hugging Face and Megatron directories against `cp` and fsync of the same bytes, and one layer
against mbridge's weight functions.

Directories: a random model of Qwen2.5-1.5B's shape (a tenth with --quick), read from the page cache, written, synced;
making and removing directories is not timed. Layer: Qwen2.5-7B's shape in memory, into the parameters of the four
ranks of tp = 4 and back; mbridge's functions are called as its load_weights and export_weights call them.
Peak memory is the resident set of a process of its own, mapped file pages included.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import Benchmark, main
from models.qwen2 import QWEN_1_5B, qwen2_config, qwen_7b

from or1_megatron.architecture import Architecture, parse_architecture
from or1_megatron.convert import hf_to_megatron, megatron_to_hf
from or1_megatron.parallel import device
from or1_megatron.parallel.hf_files import write_hf
from or1_megatron.parallel.layout import Entry, entries, hf_shapes, shard, shard_into, unshard

TP = 4
SIZES = {"0.1B": qwen2_config(896, 4864, 6, 14, 2, 65_536, tied=True), "1.5B": QWEN_1_5B}
PEAK = """
import re, sys, pathlib
from or1_megatron.convert import hf_to_megatron, megatron_to_hf
root = pathlib.Path(sys.argv[1])
for convert in (
    lambda: hf_to_megatron(root / "hf", root / "megatron"),
    lambda: megatron_to_hf(root / "megatron", root / "hf", root / "back"),
):
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    convert()
    print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def random_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.view(torch.int16), y.view(torch.int16))


def write_model(directory: Path, size: str) -> int:
    """A random HF directory; the bytes of its weights."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SIZES[size]))
    architecture = parse_architecture(SIZES[size], size)
    shapes = hf_shapes(architecture)

    def tensors(entry: Entry) -> list[tuple[str, torch.Tensor]]:
        return [(name, random_tensor(shapes[name])) for name in entry.hf]

    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    settings: dict[str, Any] = {"max_shard_bytes": 2 * 10**9, "num_threads": 1, "advance": lambda written: None}
    write_hf(directory, architecture, dtypes, tensors, **settings)
    return sum(2 * prod(shape) for shape in shapes.values())


def into(out: Path, work: Callable[[Path], None]) -> float:
    """Seconds of work(out); `out` does not exist before or after."""
    try:
        started = time.perf_counter()
        work(out)
        return time.perf_counter() - started
    finally:
        shutil.rmtree(out)


def copy_and_sync(source: Path, out: Path) -> None:
    subprocess.run(["cp", "--reflink=never", "-r", str(source), str(out)], check=True)
    for path in [*out.iterdir(), out]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def peak_bytes(root: Path) -> list[int]:
    """Of root/hf -> root/megatron -> root/back."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(root)], capture_output=True, text=True, check=True)
    return [int(number) * 1024 for number in re.findall(r"peak (\d+)", done.stdout)]


class MBridge:
    """mbridge's Qwen2 weight functions at tp = 4, without a model or process groups."""

    def __init__(self, architecture: Architecture, table: list[Entry]):
        device.install()
        from mbridge.models.qwen2 import Qwen2Bridge  # type: ignore[import-not-found]

        self._bridge = bridge = object.__new__(Qwen2Bridge)
        bridge.hf_config = SimpleNamespace(
            num_key_value_heads=architecture.num_kv_heads,
            num_attention_heads=architecture.num_heads,
            hidden_size=architecture.hidden_size,
            head_dim=architecture.head_dim,
        )
        bridge.dtype, bridge.make_vocab_size_divisible_by = torch.bfloat16, None
        bridge.mpu, bridge.config = SimpleNamespace(tp_size=TP, etp_size=1), SimpleNamespace(gated_linear_unit=True)
        self._table = table

    def split(self, tensors: dict[str, torch.Tensor], shards: dict[str, list[torch.Tensor]]) -> None:
        for entry in self._table:
            parameters = shards[entry.megatron]
            whole = self._bridge._weight_to_mcore_format(entry.megatron, [tensors[name] for name in entry.hf])
            pieces = self._bridge._weight_split_across_tp(entry.megatron, whole, parameters[0], TP)
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.copy_(piece.contiguous())

    def merge(self, shards: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for entry in self._table:
            whole = shards[entry.megatron][0]
            if entry.arrangement != "replicated":
                whole.tensor_model_parallel = True  # type: ignore[attr-defined]
                whole.partition_dim = int(entry.arrangement == "row")  # type: ignore[attr-defined]
                whole = self._bridge._weight_merge_across_tp(entry.megatron, shards[entry.megatron], whole)
            made |= dict(zip(*self._bridge._weight_to_hf_format(entry.megatron, whole), strict=True))
        return made


def split(architecture: Architecture, table: list[Entry], tensors: dict, shards: dict) -> None:
    for entry in table:
        for rank, parameter in enumerate(shards[entry.megatron]):
            shard_into(parameter, entry, tensors.__getitem__, architecture, tp=TP, rank=rank)


def merge(architecture: Architecture, table: list[Entry], shards: dict) -> dict[str, torch.Tensor]:
    return {name: t for entry in table for name, t in unshard(entry, shards[entry.megatron], architecture)}


def build_layer(bench: Benchmark) -> None:
    architecture = parse_architecture(qwen_7b(), "7B")
    table = [entry for entry in entries(architecture, fused_norms=True).values() if entry.layer == 0]
    shapes = hf_shapes(architecture)
    tensors = {name: random_tensor(shapes[name]) for entry in table for name in entry.hf}
    cut = partial(shard, read=tensors.__getitem__, architecture=architecture, tp=TP)
    shards = {entry.megatron: [cut(entry, rank=rank) for rank in range(TP)] for entry in table}
    filled = {name: [torch.zeros_like(piece) for piece in pieces] for name, pieces in shards.items()}

    def case(label: str, run: Callable[[], object], kind: Any = "ours") -> Any:
        def timed() -> None:
            run()

        return bench.case(label, timed, kind, 1, "layers")

    there = case("layer to tp 4 shards", partial(split, architecture, table, tensors, filled))
    back = case("layer from tp 4 shards", partial(merge, architecture, table, shards))
    if importlib.util.find_spec("mbridge") is None:
        bench.note("peer mbridge is not installed: pip install -e '.[bench]'")
    else:
        peer = MBridge(architecture, table)
        returned = peer.merge(shards)
        peer.split(tensors, filled)
        assert all(same(x, y) for name in shards for x, y in zip(shards[name], filled[name], strict=True))
        assert returned.keys() == tensors.keys() and all(same(returned[n], tensors[n]) for n in tensors)
        peer_there = case("mbridge to tp 4 shards", partial(peer.split, tensors, filled), "peer")
        peer_back = case("mbridge from tp 4 shards", partial(peer.merge, shards), "peer")
        bench.mark("layer_to_shards_over_mbridge", lambda: peer_there.best / there.best, 1.0)
        bench.mark("layer_from_shards_over_mbridge", lambda: peer_back.best / back.best, 1.0)
    case("one copy of the layer", lambda: [tensor.clone() for tensor in tensors.values()], "floor")


def build_directories(bench: Benchmark, quick: bool) -> None:
    root = Path(bench.stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".convert-")))
    size = "0.1B" if quick else "1.5B"
    amount = write_model(root / "hf", size) / 1e9
    architecture = parse_architecture(SIZES[size], size)
    largest = max(2 * prod(shape) for shape in hf_shapes(architecture).values())
    peaks = peak_bytes(root)
    shutil.rmtree(root / "back")
    told = " and ".join(f"{peak / 1e9:.2f}" for peak in peaks)
    bench.note(f"peak resident set to Megatron and back: {told} GB; largest tensor {largest / 1e9:.2f} GB")
    bench.mark("peak_memory_over_promise", lambda: max(peaks) / (2 * largest + 1e9), 1.0, better="lower")

    out = root / "out"
    there = bench.case(
        f"{size} HF -> Megatron", lambda: into(out, partial(hf_to_megatron, root / "hf")), "ours", amount, "GB"
    )
    back = bench.case(
        f"{size} Megatron -> HF",
        lambda: into(out, lambda path: megatron_to_hf(root / "megatron", root / "hf", path)),
        "ours",
        amount,
        "GB",
    )
    copy = bench.case(
        f"{size} cp + fsync", lambda: into(out, partial(copy_and_sync, root / "hf")), "floor", amount, "GB"
    )
    bench.mark("to_megatron_over_cp", lambda: there.best / copy.best, 1.5, better="lower")
    bench.mark("to_hf_over_cp", lambda: back.best / copy.best, 1.5, better="lower")


def build(bench: Benchmark, quick: bool) -> None:
    bench.part(partial(build_directories, bench, quick))
    bench.part(partial(build_layer, bench))  # apart: what follows upon writing gigabytes is slower for a while


if __name__ == "__main__":
    main("convert", "weights between Hugging Face and Megatron directories", build)
