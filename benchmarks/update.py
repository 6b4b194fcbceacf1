"""One optimizer step of the actor beside plain Hugging Face: SmolLM2-135M, the same sequences, dtype and threads.

    python benchmarks/update.py [--quick] [--json FILE]

Ours: one Megatron rank, packed micro-batches, MAGIC loss with the entropy bonus, fp32 main weights. The peer: a
padded batch per micro-batch in the order given, at most the same number of tokens padding included, cross-entropy
weighted by the advantage, no entropy, fused AdamW on weights of the compute dtype. Each runs in a process of its own
and they take turns. Rates count the tokens of the sequences, not the padding. Groups of short responses also with every
prompt computed for each of its responses. Under the table: where a step of ours spends its time.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's own programs: launch/ is not installed

from benchmarks.harness import Benchmark, main  # noqa: E402
from launch.fetch_model import fetch_smollm2  # noqa: E402
from or1_megatron.parallel import device  # noqa: E402
from or1_megatron.parallel.packing import pack, plan, shared_prompts  # noqa: E402
from or1_megatron.profiling.flops import Tokens, training_flops  # noqa: E402
from or1_megatron.recipe import from_tree  # noqa: E402
from or1_megatron.reward.isolation import die_with_parent  # noqa: E402
from or1_megatron.types import Sequence  # noqa: E402

TOKEN_BUDGET = 1024
THREADS = 2
LR, ALPHA, VOCAB = 1e-6, 0.01, 49152
# Rules by which a profiled operation is put down to a part of the step: the innermost that matches counts.
PARTS = {
    "head": ("head", "log_probs", "_logprobs", "vocab"),
    "attention": ("scaled_dot_product", "_flash_attention"),
    "optimizer": ("optimizer", "clip_grad", "_fused_adamw"),
    "communication": ("c10d", "gloo", "nccl", "all_reduce", "reduce_scatter", "all_gather"),
    "GEMM": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
}


def sequences(lengths: list[int], seed: int = 0) -> list[Sequence]:
    """A third of each is prompt."""
    random = np.random.default_rng(seed)
    return [
        Sequence(tuple(map(int, random.integers(0, VOCAB, n))), n // 3, float(random.normal()), None) for n in lengths
    ]


def groups(count: int, size: int, prompt: int, longest: int, seed: int = 0) -> list[Sequence]:
    """`size` responses to each of `count` prompts of `prompt` tokens."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        begin = tuple(map(int, random.integers(0, VOCAB, prompt)))
        for n in random.integers(longest // 2, longest + 1, size):
            response = tuple(map(int, random.integers(0, VOCAB, n)))
            made.append(Sequence((*begin, *response), prompt, float(random.normal()), None))
    return made


def mixed_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Log-normal, as response lengths are, in random order."""
    drawn = np.random.default_rng(seed).lognormal(mean=np.log(longest / 4), sigma=0.7, size=count)
    return [int(n) for n in np.clip(drawn, 16, longest)]


class Ours:
    """The Megatron actor of one rank."""

    def __init__(self, model: Path, dtype: str, sequences: list[Sequence], *, share_prompts: bool = True):
        device.install()
        with tempfile.NamedTemporaryFile(prefix="or1-bench-") as name:
            meeting = f"file://{name.name}"
        device.init_process_group(meeting, 0, 1, 600)
        from or1_megatron.actor.actor import MegatronActor

        tree = {
            "model": {"path": str(model), "dtype": dtype},
            "parallel": {"token_budget": TOKEN_BUDGET},
            "rollout": {"context_length": TOKEN_BUDGET},
        }
        self.config = from_tree([("benchmark", tree)])
        self.actor = MegatronActor(self.config, 0)
        layout = plan(
            [len(s.tokens) for s in sequences],
            num_ranks=1,
            token_budget=TOKEN_BUDGET,
            linear_work=self.actor.architecture.linear_work,
            shared=shared_prompts(sequences) if share_prompts else (),
        )
        self.batches = [
            pack(sequences, ids, alignment=1, share_prompts=share_prompts) for ids in layout.micro_batches[0]
        ]
        self.num_tokens = sum(s.num_response_tokens for s in sequences)
        self._computed = Tokens.of(sequences, self.batches)

    def step(self) -> None:
        self.actor.update(self.batches, entropy_coefficient=ALPHA, num_tokens=self.num_tokens, lr=LR)

    def flops(self) -> float:
        return training_flops(self.actor.architecture, self._computed)

    def peak_flops(self) -> float:
        return self.actor.peak_flops()

    def parts(self) -> dict[str, float]:
        """Share of one step's processor time by part."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.step()
        seconds = dict.fromkeys([*PARTS, "other"], 0.0)
        for event in profile.events() or ():
            seconds[_part(event)] += event.self_cpu_time_total / 1e6
        total = sum(seconds.values())
        return {part: value / total for part, value in seconds.items()}


def _part(event: Any) -> str:
    while event is not None:
        name = event.name.lower()
        for part, words in PARTS.items():
            if any(word.lower() in name for word in words):
                # A matrix product inside the head is the head's.
                outer = event.cpu_parent and _part(event.cpu_parent)
                return "head" if outer == "head" else part
        event = event.cpu_parent
    return "other"


class HuggingFace:
    """What a user writes with transformers and torch alone."""

    def __init__(self, model: Path, dtype: str, sequences: list[Sequence]):
        from transformers import AutoModelForCausalLM

        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        model_type: Any = AutoModelForCausalLM
        self.model = model_type.from_pretrained(model, dtype=kind).to(device.device())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)
        self.num_tokens = sum(len(s.tokens) - s.num_prompt_tokens for s in sequences)
        self.batches = [self._batch(chosen) for chosen in self._fill(sequences)]

    @staticmethod
    def _fill(sequences: list[Sequence]) -> list[list[Sequence]]:
        batches: list[list[Sequence]] = [[]]
        for sequence in sequences:
            longest = max(len(s.tokens) for s in [*batches[-1], sequence])
            if batches[-1] and longest * (len(batches[-1]) + 1) > TOKEN_BUDGET:
                batches.append([])
            batches[-1].append(sequence)
        return batches

    @staticmethod
    def _batch(chosen: list[Sequence]) -> tuple[torch.Tensor, ...]:
        longest = max(len(s.tokens) for s in chosen)
        tokens, mask = (torch.zeros(len(chosen), longest, dtype=torch.long) for _ in range(2))
        advantages = torch.zeros(len(chosen), longest)
        for row, s in enumerate(chosen):
            tokens[row, : len(s.tokens)] = torch.tensor(s.tokens)
            mask[row, : len(s.tokens)] = 1
            advantages[row, s.num_prompt_tokens : len(s.tokens)] = s.advantage
        return tokens, mask, advantages

    def step(self) -> None:
        self.optimizer.zero_grad()
        for tokens, mask, advantages in self.batches:
            tokens, mask, advantages = (x.to(device.device()) for x in (tokens, mask, advantages))
            logits = self.model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            ((losses.float() * advantages[:, 1:].flatten()).sum() / self.num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def _serve(pipe: Connection, kind: Callable[..., Any], model: Path, dtype: str, sequences: list[Sequence]) -> None:
    """Body of a case's process: answers a method's name with (seconds, result)."""
    die_with_parent()
    torch.set_num_threads(THREADS)
    subject = kind(model, dtype, sequences)
    pipe.send("ready")
    for method in iter(pipe.recv, None):
        started = time.perf_counter()
        result = getattr(subject, method)()
        if device.has_cuda():
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - started, result))


