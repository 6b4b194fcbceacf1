"""What one rank holds of a micro-batch: its tokens, those of them that predict a response token, and the way back.

Shape letters: T tokens of the pack, t those of this context-parallel rank, R those of t that predict a response token.
The layers run over t; the vocabulary, and the loss, over R.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from or1_megatron.actor.mesh import Mesh
from or1_megatron.errors import RunFailure
from or1_megatron.parallel.context import Part, gather, part_of
from or1_megatron.parallel.device import device
from or1_megatron.types import MicroBatch, TokenValues


@dataclass(frozen=True)
class Held:
    """Tensors of `tokens` and `predicting` are on the device."""

    whole: MicroBatch  # T
    tokens: MicroBatch  # t
    predicting: MicroBatch  # R
    rows_R: torch.Tensor  # where in t
    part: Part

    @classmethod
    def of(cls, batch: MicroBatch, mesh: Mesh) -> Held:
        here, num_ranks = mesh.coordinates.cp, mesh.dims.cp
        part = part_of(batch.cu_seqlens, rank=here, num_ranks=num_ranks, device=device(), continues=batch.continues)
        tokens = _each(batch, part.take)
        # Without context parallel the host knows, and need not wait for a GPU to tell.
        rows_R = _predicting(batch.weights_T if num_ranks == 1 else tokens.weights_T).to(device())
        return cls(batch, tokens, _each(tokens, lambda values_t: values_t.index_select(0, rows_R)), rows_R, part)

    def token_values(self, log_probs_R: torch.Tensor, entropy_R: torch.Tensor, mesh: Mesh) -> TokenValues:
        """Of the whole pack, in its order, on the host. Raises RunFailure at the first that is not finite."""
        values_t2 = torch.zeros(len(self.tokens.tokens_T), 2, device=device())
        values_t2[self.rows_R] = torch.stack((log_probs_R.detach(), entropy_R.detach()), dim=1).float()
        values_T2 = gather(values_t2, self.part, mesh.cp_group).cpu().numpy()
        finite_T = np.isfinite(values_T2).all(1)
        if finite_T.all():
            return TokenValues(values_T2[:, 0].copy(), values_T2[:, 1].copy())
        place = int(finite_T.argmin())
        sequence, token = self.whole.locate(place)
        of = "a pack of padding" if sequence is None else f"sequence {sequence} of the batch"
        holder = int(self.part.place_T[place]) * self.part.num_ranks // len(values_T2)
        rank = mesh.dims.rank(**dataclasses.asdict(dataclasses.replace(mesh.coordinates, cp=holder)))
        raise RunFailure(
            f"rank {rank}: the logits at token {token} of {of} are not finite (log-prob {values_T2[place, 0]}, entropy "
            f"{values_T2[place, 1]}); no optimizer step was taken"
        )


def _each(batch: MicroBatch, take: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
    tensors = {name: take(value.to(device())) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **tensors)


def _predicting(weights_t: torch.Tensor) -> torch.Tensor:
    """At least two, so that the head is never compiled anew for one row or none: others then, of weight 0."""
    rows_R = weights_t.nonzero().flatten()
    if len(rows_R) < 2:
        others = (weights_t == 0).nonzero().flatten()
        rows_R = torch.cat((rows_R, others[: 2 - len(rows_R)])).sort().values
    return rows_R
