"""The device seam: CUDA/NCCL where there is a GPU, CPU/gloo where there is none. The one place that knows.

Megatron-Core is written for CUDA. Without a GPU, `install()` replaces the handful of CUDA entry points that its
dense GPT path touches; with a GPU it does nothing at all. It has to run before megatron is imported, because
megatron binds some of these names at import. Each entry, with what Megatron does there and why the replacement
is right:

| replaced | what Megatron does with it | why the replacement is right |
|---|---|---|
| device="cuda", device=torch.device("cuda") in any torch call | allocates its buffers there | the host is the device |
| pin_memory=True | pins tensors for asynchronous copies | nothing is copied to a device |
| Tensor.type() -> torch.cuda.*Tensor | the distributed optimizer sorts by this string | the compute device |
| torch.cuda.current_device / device_count / set_device | passes it as device=, divides by it | one device, the host |
| torch.cuda.synchronize, Stream, Event, current_stream ... | orders kernels and communication | the host is ordered |
| torch.cuda.get/set_rng_state, manual_seed, default_generators | forks generators | the host has one generator |
| torch.cuda._lazy_call | queues `_set_cuda_rng_state` until CUDA starts: **silently never** | call at once |
| Tensor.cuda, Module.cuda | moves to the device | already there |
| torch.cuda.memory_*, empty_cache | logging | nothing to report |
| reduce_scatter_tensor | adds up gradients, keeps its part in place | gloo would add up a copy of all |
| all_gather_into_tensor | spreads its part of the weights, in place | in a group of one there is nothing to do |
| fused_weight_gradient_mlp_cuda (apex) | adds a weight's gradient to fp32 main_grad | the same sum, in one product |
| torch.cuda.*Tensor type names | isinstance tests in transformer/module.py | resolve to the host types |

`own_optimizer_steps` mends the second silent trap: after `DistributedOptimizer.load_state_dict` all parameters of
torch's AdamW share ONE `step` tensor, which then advances once per parameter and ruins the bias correction.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from or1_megatron.errors import UserError
from or1_megatron.parallel.host_memory import keep_freed_memory, trim_host_memory
from or1_megatron.parallel.weight_gradients import add_product

_HOST = torch.device("cpu")
_SUM = torch.distributed.ReduceOp.SUM
_installed = False


def has_cuda() -> bool:
    """Whether this machine computes on CUDA devices."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _HOST


def num_devices() -> int:
    """CUDA devices visible to this process; 0 without CUDA."""
    return torch.cuda.device_count() if has_cuda() else 0


def use_transformer_engine(wanted: str, dtype: str) -> bool:
    """Resolves model.transformer_impl (auto, transformer_engine, torch): TE cannot even be imported without a GPU, and
    computes float32 in TF32, packed sequences hardly at all.

    Raises UserError when it is asked for and cannot run here.
    """
    possible = has_cuda() and dtype == "bf16" and importlib.util.find_spec("transformer_engine") is not None
    if wanted == "transformer_engine" and not possible:
        raise UserError(
            "model.transformer_impl=transformer_engine needs a CUDA device, the package transformer-engine and "
            "model.dtype=bf16; use auto or torch"
        )
    return possible and wanted != "torch"


def has_fused_weight_gradients() -> bool:
    """Whether Megatron can add weight gradients straight to main_grad: apex's extension, or the seam's replacement."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None if has_cuda() else True


def device_name() -> str:
    return torch.cuda.get_device_name() if has_cuda() else "cpu"


# Dense bf16 peaks of the data sheets, operations per second; the longest name that fits counts.
_BF16_PEAKS = {"A100": 312e12, "A800": 312e12, "H20": 148e12, "H100": 989e12, "H200": 989e12, "H800": 989e12}


def peak_flops(dtype: torch.dtype) -> float:
    """Operations per second that this process can at best do: the data sheet's for bf16 on a known GPU, else that
    of the fastest of a few large matrix products."""
    known = [name for name in _BF16_PEAKS if name in device_name()] if has_cuda() and dtype == torch.bfloat16 else []
    if known:
        return _BF16_PEAKS[max(known, key=len)]
    size = 8192 if has_cuda() else 1024
    left, right, product = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(3))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        torch.matmul(left, right, out=product)
        if has_cuda():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def slow_in_bf16() -> bool:
    """Whether products take several times as long in bf16 as in fp32 here: a CPU without AVX-512 emulates them."""
    return not has_cuda() and 4 * peak_flops(torch.bfloat16) < peak_flops(torch.float32)


def set_num_threads(num_threads: int) -> None:
    """OpenMP threads of this process's torch; means nothing to a GPU."""
    torch.set_num_threads(num_threads)


def make_deterministic() -> None:
    """From now on this process takes kernels that give the same bits for the same inputs, and refuses an operation that
    has none with a RuntimeError. To be called before its first matrix product."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # TransformerEngine's attention
    torch.use_deterministic_algorithms(True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # a search for mistakes, which writes every buffer


def keep_memory() -> None:
    """Has this process keep freed memory for its next tensors, as CUDA's allocator does by itself."""
    if not has_cuda():
        keep_freed_memory()


def release_memory() -> None:
    """Hands memory that the allocator keeps for reuse back to the device, or to the machine."""
    if has_cuda():
        torch.cuda.empty_cache()
    trim_host_memory()