class Case:
    """A process that holds one model and does one step when asked."""

    def __init__(self, *subject: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *subject), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, method: str) -> Any:
        self._pipe.send(method)
        return self._pipe.recv()

    def ready(self) -> None:
        assert self._pipe.recv() == "ready"

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def draw(quick: bool, emulated: bool) -> dict[str, list[Sequence]]:
    """The sequences of each part; few and short ones where products are emulated."""
    if emulated:
        return {"mixed": sequences(mixed_lengths(6, 128)), "equal": sequences([128] * 4)}
    if quick:
        return {"mixed": sequences(mixed_lengths(6, 512))}
    return {
        "mixed": sequences(mixed_lengths(16, 512)),
        "equal": sequences([256] * 8),
        "groups": groups(4, 8, prompt=48, longest=48),
    }


def build(bench: Benchmark, quick: bool) -> None:
    model = fetch_smollm2(Path(__file__).parents[1] / ".cache" / "models")
    slow = device.slow_in_bf16()
    dtypes = ["fp32"] if quick and slow else ["bf16", "fp32"]
    if slow:
        bench.note(f"bf16 {'left out' if quick else 'with few tokens, three times'}: this CPU emulates its products")
    for dtype in dtypes[:1] if quick else dtypes:
        emulated = dtype == "bf16" and slow
        for name, mine in draw(quick, emulated).items():
            if name == "groups" and device.use_transformer_engine("auto", dtype):
                bench.note("groups left out: TransformerEngine's attention knows no shared prompts")
                continue
            lengths = [len(s.tokens) for s in mine]
            padded = sum(tokens.numel() for tokens, _, _ in map(HuggingFace._batch, HuggingFace._fill(mine)))
            told = f"{len(mine)} sequences, {sum(lengths)} tokens, {min(lengths)} to {max(lengths)}"
            bench.note(f"{name} {dtype}: {told}; padded {padded}")
            part = partial(_compare, bench, name, dtype, model, mine, profiled=not (quick or emulated))
            bench.part(part, rounds=3 if emulated else 7)


