"""Hugging Face directory <-> Megatron directory, and a run's checkpoint -> Hugging Face directory.

Both kinds keep config.json, tokenizer, chat template and generation_config beside the weights, so a converted
checkpoint can be the model.path of a run. An output directory is filled under a temporary name, synced and renamed:
under its own name it is complete. Tensors stream through: what is in memory is one tensor per thread.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from math import prod
from pathlib import Path
from typing import IO

import torch

from or1_megatron.architecture import Architecture, read_architecture
from or1_megatron.display import heartbeat
from or1_megatron.errors import DISK_FULL, UserError, no_folder
from or1_megatron.parallel.file_sums import sync, take_lock
from or1_megatron.parallel.hf_files import HFWeights, write_hf
from or1_megatron.parallel.layout import hf_shapes
from or1_megatron.parallel.megatron_files import FORMAT_FILES, MegatronWeights
from or1_megatron.parallel.megatron_writer import write_megatron

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUM_THREADS = min(4, os.cpu_count() or 1)
_LOCK = ".lock"
_SLACK_BYTES = 64 << 20  # beside the weights: tokenizer, index, headers
_WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")


def hf_to_megatron(hf: Path, out: Path) -> None:
    """Converts an HF checkpoint directory into a new dist_checkpointing directory, in the checkpoint's dtypes.

    Raises UserError, leaving nothing behind: `hf` is not a complete checkpoint of a known architecture, its tokenizer
    has more tokens than the embedding has rows, `out` exists, the disk is full.
    """
    architecture = read_architecture(hf, "--hf ")
    with HFWeights(hf, architecture) as weights:
        _check_tokenizer(hf, architecture)
        size = _num_bytes(architecture, weights.dtypes)
        with _published(out, size) as directory, _progress(f"{hf} -> {out}", size) as advance:
            _copy_others(hf, directory)
            write_megatron(directory, architecture, weights, num_threads=NUM_THREADS, advance=advance)


def megatron_to_hf(
    megatron: Path,
    hf_config: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    option: str = "--hf-config ",
) -> None:
    """Writes a new HF directory with the weights of a dist_checkpointing directory and the other files of `hf_config`.

    megatron: converted, or the `actor` folder of a run's checkpoint, saved at any degrees. dtype: one of DTYPES; None
    keeps each tensor's. option: as what the user gave `hf_config`. Raises UserError as `hf_to_megatron` does, and for a
    malformed dtype or max_shard_size.
    """
    limit = parse_size(max_shard_size)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not megatron.is_dir():
        raise UserError(f"--megatron {megatron} {no_folder(megatron)}; give a Megatron checkpoint directory")
    if hf_config == megatron and not (megatron / "config.json").is_file():
        raise UserError(f"--megatron {megatron} holds no config.json; give the model's directory with --hf-config DIR")
    architecture = read_architecture(hf_config, option)
    with MegatronWeights(megatron, architecture) as weights:
        _check_tokenizer(hf_config, architecture)
        dtypes = {name: DTYPES[dtype] if dtype else kept for name, kept in weights.dtypes.items()}
        size = _num_bytes(architecture, dtypes)
        with _published(out, size) as directory, _progress(f"{megatron} -> {out}", size) as advance:
            _copy_others(hf_config, directory)
            _set_dtype(directory / "config.json", set(dtypes.values()))
            write_hf(
                directory,
                architecture,
                dtypes,
                weights.tensors,
                max_shard_bytes=limit,
                num_threads=NUM_THREADS,
                advance=advance,
            )


def export(run: Path, step: int | None, out: Path | None, *, dtype: str | None = None) -> Path:
    """Writes an HF directory from a run folder's checkpoint after `step` (None: the newest sound one); returns where.

    out: None is RUN/hf/step-NNNNNN. Raises UserError: no such checkpoint, and as `megatron_to_hf` does.
    """
    from or1_megatron.runfolder import RunFolder
    from or1_megatron.runstate import completed, damage_of

    folder = RunFolder.open(run)
    found = {int(path.name.removeprefix("step-")): path for path in completed(folder.checkpoints)}
    if not found:
        raise UserError(f"{folder.checkpoints} holds no complete checkpoint yet; nothing to export")
    if step is not None and step not in found:
        raise UserError(f"--step {step}: {run} has no checkpoint of it; there is {', '.join(map(str, sorted(found)))}")
    for chosen in sorted(found, reverse=True) if step is None else [step]:
        if not (damage := damage_of(found[chosen])):
            break
        print(f"{found[chosen]} is damaged ({damage})", file=sys.stderr, flush=True)
    else:
        raise UserError(f"{folder.checkpoints} holds no sound checkpoint{'' if step is None else f' of step {step}'}")
    target = out or folder.path / "hf" / found[chosen].name
    model = Path(folder.config.model.path)
    megatron_to_hf(found[chosen] / "actor", model, target, dtype=dtype, option=f"{run}: model.path=")
    return target


def parse_size(text: str) -> int:
    """'5GB', '500MB' or '200KB', decimal as Hugging Face reads it -> bytes. Raises UserError, also without a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip().upper())
    size = int(float(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text!r} is not a size with its unit; write e.g. 5GB or 500MB")
    return size


def _num_bytes(architecture: Architecture, dtypes: dict[str, torch.dtype]) -> int:
    return sum(prod(shape) * dtypes[name].itemsize for name, shape in hf_shapes(architecture).items())


def _check_tokenizer(path: Path, architecture: Architecture) -> None:
    if any(path.glob("tokenizer*")):
        from or1_megatron.data.prompts import load_tokenizer

        load_tokenizer(str(path), architecture)


def _copy_others(source: Path, directory: Path) -> None:
    """config.json, tokenizer, generation_config, chat template, licence: every file that holds no weights."""
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.name in FORMAT_FILES:
            continue
        if not file.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(file, directory / file.name)
            sync(directory / file.name)


def _set_dtype(config: Path, dtypes: set[torch.dtype]) -> None:
    """Makes config.json name the type that was written, where it names one."""
    values = json.loads(config.read_text())
    name = str(next(iter(dtypes))).removeprefix("torch.")
    named = [key for key in ("dtype", "torch_dtype") if key in values]
    if len(dtypes) == 1 and any(values[key] != name for key in named):
        config.write_text(json.dumps(values | dict.fromkeys(named, name), indent=2) + "\n")
        sync(config)


@contextmanager
def _published(out: Path, num_bytes: int) -> Iterator[Path]:
    """A directory to fill; renamed to `out` when the block ends well, removed when it does not."""
    if out.exists():
        raise UserError(f"--out {out} exists; nothing is overwritten, name a new directory")
    partial = out.with_name(f".{out.name}.partial")
    with _made(partial, out), (partial / _LOCK).open("a+") as lock:
        _take_over(partial, lock)
        try:
            free = shutil.disk_usage(partial).free
            if free < num_bytes + _SLACK_BYTES:
                raise UserError(_disk_full(out, f"it takes {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"))
            yield partial
            sync(partial)
            partial.rename(out)
            (out / _LOCK).unlink()
            sync(out)
            sync(out.parent)
        except OSError as error:
            _discard(partial, lock)
            if error.errno in DISK_FULL:
                raise UserError(_disk_full(out, str(error.strerror))) from None
            raise
        except BaseException:
            _discard(partial, lock)
            raise


@contextmanager
def _made(folder: Path, out: Path) -> Iterator[None]:
    """Makes a folder and those above it; of these the new ones go again when the block ends badly."""
    new = [above for above in folder.parents if not above.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made: {error.strerror} ({error.filename})") from None
        yield
    except BaseException:
        for above in new:
            with suppress(OSError):
                above.rmdir()  # not if another has put something there
        raise


def _discard(partial: Path, lock: IO) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    lock.close()
    with suppress(OSError):
        partial.rmdir()  # NFS keeps an open file that was removed with its folder


def _disk_full(out: Path, reason: str) -> str:
    return f"--out {out}: disk full, {reason}; free some space or choose another disk"


def _take_over(partial: Path, lock: IO) -> None:
    """Locks the directory and removes what a killed conversion left in it."""
    if not take_lock(lock):
        raise UserError(f"another process is writing {partial}; wait for it or choose another --out")
    for left in partial.iterdir():
        if left.name != _LOCK:
            left.unlink()


@contextmanager
def _progress(title: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, else a line now and then; in the end one line with bytes and seconds. Yields
    advance(bytes)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    started, lock, done = time.monotonic(), threading.Lock(), 0

    def tell(seconds: float) -> None:
        text = f"{title}: {done / 1e9:.2f} of {num_bytes / 1e9:.2f} GB after {seconds:.0f} s"
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        nullcontext() if console.is_terminal else heartbeat(tell),
    ):
        task = bar.add_task("convert", total=num_bytes)

        def advance(written: int) -> None:
            nonlocal done
            with lock:
                done += written
                bar.advance(task, written)

        yield advance
    seconds = time.monotonic() - started
    print(f"{title}: {num_bytes / 1e9:.2f} GB in {seconds:.1f} s")
