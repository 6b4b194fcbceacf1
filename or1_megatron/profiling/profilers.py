"""torch's profiler, or the window that Nsight Systems records, around chosen steps of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from or1_megatron.parallel.device import has_cuda


class Profiler:
    """tool `torch` writes a Chrome trace to `file`; `nsys` opens and closes the range that
    `nsys profile --capture-range=cudaProfilerApi --capture-range-end=repeat` records."""

    def __init__(self, tool: str, file: Path):
        self._tool, self._file = tool, file
        self._profile: Any = None

    def start(self) -> None:
        if self._tool == "nsys":
            torch.cuda.profiler.start()
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if has_cuda() else []
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def stop(self) -> None:
        if self._tool == "nsys":
            torch.cuda.profiler.stop()
            return
        self._profile.stop()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        self._profile.export_chrome_trace(str(partial))
        partial.rename(self._file)
