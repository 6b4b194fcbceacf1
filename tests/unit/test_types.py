"""What flows through a step on its way between processes and through a checkpoint."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from or1_megatron.parallel.packing import pack
from or1_megatron.types import Prompt, Sample, Sequence

PROMPT = Prompt("p", "1 + 1 =", (4, 5), ("2",))


def sample(tokens: list[int]) -> Sample:
    log_probs = [-1 / (3 + i) for i in range(len(tokens))]
    return Sample(PROMPT, 0, np.array(tokens, np.int32), np.array(log_probs, np.float32), "2", "stop", 3)


def sent(thing: object) -> tuple[object, list[pickle.PickleBuffer]]:
    """It as another process gets it from Ray, with the buffers that went beside the pickle, read-only."""
    buffers: list[pickle.PickleBuffer] = []
    written = pickle.dumps(thing, protocol=5, buffer_callback=buffers.append)
    assert len(written) < 2000  # nothing per token
    return pickle.loads(written, buffers=[bytes(buffer) for buffer in buffers]), buffers


def test_a_sample_keeps_nothing_of_what_it_was_sent_in():
    found, buffers = sent(sample(list(range(4000))))
    assert isinstance(found, Sample) and len(buffers) == 2
    assert found.tokens.tolist() == list(range(4000)) and found.num_tokens == 4002
    assert found.tokens.flags.owndata and found.tokens.flags.writeable and found.log_probs.flags.owndata


@pytest.mark.parametrize("old", [None, np.full(2998, -0.5, np.float32)])
def test_a_micro_batch_is_sent_beside_the_pickle(old: np.ndarray | None):
    batch = pack([Sequence(np.arange(3000), 2, 0.5, old)], [0], alignment=4)
    found, buffers = sent(batch)
    assert isinstance(found, type(batch)) and len(buffers) == 5 + (old is not None)
    for field in dataclasses.fields(batch):
        mine, theirs = getattr(batch, field.name), getattr(found, field.name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
            theirs.zero_()  # its own memory
        else:
            assert mine == theirs