def take_peak_memory() -> int:
    """High-water mark of this process's memory in bytes since the last call: the GPU's where it uses one, else the
    resident size on the host."""
    if has_cuda() and torch.cuda.is_initialized():  # to ask would otherwise put a context on the GPU
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    status = Path("/proc/self/status").read_text()
    peak = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    with contextlib.suppress(OSError):  # not every container lets a process reset its own mark
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def range_marks() -> tuple[Callable[[str], Any], Callable[[], Any]] | None:
    """Push and pop of NVTX ranges, which Nsight Systems shows; None without CUDA."""
    return (torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop) if has_cuda() else None


def init_process_group(init_method: str, rank: int, world_size: int, timeout_s: float) -> None:
    """Joins the world group: NCCL on CUDA, gloo otherwise. Blocks until all ranks are there."""
    if has_cuda():
        torch.cuda.set_device(rank % torch.cuda.device_count())
        # It makes a plan for each new length, on the host, and the lengths of packs are new in every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.distributed.init_process_group(
        backend="nccl" if has_cuda() else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def join_group(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """A group beside the world: NCCL on CUDA, gloo otherwise. Its members meet in `store` and may belong to different
    worlds; its collectives are methods of what is returned."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if not has_cuda():
        return torch.distributed.ProcessGroupGloo(store, rank, size, timeout)
    nccl: Any = torch.distributed.ProcessGroupNCCL  # absent from torch's CPU builds
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, size, options)


def leave_group(group: Any) -> None:
    """Of `join_group`. A member may have died: NCCL would wait for it."""
    if has_cuda():
        group.abort()


def synchronize() -> None:
    """Returns when what this thread has submitted to its device is done."""
    if has_cuda():
        torch.cuda.current_stream().synchronize()


def device_id() -> str:
    """Of the GPU that this process computes on, the same in every process; empty without one."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if has_cuda() else ""


def own_optimizer_steps(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter its own `step` tensor again. Optimizers that keep `step` per group are left alone."""
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


class _HostMode(TorchFunctionMode):
    """Rewrites CUDA devices in torch calls; see the table above."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _HOST
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _HOST, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(target: Any) -> bool:
    if isinstance(target, torch.device):
        return target.type == "cuda"
    return isinstance(target, str) and target.startswith("cuda")


class _HostStream:
    """A stream or event of the host: everything submitted has already happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def query(self) -> bool:
        return True

    def wait_stream(self, other: Any) -> None:
        pass

    wait_event = record = record_event = wait = wait_stream

    def synchronize(self) -> None:
        pass


class _HostGenerators:
    """torch.cuda.default_generators: any index is the host's generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _add_weight_gradient(input_TI: torch.Tensor, grad_TO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
    add_product(main_grad_OI, grad_TO.t(), input_TI)


def _reduce_scatter(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, or for an output that is its own part of the input an all-reduce in place: gloo's own reduce-scatter is
    one too, of a copy. The other parts of the input then hold sums as well."""

    def reduce_scatter(output: Any, input: Any, op: Any = _SUM, group: Any = None, async_op: bool = False) -> Any:
        if op != _SUM or not _is_own_part(output, input, group):
            return plain(output, input, op=op, group=group, async_op=async_op)
        return torch.distributed.all_reduce(input, op=op, group=group, async_op=async_op)

    return reduce_scatter


def _all_gather(plain: Callable[..., Any]) -> Callable[..., Any]:
    def all_gather(output: Any, input: Any, group: Any = None, async_op: bool = False) -> Any:
        if not async_op and torch.distributed.get_world_size(group) == 1 and _is_own_part(input, output, group):
            return None
        return plain(output, input, group=group, async_op=async_op)

    return all_gather


def _is_own_part(part: torch.Tensor, whole: torch.Tensor, group: Any) -> bool:
    return part.data_ptr() == whole.data_ptr() + torch.distributed.get_rank(group) * part.nbytes


def _nothing() -> Any:
    """A new no-op each time: torch.compile's tables refuse one function under two names."""
    return lambda *args, **kwargs: None


def install() -> None:
    """Activates the seam once per process; a no-op where CUDA is available."""
    global _installed
    if _installed or has_cuda():
        return
    _installed = True
    cuda: Any = torch.cuda
    stream = _HostStream()
    replacements: dict[str, Any] = {
        "current_device": lambda: _HOST,
        "device_count": lambda: 1,
        "set_device": _nothing(),
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "Stream": _HostStream,
        "Event": _HostStream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "default_generators": _HostGenerators(),
        "_lazy_call": lambda callback, **kwargs: callback(),
        "memory_allocated": lambda *args: 0,
        "memory_reserved": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "FloatTensor": torch.FloatTensor,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        "IntTensor": torch.IntTensor,
        "LongTensor": torch.LongTensor,
    }
    for name, replacement in replacements.items():
        setattr(cuda, name, replacement)
    cuda.random.get_rng_state = replacements["get_rng_state"]
    distributed: Any = torch.distributed
    distributed.reduce_scatter_tensor = _reduce_scatter(distributed.reduce_scatter_tensor)
    distributed.all_gather_into_tensor = _all_gather(distributed.all_gather_into_tensor)
    apex: Any = types.ModuleType("fused_weight_gradient_mlp_cuda")
    apex.wgrad_gemm_accum_fp32 = apex.wgrad_gemm_accum_fp16 = _add_weight_gradient
    sys.modules[apex.__name__] = apex
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    _HostMode().__enter__()
