"""One vLLM engine, in this process.

Contract of a sample: `tokens` are the response with its stop token (end of sequence, or the token that completed a
stop string); `log_probs[i]` is the natural log-prob of `tokens[i]` under the distribution it was drawn from,
temperature and top_p applied; `weight_version` is the last weight push that had ended when it was drawn.

The sampler's generator is reseeded from (seed, version) after every push, so that a resumed run draws what the
uninterrupted run drew. With SamplingSpec.seed each response draws from a generator of its own instead. vllm reads its
environment at import; it is therefore imported when an Engine is made.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from or1_megatron.architecture import read_architecture
from or1_megatron.config import Config
from or1_megatron.errors import RunFailure, UserError
from or1_megatron.parallel import device
from or1_megatron.parallel.host_memory import trim_host_memory
from or1_megatron.parallel.layout import hf_shapes
from or1_megatron.parallel.megatron_files import MegatronWeights, all_tensors, is_megatron
from or1_megatron.parallel.packed_weights import names
from or1_megatron.parallel.weight_exchange import Plan
from or1_megatron.profiling.spans import Spans
from or1_megatron.rollout import cpu_norms, receiver
from or1_megatron.rollout.shards import SharedWeights
from or1_megatron.types import Group, Prompt, Sample

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PARTS = {"engine weights": "weights", "kv cache": "kv_cache"}  # vLLM's names of what sleeps
_CPU_BLOCK_SIZE = 32  # tokens; vLLM's 128 on CPU is longer than a short prompt, which then shares nothing in its group


@dataclass(frozen=True)
class EngineSpec:
    """What one engine is made from."""

    model_path: str  # HF or converted checkpoint directory
    dtype: str  # "fp32" or "bf16"
    context_length: int  # prompt + response limit, tokens
    seed: int  # differs between the engines of a run
    kv_cache_gb: float  # GiB; without a GPU
    gpu_memory_utilization: float  # share of the GPU's memory
    max_batched_tokens: int  # most tokens in one engine step
    enforce_eager: bool  # no CUDA graphs; always so without a GPU
    num_threads: int  # OpenMP threads without a GPU
    can_sleep: bool = False  # gives its memory up between rollouts; vLLM does so on a GPU only
    tensor_parallel: int = 1  # processes, of a GPU each, that share the model
    devices: tuple[int, ...] = ()  # the node's GPUs it runs on; empty: those the process was given


def engine_spec(config: Config, index: int, can_sleep: bool = False, devices: tuple[int, ...] = ()) -> EngineSpec:
    rollout = config.rollout
    processes = rollout.num_engines * rollout.engine_tp
    return EngineSpec(
        model_path=config.model.path,
        dtype=config.engine_dtype,
        context_length=rollout.context_length,
        seed=config.seed + index,
        kv_cache_gb=rollout.kv_cache_gb,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        max_batched_tokens=rollout.max_batched_tokens,
        enforce_eager=rollout.enforce_eager,
        can_sleep=can_sleep,
        num_threads=max(1, rollout.cpu_threads_per_engine or (os.cpu_count() or 1) // processes),
        tensor_parallel=rollout.engine_tp,
        devices=devices,
    )


@dataclass(frozen=True)
class SamplingSpec:
    """How responses are drawn."""

    temperature: float
    top_p: float
    max_response_length: int  # tokens; 0: what the context leaves
    stop: tuple[str, ...] = ()  # strings that end a response
    context_length: int = 0  # prompt + response limit, tokens, below the engine's; 0: the engine's
    # None: the engine's generator. A number: the i-th response to a prompt draws from a generator of (seed, uid, i), so
    # that its random numbers do not depend on what else is asked, where, or in which order; asked again it repeats.
    seed: int | None = None
    pack: bool = True  # in the engine, while others are decoded; False: its tokens and log-probs are lists

    def seed_of(self, uid: str) -> int | None:
        """Of the prompt's first response; vLLM counts on from there."""
        if self.seed is None:
            return None
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{uid}".encode()).digest()[:6], "big")


