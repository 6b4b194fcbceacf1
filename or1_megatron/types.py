"""What flows through a step: Prompt -> Sample -> Group -> MicroBatch.

Shape letters: T tokens of one packed micro-batch, S sequences in it, R tokens of one response.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # whoever only reads problems and verdicts need not wait for it
    import torch

VERDICTS = (
    "correct", "wrong", "unparsable", "truncated", "timeout", "memory", "sandbox_violation", "infrastructure_error",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the verifiers say about one response."""

    name: str  # one of VERDICTS
    seconds: float  # from the worker's start on it to its answer
    detail: str = ""

    @property
    def failed(self) -> bool:
        """The check could not be made, for no fault of the response."""
        return self.name == "infrastructure_error"

    @property
    def reward(self) -> float:
        """1 or 0. An infrastructure error has none: it says nothing about the response."""
        assert not self.failed, self.detail
        return 1.0 if self.name == "correct" else 0.0


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised."""

    uid: str  # unique over all sources; names the problem in rollouts and history
    text: str  # exactly what the engine sees, chat template applied
    tokens: tuple[int, ...]
    ground_truth: tuple[str, ...]  # one or more acceptable gold answers
    data_source: str = ""
    place: str = ""  # file and line that it was read from, for messages


@dataclass(eq=False)
class Sample:
    """One response to one prompt. Packed by the engine while others are decoded, so what is per token is an array here
    already: with tens of millions of tokens in a step nothing on the way to the ranks may handle them one by one.
    """

    prompt: Prompt
    index: int  # 0..group_size-1 within its group
    tokens: np.ndarray  # R response tokens, the stop token included; int32
    log_probs: np.ndarray  # R, natural log, of the engine's sampling distribution (temperature applied); float32
    text: str
    finish_reason: str  # "stop" or "length"
    weight_version: int  # the push the engine was running on when it was sampled
    verdict: str = ""  # one of VERDICTS
    reward: float = 0.0

    def pack(self) -> Sample:
        """Itself, with arrays of tokens and log-probs made from the engine's lists."""
        self.tokens, self.log_probs = np.array(self.tokens, np.int32), np.array(self.log_probs, np.float32)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # arrays of its own: those that Ray hands out keep its store from being emptied
        self.tokens, self.log_probs = self.tokens.copy(), self.log_probs.copy()

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def num_tokens(self) -> int:
        """Length of prompt + response, tokens."""
        return len(self.prompt.tokens) + len(self.tokens)


@dataclass
class Group:
    """All `group_size` responses to one prompt. Groups are kept or dropped whole."""

    prompt: Prompt
    samples: list[Sample] = field(default_factory=list)

    @property
    def rewards(self) -> list[float]:
        return [sample.reward for sample in self.samples]

    @property
    def truncated(self) -> list[bool]:
        return [sample.truncated for sample in self.samples]

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return len(self.prompt.tokens) + max(len(sample.tokens) for sample in self.samples)


@dataclass(frozen=True)
class Sequence:
    """One training sequence: prompt + response with what the loss needs to know about each response token."""

    tokens: Seq[int] | np.ndarray  # prompt + response
    num_prompt_tokens: int
    advantage: float
    old_log_probs: Seq[float] | np.ndarray | None  # one per response token; None: the current policy's (on-policy)
    engine_log_probs: Seq[float] | np.ndarray | None = None  # as sampled; for importance weights
    reference_log_probs: Seq[float] | np.ndarray | None = None  # for the KL term
    weight: float = 1.0  # of each response token in the loss, above 0

    @property
    def num_response_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed end to end (THD): never padded between sequences beyond the alignment.

    Position t predicts labels_T[t], the next token of the same sequence; weights_T is above 0 where that token is a
    response token and 0 elsewhere (prompt, last position, alignment padding). A prompt that several sequences share
    may stand once, without its last token, as a stretch of its own before the stretches that continue it: those begin
    with the prompt's last token, which predicts another token in each.
    """

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, of each token in its sequence
    labels_T: torch.Tensor  # int64
    weights_T: torch.Tensor  # float32, 1 or what rl/loss.py calls w
    advantages_T: torch.Tensor  # float32
    old_log_probs_T: torch.Tensor | None  # float32; None: on-policy
    cu_seqlens: tuple[int, ...]  # offsets of the stretches, and T; a stretch is a sequence where no prompt is shared
    sequence_ids: tuple[int, ...]  # S indices into the list that was packed
    engine_log_probs_T: torch.Tensor | None = None  # float32
    reference_log_probs_T: torch.Tensor | None = None  # float32
    continues: tuple[int | None, ...] = ()  # per stretch the one with its prompt; (): no prompt is shared

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def spared_prompts(self) -> list[int]:
        """Tokens that were left out: the length of a shared prompt for each sequence after the first that continues
        it."""
        prompts = [prompt for prompt in self.continues if prompt is not None]
        lengths = {prompt: self.cu_seqlens[prompt + 1] - self.cu_seqlens[prompt] for prompt in prompts}
        return [lengths[prompt] for prompt, following in itertools.pairwise(prompts) if prompt == following]

    def locate(self, place: int) -> tuple[int | None, int]:
        """(sequence, token in it) of a position of the pack; None for the sequence in a pack of padding. In a shared
        prompt the first sequence that continues it."""
        stretch = bisect.bisect_right(self.cu_seqlens, place) - 1
        shared = {prompt for prompt in self.continues if prompt is not None}
        before = sum(other not in shared for other in range(stretch))
        return self.sequence_ids[before] if self.sequence_ids else None, int(self.positions_T[place])

    def __getstate__(self) -> dict[str, Any]:
        """Arrays for the tensors: Ray moves those as they are, and would pickle these."""
        return {
            name: value.numpy() if name.endswith("_T") and value is not None else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        import torch

        self.__dict__.update(
            {name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in state.items()}
        )


@dataclass(frozen=True)
class TokenValues:
    """Per token of one micro-batch, float32 on the host; meaningful where weights_T is above 0."""

    log_probs_T: np.ndarray
    entropy_T: np.ndarray


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step. `sums` are over this replica's tokens: the caller adds replicas and divides."""

    sums: dict[str, float]
    loss: float  # this replica's share of -(1/N) * sum
    grad_norm: float  # global, before clipping
    values: list[TokenValues]  # under the policy before the step, one per micro-batch