def _compare(bench: Benchmark, name: str, dtype: str, model: Path, drawn: list[Sequence], *, profiled: bool) -> None:
    kinds: dict[str, Callable[..., Any]] = {"or1_megatron": Ours, "transformers": HuggingFace}
    if name == "groups":
        kinds["each its prompt"] = partial(Ours, share_prompts=False)
    subjects = {who: Case(kind, model, dtype, drawn) for who, kind in kinds.items()}
    timed = {}
    for who, subject in subjects.items():
        subject.ready()
        bench.stack.callback(subject.close)
        timed[who] = bench.case(
            f"{who} {dtype} {name}", lambda subject=subject: subject.ask("step")[0],
            kind="peer" if who == "transformers" else "ours",
            amount=sum(len(s.tokens) for s in drawn), unit="tokens",
        )  # fmt: skip
    ours, peer = timed["or1_megatron"], timed["transformers"]
    target = 1.0 if name == "equal" else 1.3
    bench.mark(f"{name}_{dtype}_over_hf", lambda: ours.rate / peer.rate, target=target)
    if name == "groups":
        bench.mark(f"shared_prompts_{dtype}", lambda: ours.rate / timed["each its prompt"].rate, target=1.0)
    if profiled:
        _describe(bench, name, dtype, subjects["or1_megatron"].ask)


def _describe(bench: Benchmark, name: str, dtype: str, ask: Callable[[str], Any]) -> None:
    ask("step")  # the first step also allocates
    seconds = ask("step")[0]
    rate, peak, parts = (ask(what)[1] for what in ("flops", "peak_flops", "parts"))
    rate /= seconds
    shares = ", ".join(f"{part} {100 * share:.0f} %" for part, share in parts.items())
    bench.note(f"{name} {dtype}: {rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s (MFU {rate / peak:.2f}); {shares}")


if __name__ == "__main__":
    main("update", "One optimizer step of SmolLM2-135M, sequences of mixed and of equal lengths", build)