class Engine:
    """Generates groups, takes weights, tells log-probs."""

    def __init__(self, spec: EngineSpec, spans: Spans | None = None):
        """`spans` records how many responses are being decoded."""
        self.spec = spec
        self._spans = spans or Spans(enabled=False)
        self.weight_version = 0
        self._num_requests = 0
        self._resident = set(_PARTS)
        self._llm = _start_vllm(spec)
        if not all(self.in_workers(receiver.can_reload)):
            raise UserError(
                f"vllm {receiver.vllm_version()} has no reload_weights(weights_iterator=...), by which engines take "
                "the actor's weights; install a newer one"
            )
        hf_config = self._llm.model_config.hf_config
        self._tied = bool(hf_config.tie_word_embeddings)
        path = Path(spec.model_path)
        architecture = read_architecture(path)
        self._shapes = hf_shapes(architecture)
        self._shared: SharedWeights | None = None
        if is_megatron(path):  # vLLM cannot read it and has started on dummy weights
            with MegatronWeights(path, architecture) as weights:
                self.load_weights(all_tensors(weights, architecture), version=0)

    def release(self, parts: Iterable[str]) -> None:
        """Gives up "engine weights" (until the next push) or "kv cache". Nothing may be generating."""
        assert self.spec.can_sleep and self._resident.issuperset(parts), (self.spec, self._resident, parts)
        staying = self._resident.difference(parts)
        if device.has_cuda():
            self._llm.sleep(level=2)  # all of it: vLLM has no finer way down
        self._resident = set()
        self.restore(staying)

    def restore(self, parts: Iterable[str]) -> None:
        """Takes the memory back; weights are undefined until they are loaded."""
        assert self._resident.isdisjoint(parts), (self._resident, parts)
        for part in parts:
            if device.has_cuda():
                self._llm.wake_up(tags=[_PARTS[part]])
            self._resident.add(part)

    def generate(self, prompts: list[Prompt], group_size: int, sampling: SamplingSpec) -> Iterator[Group]:
        """Yields each group as soon as all of its responses have finished, in that order.

        A prompt leaves room for at least one token. Closing the iterator early aborts what is still running.
        """
        assert self._resident == set(_PARTS), f"generate with only {self._resident} on the device"
        engine = self._llm.llm_engine
        running: dict[str, Prompt] = {}
        try:
            for prompt in prompts:
                params = self._sampling_params(prompt, group_size, sampling)
                running[self._add_request(prompt.tokens, params)] = prompt
            decoding, rounds = engine.get_num_unfinished_requests(), 0
            self._spans.count("responses", decoding)
            while running:
                outputs = engine.step()
                rounds += 1
                if (left := engine.get_num_unfinished_requests()) != decoding:
                    decoding = left
                    self._spans.count("responses", decoding, rounds)
                for output in outputs:
                    yield self._group(running.pop(output.request_id), output, sampling.pack)
        finally:
            if running:
                engine.abort_request(list(running))

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replaces all weights by (HF checkpoint name, tensor) pairs, consumed lazily, of any float dtype.

        Tensors may be views; all references are dropped before this returns. Nothing may be generating. Raises
        RunFailure when a tensor of the checkpoint is missing: vLLM would go on with the old one.
        """
        assert "engine weights" in self._resident, "weights pushed to an engine that has released their memory"
        missing = set(self._shapes)

        def received() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                missing.discard(name)
                yield name, tensor

        if self.spec.tensor_parallel > 1 and not self._shared:  # as large as the model, and only needed here
            self._shared = SharedWeights(self._llm.collective_rpc, self._shapes, _DTYPES[self.spec.dtype])
        with torch.no_grad():
            if self._shared:
                self._shared.write(received())
            else:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": received()})
            if missing:
                raise RunFailure(f"weight push {version} lacks {len(missing)} tensors, first {min(missing)}")
            seed = self._seed_of(version)
            if self._shared:
                self._shared.load(tied=self._tied, seed=seed)
            elif self._tied:
                self._llm.apply_model(receiver.repack_tied_head)
        self._llm.reset_prefix_cache()
        trim_host_memory()
        device.synchronize()  # vLLM may decode on another stream than this thread's
        self.weight_version = version
        receiver.seed_generators(seed)

    def in_workers(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(worker, *args) in each of vLLM's processes; see receiver.py."""
        return self._llm.collective_rpc(function, args=args)

    def take_weights(self, plan: Plan, version: int, *, checksums: bool) -> list[dict[str, int]]:
        """Replaces all weights by what the processes receive; the sums of receiver.take of each."""
        assert "engine weights" in self._resident, "weights pushed to an engine that has released their memory"
        assert set(names(plan)) == self._shapes.keys(), "the plan is of another checkpoint"
        sums = self.in_workers(receiver.take, self._tied, self._seed_of(version), checksums)
        self._llm.reset_prefix_cache()
        self.weight_version = version
        return sums

    def _seed_of(self, version: int) -> int:
        return self.spec.seed * 1_000_003 + version

    def prompt_log_probs(self, tokens: list[int]) -> list[float]:
        """Log-probs of tokens[1:] at temperature 1; `tokens` are at most context_length - 1."""
        from vllm import SamplingParams

        assert self._resident == set(_PARTS), f"prompt_log_probs with only {self._resident} on the device"
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        self._add_request(tokens, params)
        outputs: list[Any] = []
        while not outputs:
            outputs = self._llm.llm_engine.step()
        table = outputs[0].prompt_logprobs
        return [table[i][tokens[i]].logprob for i in range(1, len(tokens))]

    def _add_request(self, tokens: Iterable[int], params: Any) -> str:
        from vllm import TokensPrompt

        self._num_requests += 1
        name = str(self._num_requests)
        self._llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=list(tokens)), params)
        return name

    def _sampling_params(self, prompt: Prompt, group_size: int, sampling: SamplingSpec) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = (sampling.context_length or self.spec.context_length) - len(prompt.tokens)
        assert room > 0, f"prompt {prompt.uid} has {len(prompt.tokens)} of {self.spec.context_length} tokens"
        return SamplingParams(
            n=group_size,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(room, sampling.max_response_length or room),
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            seed=sampling.seed_of(prompt.uid),
            logprobs=0,  # of the sampled token only
            output_kind=RequestOutputKind.FINAL_ONLY,  # one output, when all of the group have finished
        )

    def _group(self, prompt: Prompt, output: Any, pack: bool) -> Group:
        samples = []
        for response in sorted(output.outputs, key=lambda response: response.index):
            tokens: Any = list(response.token_ids)
            log_probs: Any = [entry[token].logprob for token, entry in zip(tokens, response.logprobs, strict=True)]
            assert response.finish_reason in ("stop", "length"), response.finish_reason
            sample = Sample(
                prompt=prompt,
                index=response.index,
                tokens=tokens,
                log_probs=log_probs,
                text=response.text,
                finish_reason=response.finish_reason,
                weight_version=self.weight_version,
            )
            samples.append(sample.pack() if pack else sample)
        return Group(prompt, samples)


