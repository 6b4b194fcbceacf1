"""Problem files -> tokenised prompts, and the seeded, resumable stream that deals them out.

Schema of a row (the field's): data_source, prompt, ability, reward_model{ground_truth}, extra_info. `prompt` is a
list of chat messages, to which the model's chat template is applied, or a plain string, taken as it is.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from or1_megatron.architecture import Architecture
from or1_megatron.data.rows import sound_rows
from or1_megatron.errors import UserError
from or1_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ATTEMPTS = 16  # of which model_difficulty counts the failed ones


@dataclass(frozen=True)
class Difficulty:
    """Rows neither too easy nor too hard for a model (6): extra_info.model_difficulty[model], both ends included."""

    model: str
    least: int
    largest: int

    def holds(self, place: str, row: dict[str, Any]) -> bool:
        info = row.get("extra_info")
        known = info.get("model_difficulty") if isinstance(info, dict) else None
        value = known.get(self.model) if isinstance(known, dict) else None
        if not isinstance(value, int | float):
            names = f"; it has {', '.join(known)}" if isinstance(known, dict) else ""
            raise UserError(f"{place}: extra_info.model_difficulty has no number for {self.model}{names}")
        return self.least <= value <= self.largest

    def __str__(self) -> str:
        return f"difficulty {self.least} to {self.largest} for {self.model}"


def load_tokenizer(model: str, architecture: Architecture) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises UserError when transformers cannot read it, or config.json, or it has more
    tokens than the embedding has rows."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # tokenizers raises nothing narrower for a file that it cannot read
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        fix = "mend config.json if a key of it is named, else copy the tokenizer files"
        raise UserError(f"{model}: no usable tokenizer ({reason}); {fix}") from None
    if len(tokenizer) > architecture.vocab_size:
        raise UserError(
            f"{model}: the tokenizer has {len(tokenizer)} tokens but config.json says vocab_size="
            f"{architecture.vocab_size}; they belong to different models"
        )
    return tokenizer


def load_prompts(
    files: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    instruction_suffix: str = "",
    wanted: Difficulty | None = None,
) -> list[Prompt]:
    """Every row of every file, in order, as far as it is of the difficulty `wanted`.

    Raises UserError naming file and line (or row) of the first bad one, and a file of which nothing is left.
    """
    check_names(files)
    prompts = []
    for name in files:
        path = Path(name)
        found = prompts_of(sound_rows(path), path.name, tokenizer, context_length, instruction_suffix, wanted)
        if not found:
            none = f"has no problem of {wanted}" if wanted else "is empty; it needs at least one problem"
            raise UserError(f"problem file {path} {none}")
        prompts += found
    return prompts


def check_names(files: Sequence[str]) -> None:
    """Raises UserError for two files of one name: a problem's uid is its file's name and its row."""
    first: dict[str, str] = {}
    for file in files:
        other = first.setdefault(Path(file).name, file)
        if other != file:
            raise UserError(f"problem files {other} and {file} have the same name, by which problems are told apart; "
                            "rename one")  # fmt: skip


def prompts_of(
    rows: Iterable[tuple[str, dict[str, Any]]],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    instruction_suffix: str = "",
    wanted: Difficulty | None = None,
) -> list[Prompt]:
    """Of (place, row) pairs; their uids are source:0, source:1 ... Raises UserError naming the place of a bad one."""
    return [
        _prompt(place, row, f"{source}:{number}", tokenizer, context_length, instruction_suffix)
        for number, (place, row) in enumerate(rows)
        if wanted is None or wanted.holds(place, row)
    ]


def _prompt(
    place: str,
    row: dict[str, Any],
    uid: str,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    instruction_suffix: str,
) -> Prompt:
    text = _text(place, row.get("prompt"), tokenizer, instruction_suffix)
    gold = _ground_truth(place, row)
    try:
        "".join((text, *gold)).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {error.object[error.start]!r} in prompt or answer is half a sign; mend it") from None
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) >= context_length:
        raise UserError(
            f"{place}: the prompt has {len(tokens)} tokens, which leaves no room for a response in "
            f"rollout.context_length={context_length}; raise it or drop the problem"
        )
    return Prompt(uid, text, tuple(tokens), gold, str(row.get("data_source", "")), place)


def _text(place: str, prompt: Any, tokenizer: PreTrainedTokenizerBase, instruction_suffix: str) -> str:
    if isinstance(prompt, str) and prompt:
        return prompt
    well_formed = (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and "role" in m and isinstance(m.get("content"), str) for m in prompt)
    )
    if not well_formed:
        raise UserError(f"{place}: prompt={str(prompt)[:60]!r} is neither a string nor a list of role/content messages")
    if not tokenizer.chat_template:
        raise UserError(f"{place}: the prompt is a chat but the tokenizer has no chat template; use a plain string")
    messages: Any = copy.deepcopy(prompt)
    messages[-1]["content"] += instruction_suffix
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _ground_truth(place: str, row: dict[str, Any]) -> tuple[str, ...]:
    reward_model = row.get("reward_model")
    gold = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if isinstance(gold, str) and gold.startswith("["):  # released data: a JSON list of strings
        try:
            listed = json.loads(gold)
        except ValueError:
            listed = None
        if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed):
            gold = listed
    golds = gold if isinstance(gold, list) else [gold]
    if not golds or any(not isinstance(item, str | int | float) or str(item) == "" for item in golds):
        raise UserError(
            f"{place}: reward_model.ground_truth={gold!r} is not an answer; give a string or a list of them"
        )
    return tuple(str(item) for item in golds)


class PromptStream:
    """Deals prompts out, epoch after epoch, each epoch in its own order drawn from (seed, epoch)."""

    def __init__(self, prompts: list[Prompt], seed: int):
        assert prompts
        self._prompts, self._seed = prompts, seed
        self._epoch, self._position = 0, 0
        self._dropped: frozenset[str] = frozenset()
        self._order = self._draw()

    def _draw(self) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts that are not dropped; crosses into the next epoch when this one ends."""
        taken = []
        while len(taken) < count:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._draw()
            prompt = self._prompts[self._order[self._position]]
            if prompt.uid not in self._dropped:
                taken.append(prompt)
            self._position += 1
        return taken

    def drop(self, uids: Iterable[str]) -> None:
        """From now on the problems `uids` are passed over, which are not all of them."""
        self._dropped = frozenset(uids)
        assert any(prompt.uid not in self._dropped for prompt in self._prompts)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position, "num_prompts": len(self._prompts)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises UserError when the problem files no longer hold as many problems."""
        if state["num_prompts"] != len(self._prompts):
            raise UserError(
                f"data.train holds {len(self._prompts)} problems, the checkpoint was made with {state['num_prompts']}; "
                "resume with the same files"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._draw()
