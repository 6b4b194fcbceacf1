"""The safetensors files of an HF checkpoint directory, checked against the architecture and memory-mapped."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from or1_megatron.architecture import Architecture
from or1_megatron.errors import UserError
from or1_megatron.parallel.layout import hf_shapes

_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that some exporters store


class HFWeights:
    """Context manager; `read(name)` returns a whole tensor, a view of the mapped file.

    Opening checks that every tensor the architecture needs is there with its shape and that nothing unknown is;
    raises UserError naming all that is missing, extra or mis-shaped at once, or the corrupt file.
    """

    def __init__(self, path: Path, architecture: Architecture):
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}
        for file in _files(path):
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} is not a readable safetensors file ({error}); copy or download it again"
                ) from None
            self._handles |= dict.fromkeys(handle.keys(), handle)
        self._tied = architecture.tied
        self._check(path, hf_shapes(architecture))

    def _check(self, path: Path, expected: dict[str, tuple[int, ...]]) -> None:
        found = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()}
        missing = sorted(expected.keys() - found.keys())
        extra = sorted(
            name
            for name in found.keys() - expected.keys()
            if not name.endswith(_IGNORED) and not (self._tied and name == "lm_head.weight")
        )
        wrong = [f"{n} {found[n]} instead of {s}" for n, s in expected.items() if n in found and found[n] != s]
        problems = [
            f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("not known", extra), ("wrong shape", wrong))
            if names
        ]
        if problems:
            raise UserError(f"{path}: the tensors do not match config.json; {'; '.join(problems)}")

    def read(self, name: str) -> torch.Tensor:
        return self._handles[name].get_tensor(name)

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{path}: {', '.join(absent)} named in {index.name} is missing; copy or download it again")
        return files
    single = path / "model.safetensors"
    if not single.is_file():
        raise UserError(f"{path} holds neither model.safetensors nor {index.name}; convert the weights to safetensors")
    return [single]