def _start_vllm(spec: EngineSpec) -> Any:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    os.environ |= {name: value for name, value in _QUIET.items() if name not in os.environ}
    options: dict[str, Any] = {"max_num_batched_tokens": spec.max_batched_tokens}
    if device.has_cuda():
        options["gpu_memory_utilization"] = spec.gpu_memory_utilization
        options["enable_sleep_mode"] = spec.can_sleep
    else:
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(spec.num_threads)}
        device.set_num_threads(spec.num_threads)
        from torch._dynamo import config as compiler

        compiler.disable = True  # else the first batch waits 20 s for C++ compiled for the log-probs
        if spec.tensor_parallel > 1:
            os.environ |= {"TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}  # of the processes it starts
        options["kv_cache_memory_bytes"] = int(spec.kv_cache_gb * 2**30)
        options["block_size"] = _CPU_BLOCK_SIZE
        if spec.tensor_parallel == 1 and spec.dtype == "fp32":  # in this process
            options |= cpu_norms.options()
        # With a seed vLLM takes back what a prompt drew that is not whole yet, and a CPU's generator cannot.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(spec.max_batched_tokens, spec.context_length)
    from vllm import LLM

    return LLM(
        model=spec.model_path,
        dtype="bfloat16" if spec.dtype == "bf16" else "float32",
        tensor_parallel_size=spec.tensor_parallel,
        max_model_len=spec.context_length,
        enforce_eager=spec.enforce_eager or not device.has_cuda(),
        load_format="dummy" if is_megatron(Path(spec.model_path)) else "auto",
        seed=spec.seed,
        distributed_executor_backend="uni" if spec.tensor_parallel == 1 else "mp",
        logprobs_mode="processed_logprobs",
        use_tqdm_on_load=False,
        **options,
    )
