"""The table's problems asked of a model that the project's own engines run, in waves."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from or1_megatron.config import Config
from or1_megatron.data.prompts import load_tokenizer, prompts_of
from or1_megatron.errors import UserError
from or1_megatron.prepare.step import Context, Drop, Row, Table
from or1_megatron.types import Prompt

if TYPE_CHECKING:  # imported where a model is asked: other steps need not wait for Ray and torch
    from transformers import PreTrainedTokenizerBase

    from or1_megatron.cluster import Cluster


@dataclass
class Model:
    """A model that is ready to be asked; its engines start with the first wave."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    start: Callable[[], Cluster]
    unasked: dict[str, Drop] = field(default_factory=dict)  # problems that cannot be asked, by uid

    def prompt(self, row: Row, question: str) -> Prompt | None:
        """As the model will see it; None, and the reason in `unasked`, when it leaves no room or has no usable gold."""
        problem = {
            "prompt": [{"role": "user", "content": question}],
            "data_source": row["source"],
            "reward_model": {"ground_truth": row["answer"]},
        }
        uid, context = row["uid"], self.config.rollout.context_length
        (prompt,) = prompts_of([(uid, problem)], uid, self.tokenizer, 2**62)
        if len(prompt.tokens) >= context:
            self.unasked[uid] = Drop("too_long", f"{len(prompt.tokens)} tokens of a context of {context}")
            return None
        return Prompt(uid, prompt.text, prompt.tokens, prompt.ground_truth, prompt.data_source)


@contextmanager
def opened(target: str, settings: tuple[str, ...], context: Context) -> Iterator[Model]:
    """A model directory, a run or a recipe, as `or1 eval` takes it; settings: key=value. Raises UserError."""
    from or1_megatron.cluster import Cluster
    from or1_megatron.inputs import check_model
    from or1_megatron.scoring import configuration

    with configuration(Path(target), list(settings)) as config, ExitStack() as running:
        tokenizer = load_tokenizer(config.model.path, check_model(config))
        if not tokenizer.chat_template:
            raise UserError(f"{target}: its tokenizer has no chat template to ask problems with; use a chat model")
        clusters: list[Cluster] = []

        def start() -> Cluster:
            if not clusters:
                clusters.append(running.enter_context(Cluster(config, context.scratch, with_actor=False)))
                clusters[0].message = context.message
            return clusters[0]

        yield Model(config, tokenizer, start)


def waves(
    table: Table, size: int, asked: Callable[[Row], Prompt | None], among: Callable[[Row], bool] = lambda row: True
) -> Iterator[list[Prompt]]:
    """The prompts that `asked` makes of the rows `among` the table, in order, `size` at a time.

    The engines get a wave at once, and the next one when its last response has ended.
    """
    wave: list[Prompt] = []
    for rows in table.batches():
        for row in rows:
            if among(row) and (prompt := asked(row)) is not None:
                wave.append(prompt)
            if len(wave) == size:
                yield wave
                wave = []
    if wave:
        yield wave


def content_sum(row: Row) -> int:
    """CRC-32 of what is asked and what counts as right: a record of another problem under the same uid is not used."""
    return zlib.crc32(f"{row['problem']}\0{row['answer']}".encode(errors="surrogatepass"))
