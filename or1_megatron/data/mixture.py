"""Several prompt streams dealt out by weight. Each source has epochs of its own: a small one comes around often."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from or1_megatron.data.prompts import PromptStream
from or1_megatron.errors import UserError
from or1_megatron.types import Prompt


class PromptMixture:
    """Source i gets the share weights[i] / sum of the prompts, exact to one prompt at every moment.

    Who is next is not drawn: it is the source that is furthest behind its share. A source whose problems are all
    dropped leaves its share to the others.
    """

    def __init__(self, sources: list[list[Prompt]], weights: list[float], seed: int):
        assert len(sources) == len(weights) > 0 and all(weight > 0 for weight in weights), weights
        self._sources = sources
        self._streams = [PromptStream(prompts, seed) for prompts in sources]
        self._weights = list(weights)
        self._taken = [0] * len(sources)
        self._live = list(range(len(sources)))

    @property
    def prompts(self) -> dict[str, Prompt]:
        """By uid."""
        return {prompt.uid: prompt for prompts in self._sources for prompt in prompts}

    def take(self, count: int) -> list[Prompt]:
        taken = []
        for _ in range(count):
            total = 1 + sum(self._taken[i] for i in self._live)
            whole = sum(self._weights[i] for i in self._live)
            behind = {i: self._weights[i] / whole * total - self._taken[i] for i in self._live}
            chosen = max(self._live, key=lambda i: (behind[i], -i))
            taken += self._streams[chosen].take(1)
            self._taken[chosen] += 1
        return taken

    def drop(self, uids: Iterable[str]) -> None:
        """From now on the problems `uids` are passed over. Raises UserError when none would be left."""
        dropped = frozenset(uids)
        self._live = [i for i, prompts in enumerate(self._sources) if any(p.uid not in dropped for p in prompts)]
        if not self._live:
            raise UserError("all problems of data.train were solved and dropped; use harder ones, or drop_solved=false")
        for i in self._live:
            self._streams[i].drop(dropped)

    def state_dict(self) -> dict[str, Any]:
        sources = [stream.state_dict() for stream in self._streams]
        return {"sources": sources, "taken": list(self._taken), "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Other weights than the checkpoint's count from now on. Raises UserError when the sources are not its own."""
        if len(state["sources"]) != len(self._streams):
            raise UserError(
                f"data.train has {len(self._streams)} weighted sources, the checkpoint was made with "
                f"{len(state['sources'])}; resume with the same data.train and data.weights"
            )
        for stream, saved in zip(self._streams, state["sources"], strict=True):
            stream.load_state_dict(saved)
        if state.get("weights", self._weights) == self._weights:
            self._taken = list(state["taken"])
