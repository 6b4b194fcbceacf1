"""Invariants of planning and packing, over drawn inputs."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from or1_megatron.errors import UserError
from or1_megatron.parallel.bundles import bundle_limit, bundles
from or1_megatron.parallel.packing import Plan, aligned, pack, plan, shared_prompts, unpack_response_values
from or1_megatron.types import Sequence

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
RANKS, ALIGNMENTS = st.integers(1, 9), st.sampled_from([1, 2, 3, 8])


@st.composite
def sequence_lists(draw: st.DrawFn) -> list[Sequence]:
    off_policy = draw(st.booleans())
    sequences = []
    for _ in range(draw(st.integers(1, 6))):
        prompt, response = draw(st.integers(1, 5)), draw(st.integers(1, 7))
        tokens = tuple(draw(st.integers(1, 99)) for _ in range(prompt + response))  # 0 is the padding
        old = tuple(-draw(st.integers(1, 50)) / 8 for _ in range(response))
        advantage = draw(st.sampled_from([-1.5, 0.5]))
        sequences.append(Sequence(tokens, prompt, advantage, old if off_policy else None))
    return sequences


@st.composite
def groups(draw: st.DrawFn) -> list[Sequence]:
    """Groups of up to five responses to one prompt; neighbouring groups may have equal prompts, too."""
    found: list[Sequence] = []
    for _ in range(draw(st.integers(1, 5))):
        prompt = tuple(draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 6))))
        for _ in range(draw(st.integers(1, 5))):
            response = tuple(draw(st.integers(1, 99)) for _ in range(draw(st.integers(1, 9))))
            old = tuple(-number / 8 for number in response)
            found.append(Sequence((*prompt, *response), len(prompt), float(len(found) + 1), old))
    return found


def make_plan(lengths: list[int], ranks: int, budget: int = 64, alignment: int = 1) -> Plan:
    return plan(lengths, num_ranks=ranks, token_budget=budget, alignment=alignment, linear_work=100.0)


@given(LENGTHS, RANKS, st.integers(64, 200), ALIGNMENTS)
def test_plan_covers_each_sequence_once_within_the_budget(lengths: list[int], ranks: int, budget: int, alignment: int):
    layout = make_plan(lengths, ranks, budget, alignment)
    assert len(layout.micro_batches) == ranks
    assert len({len(batches) for batches in layout.micro_batches}) == 1
    assert len(layout.micro_batches[0]) >= 1
    placed = Counter(i for batches in layout.micro_batches for batch in batches for i in batch)
    assert placed == Counter(range(len(lengths)))
    for batches in layout.micro_batches:
        assert all(sum(aligned(lengths[i], alignment) for i in batch) <= budget for batch in batches)


@given(LENGTHS, RANKS)
def test_plan_is_balanced(lengths: list[int], ranks: int):
    """The greedy bound: the last sequence given to the fullest rank found no rank with less than it had."""
    layout = make_plan(lengths, ranks)
    work = [100.0 * length + length**2 for length in lengths]
    loads = [sum(work[i] for batch in batches for i in batch) for batches in layout.micro_batches]
    mean = sum(work) / ranks
    assert layout.imbalance == pytest.approx(max(loads) / mean)
    assert max(loads) <= mean + max(work) * (1 - 1 / ranks) + 1e-6


@given(LENGTHS, RANKS, st.integers(60, 200), ALIGNMENTS)
def test_micro_batches_are_few_and_balanced(lengths: list[int], ranks: int, budget: int, alignment: int):
    budget = max(budget, aligned(60, alignment))
    layout = make_plan(lengths, ranks, budget, alignment)
    tokens = [sum(aligned(lengths[i], alignment) for b in batches for i in b) for batches in layout.micro_batches]
    count = len(layout.micro_batches[0])
    assert count < 2 * max(tokens) / budget + 1
    loads = [sum(100.0 * lengths[i] + lengths[i] ** 2 for i in b) for batches in layout.micro_batches for b in batches]
    assert layout.micro_batch_imbalance == pytest.approx(max(loads) / (sum(loads) / (count * ranks)))
    # An empty micro-batch beside one of several sequences would have been the one with the least work, and with room.
    for batches in layout.micro_batches:
        assert all(bool(batch) for batch in batches) or max(map(len, batches)) <= 1


def test_micro_batches_of_a_long_tail_are_balanced():
    """First fit by length, for comparison, leaves 1.3 to 1.5 here."""
    draw = random.Random(0)
    lengths = [min(32_768, int(draw.lognormvariate(8.5, 0.8)) + 1) for _ in range(4096)]
    layout = plan(lengths, num_ranks=32, token_budget=65_536, alignment=8, linear_work=65_000.0)
    assert layout.imbalance < 1.001
    assert layout.micro_batch_imbalance < 1.05


def test_work_is_balanced_and_not_tokens():
    """One sequence of 40 tokens costs 1600, as much as 16 of 10 tokens, which hold 160."""
    layout = plan([40] + [10] * 16, num_ranks=2, token_budget=200, linear_work=0.0)
    assert sorted(len(batches[0]) for batches in layout.micro_batches) == [1, 16]
    assert layout.imbalance == 1.0


def test_the_budget_stops_a_micro_batch_that_has_the_least_work():
    """Tokens of length-1 sequences cost next to nothing; the one of 40 ends up with those that find no room."""
    layout = plan([40] + [1] * 130, num_ranks=1, token_budget=100, linear_work=0.0)
    assert sorted(len(batch) for batch in layout.micro_batches[0]) == [31, 100]


def test_one_micro_batch_more_where_the_smallest_count_cannot_be_filled():
    layout = plan([40, 40, 40], num_ranks=1, token_budget=60, linear_work=0.0)
    assert layout.micro_batches == (((0,), (1,), (2,)),)


def test_plan_depends_on_nothing_but_its_arguments():
    lengths = random.Random(0).choices(range(1, 60), k=200)
    assert make_plan(lengths, 4) == make_plan(lengths, 4)


def test_fewer_sequences_than_ranks_leave_empty_micro_batches():
    layout = make_plan([5, 9], 4)
    assert sorted(layout.micro_batches) == [((),), ((),), ((0,),), ((1,),)]
    assert layout.imbalance == layout.micro_batch_imbalance == pytest.approx(981 / ((525 + 981) / 4))


@pytest.mark.parametrize(("length", "alignment", "padded"), [(65, 1, 65), (64, 3, 66)])
def test_a_sequence_above_the_budget_is_refused(length: int, alignment: int, padded: int):
    with pytest.raises(UserError) as caught:
        make_plan([3, length, 9], 2, alignment=alignment)
    message = str(caught.value)
    for part in (f"sequence 1 has {length} tokens", "token_budget=64", f"at least {padded}"):
        assert part in message
    assert "\n" not in message


def test_planning_a_large_batch_is_quick():
    """256 prompts x 32 responses on 128 ranks; processor time, so that a busy machine does not matter."""
    draw = random.Random(0)
    lengths = [min(32_768, int(draw.lognormvariate(8.5, 0.8)) + 1) for _ in range(8192)]
    started = time.process_time()
    layout = plan(lengths, num_ranks=128, token_budget=32_768, alignment=8, linear_work=12 * 5120.0)
    assert time.process_time() - started < 0.5
    assert layout.imbalance < 1.01


@given(sequence_lists(), ALIGNMENTS, st.randoms(use_true_random=False))
def test_pack_and_unpack(sequences: list[Sequence], alignment: int, draw: random.Random):
    ids = draw.sample(range(len(sequences)), draw.randint(1, len(sequences)))
    batch = pack(sequences, ids, alignment=alignment)
    assert batch.sequence_ids == tuple(ids)
    assert batch.cu_seqlens[0] == 0 and len(batch.cu_seqlens) == len(ids) + 1
    assert batch.num_tokens == len(batch.tokens_T) == len(batch.weights_T)
    assert (batch.old_log_probs_T is None) == (sequences[0].old_log_probs is None)
    for i, (start, end) in zip(ids, itertools.pairwise(batch.cu_seqlens), strict=True):
        sequence = sequences[i]
        length, prompt = len(sequence.tokens), sequence.num_prompt_tokens
        assert end - start == aligned(length, alignment)
        assert batch.tokens_T[start:end].tolist() == [*sequence.tokens, *[0] * (end - start - length)]
        assert batch.positions_T[start:end].tolist() == list(range(end - start))
        weights = batch.weights_T[start:end].tolist()
        predicting = [t for t, weight in enumerate(weights) if weight]
        assert set(weights) <= {0.0, 1.0}
        # Exactly one position predicts each response token, and it knows no later one.
        assert predicting == [t - 1 for t in range(prompt, length)]
        assert [int(batch.labels_T[start + t]) for t in predicting] == list(sequence.tokens[prompt:])
        assert batch.labels_T[start : start + length - 1].tolist() == list(sequence.tokens[1:])
        assert all(float(batch.advantages_T[start + t]) == sequence.advantage for t in predicting)
        if sequence.old_log_probs is not None:
            assert batch.old_log_probs_T is not None
            assert [float(batch.old_log_probs_T[start + t]) for t in predicting] == list(sequence.old_log_probs)
    # What the model gives back for each label comes out as the response it belongs to.
    pieces = unpack_response_values(batch.labels_T.numpy(), batch, sequences)
    assert [piece.tolist() for piece in pieces] == [
        list(sequences[i].tokens[sequences[i].num_prompt_tokens :]) for i in ids
    ]


@given(groups(), ALIGNMENTS, st.randoms(use_true_random=False))
def test_pack_with_shared_prompts(sequences: list[Sequence], alignment: int, draw: random.Random):
    """Whoever reads what a stretch continues, and then the stretch, has read the sequence."""
    ids = draw.sample(range(len(sequences)), draw.randint(1, len(sequences)))
    batch = pack(sequences, ids, alignment=alignment, share_prompts=True)
    offsets, prompts = batch.cu_seqlens, {prompt for prompt in batch.continues if prompt is not None}
    stretches = [s for s in range(len(offsets) - 1) if s not in prompts]
    assert batch.sequence_ids == tuple(ids) and len(stretches) == len(ids)
    assert batch.num_tokens == offsets[-1] == len(batch.tokens_T) and batch.num_tokens % alignment == 0
    for i, s in zip(ids, stretches, strict=True):
        sequence, prompt = sequences[i], batch.continues[s] if batch.continues else None
        own = range(offsets[s], offsets[s + 1])
        seen = [*(range(offsets[prompt], offsets[prompt + 1]) if prompt is not None else ()), *own]
        read = batch.tokens_T[seen].tolist()
        assert read[: len(sequence.tokens)] == list(sequence.tokens) and not any(read[len(sequence.tokens) :])
        assert batch.positions_T[seen].tolist() == list(range(len(seen)))
        predicting = [t for t in own if batch.weights_T[t] > 0]
        places = range(sequence.num_prompt_tokens - 1, len(sequence.tokens) - 1)
        assert [batch.locate(t) for t in predicting] == [(i, place) for place in places]
        assert batch.labels_T[predicting].tolist() == list(sequence.tokens[sequence.num_prompt_tokens :])
        assert set(batch.advantages_T[predicting].tolist()) == {sequence.advantage}
        assert batch.old_log_probs_T is not None
        assert batch.old_log_probs_T[predicting].tolist() == list(sequence.old_log_probs or ())
    assert int((batch.weights_T > 0).sum()) == sum(sequences[i].num_response_tokens for i in ids)
    pieces = unpack_response_values(batch.labels_T.numpy(), batch, sequences)
    assert [piece.tolist() for piece in pieces] == [
        list(sequences[i].tokens[sequences[i].num_prompt_tokens :]) for i in ids
    ]
    # Exactly what neighbours have in common is left out.
    common = [length for length in shared_prompts([sequences[i] for i in ids]) if length]
    assert batch.spared_prompts == common
    if alignment == 1:
        assert batch.num_tokens == sum(len(sequences[i].tokens) for i in ids) - sum(common)


@given(groups(), st.integers(1, 3), st.integers(16, 120), ALIGNMENTS)
def test_plan_of_groups_covers_each_sequence_once_within_the_budget(
    sequences: list[Sequence], ranks: int, budget: int, alignment: int
):
    lengths, shared = [len(s.tokens) for s in sequences], shared_prompts(sequences)
    budget = max(budget, aligned(max(lengths), alignment))
    settings = {"num_ranks": ranks, "token_budget": budget, "alignment": alignment, "linear_work": 100.0}
    layout = plan(lengths, **settings, shared=shared)
    placed = [ids for rank in layout.micro_batches for ids in rank]
    assert Counter(i for ids in placed for i in ids) == Counter(range(len(sequences)))
    packed = [pack(sequences, ids, alignment=alignment, share_prompts=True) for ids in placed if ids]
    assert max(batch.num_tokens for batch in packed) <= budget
    whole = bundles(lengths, shared, most=bundle_limit(lengths, ranks, budget))
    assert [i for ids in whole for i in ids] == list(range(len(sequences)))
    spared = sum(sum(shared[i] for i in ids[1:]) for ids in whole)
    assert sum(sum(batch.spared_prompts) for batch in packed) >= spared


@given(groups(), st.integers(1, 200))
def test_a_bundle_has_few_tokens_and_few_keys(sequences: list[Sequence], most: int):
    lengths, shared = [len(s.tokens) for s in sequences], shared_prompts(sequences)
    for ids in bundles(lengths, shared, most=most):
        tokens = sum(lengths[i] for i in ids) - sum(shared[i] for i in ids[1:])
        assert len(ids) == 1 or tokens <= most
        assert sum(lengths[i] for i in ids) <= 4 * tokens


def test_long_prompts_are_computed_for_four_responses_at_once():
    """Five would need 5 x 505 keys for 499 + 5 x 6 tokens in the layers."""
    assert [len(ids) for ids in bundles([505] * 8, [0] + [499] * 7, most=10_000)] == [4, 4]


def test_a_group_of_short_responses_shares_one_prompt():
    """16 prompts of 30 tokens with 8 responses of 10: a bundle is a group of 29 + 8 x 11 = 117 tokens."""
    draw = random.Random(0)
    made = [
        Sequence((*prompt, *draw.choices(range(99), k=10)), 30, 1.0, None)
        for prompt in (draw.choices(range(99), k=30) for _ in range(16))
        for _ in range(8)
    ]
    lengths = [40] * 128
    layout = plan(lengths, num_ranks=1, token_budget=600, linear_work=100.0, shared=shared_prompts(made))
    packed = [pack(made, ids, alignment=1, share_prompts=True) for ids in layout.micro_batches[0]]
    assert sum(batch.num_tokens for batch in packed) == 16 * 117 and len(packed) == 4
    assert layout.imbalance == layout.micro_batch_imbalance == 1.0
    long = plan(
        [4000 + n for n in range(128)], num_ranks=8, token_budget=8192, linear_work=1.0, shared=[0, *[900] * 127]
    )
    assert long.imbalance < 1.01, "long responses are dealt one by one"


@pytest.mark.parametrize(("alignment", "tokens"), [(1, 2), (2, 2), (3, 3), (8, 8)])
@pytest.mark.parametrize("old", [None, (-0.5,)])
def test_a_pack_of_nothing_is_padding(alignment: int, tokens: int, old: tuple[float, ...] | None):
    batch = pack([Sequence((4, 5), 1, 1.0, old)], [], alignment=alignment)
    assert batch.cu_seqlens == (0, tokens) and batch.sequence_ids == ()
    assert batch.weights_T.tolist() == [0.0] * tokens
    assert batch.positions_T.tolist() == list(range(tokens))
    assert (batch.old_log_probs_T is None) == (old is None)
    assert unpack_response_values(np.zeros(tokens), batch, []) == []


def test_a_sequence_without_a_response_is_refused():
    with pytest.raises(UserError, match="^sequence 1 has 3 prompt tokens and no response token; drop its sample$"):
        pack([Sequence((1, 2), 1, 1.0, None), Sequence((4, 5, 6), 3, 1.0, None)], [0, 1], alignment=1)


def test_types_of_a_pack():
    batch = pack([Sequence((4, 5, 6), 1, 1.0, (-0.5, -0.25))], [0], alignment=4)
    assert {batch.tokens_T.dtype, batch.positions_T.dtype, batch.labels_T.dtype} == {torch.int64}
    assert batch.old_log_probs_T is not None
    assert {batch.weights_T.dtype, batch.advantages_T.dtype, batch.old_log_probs_T.dtype} == {torch.float32}


@pytest.mark.parametrize(
    "broken",
    [
        Sequence((4, 5, 6), 1, 1.0, None),  # the others have old log-probs
        Sequence((4, 5, 6), 1, 1.0, (-0.5,)),  # one for two tokens: numpy would repeat it
        Sequence((4, 5, 6), 0, 1.0, (-0.5,) * 3),  # nothing predicts the first token
    ],
)
def test_our_own_mistakes_are_caught(broken: Sequence):
    with pytest.raises(AssertionError):
        pack([Sequence((1, 2), 1, 1.0, (-0.1,)), broken], [0, 1], alignment=1)


def test_the_work_of_a_shared_prompt_counts_once():
    """A pair of 40 tokens with 30 in common costs 40^2 + 40^2 - 30^2 = 2300, a sequence of 60 costs 3600."""
    lengths, shared = [40] * 16 + [60], [0, 30] * 8 + [0]
    layout = plan(lengths, num_ranks=1, token_budget=320, linear_work=0.0, shared=shared)
    assert layout.micro_batch_imbalance == pytest.approx(5 * 2300 / ((8 * 2300 + 3600) / 2))


def test_a_bundle_begins_with_its_longest_sequence():
    layout = plan([10, 30, 20] * 8, num_ranks=1, token_budget=4000, linear_work=1.0, shared=[0, 5, 5] * 8)
    ((ids,),) = layout.micro_batches
    assert [i % 3 for i in ids] == [1, 2, 0] * 8
