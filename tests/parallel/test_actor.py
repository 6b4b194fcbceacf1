"""The Megatron actor against Hugging Face and the dense reference, over layouts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from or1_megatron.config import Config
from or1_megatron.recipe import from_tree
from or1_megatron.types import Sequence
from tests.dense_reference import Reference, dense_step, token_quantities
from tests.parallel import ranks_actor
from tests.parallel.gloo import run_ranks
from tests.tiny_models import PAD, write_tiny_model

# tp, pp, cp, dp; test_invariance.py has the others
LAYOUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (1, 1, 1, 2)]
MODELS = {"llama": True, "qwen2": False, "qwen3": False}  # family: tied
STEP: dict[str, Any] = {"lr": ranks_actor.LR, "alpha": ranks_actor.ALPHA}


def make_config(path: Path, tp: int = 1, pp: int = 1, cp: int = 1, dp: int = 1, **model: str) -> Config:
    tree = {
        "model": {"path": str(path), "dtype": "fp32", **model},
        "parallel": {"num_ranks": tp * pp * cp * dp, "tp": tp, "pp": pp, "cp": cp, "token_budget": 48},
        "rollout": {"context_length": 40, "temperature": 0.9},
    }
    return from_tree([("test", tree)])


def make_sequences(vocab: int, *, seed: int = 0) -> list[Sequence]:
    draw = random.Random(seed)
    sequences = []
    for length, prompt in [(9, 4), (31, 20), (17, 1), (6, 5), (40, 11), (23, 22), (12, 3), (9, 2), (9, 5)]:
        # HF gives the padding token's embedding no gradient from the input side; no real sequence holds it.
        tokens = tuple(draw.choice([t for t in range(vocab) if t != PAD]) for _ in range(length))
        sequences.append(Sequence(tokens, prompt, draw.choice([-1.3, 0.4, 0.0, 2.0]), None))
    return sequences


def with_log_probs_near(model: torch.nn.Module, sequences: list[Sequence], *kinds: str) -> list[Sequence]:
    """Each kind of log-probs up to 0.5 from the model's own, so that ratios lie on both sides of the clip."""
    draw, found = random.Random(3), []
    for sequence in sequences:
        with torch.no_grad():
            own, _ = token_quantities(model, sequence, 0.9)
        found.append(replace(sequence, **{kind: [x + draw.uniform(-0.5, 0.5) for x in own.tolist()] for kind in kinds}))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    vocab = {"llama": 320, "qwen2": 301, "qwen3": 320}  # 301: padded rows in the last shard
    return {f: write_tiny_model(root / f, f, tied=tied, layers=2, vocab=vocab[f]) for f, tied in MODELS.items()}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, tuple[Reference, torch.nn.Module, list[Sequence]]]:
    made = {}
    for family, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        sequences = make_sequences(model.config.vocab_size)
        made[family] = (dense_step(model, sequences, temperature=0.9, **STEP), model, sequences)
    return made


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-pp{}-cp{}-dp{}".format(*layout))
@pytest.mark.parametrize("family", MODELS)
def test_step_equals_dense_reference(family: str, layout: tuple, models: dict, references: dict) -> None:
    compare_a_step(references[family], make_config(models[family], *layout), ranks_actor.one_step)


def test_compiled_step_equals_dense_reference(models: dict, references: dict) -> None:
    if not run_ranks(1, ranks_actor.can_compile)[0]:
        pytest.skip("torch.compile has no working C++ compiler here")
    compare_a_step(references["qwen3"], make_config(models["qwen3"], tp=2), ranks_actor.one_compiled_step)


def compare_a_step(dense: tuple, config: Config, one_step: Callable[..., dict[str, Any]]) -> None:
    reference, updated, sequences = dense
    ranks = run_ranks(config.parallel.num_ranks, one_step, config, sequences)
    assert ranks[0]["num_batches"] > 1, "the batch must not fit one micro-batch"

    log_probs = {i: row for rank in ranks for i, row in rank["log_probs"].items()}
    assert sorted(log_probs) == list(range(len(sequences)))
    for i, expected in enumerate(reference.log_probs):
        torch.testing.assert_close(log_probs[i], expected, atol=1e-4, rtol=0)

    assert sum(rank["loss"] for rank in ranks) == pytest.approx(reference.loss, rel=1e-4)
    entropy = sum(float(row.sum()) for row in reference.entropies)
    assert sum(rank["entropy"] for rank in ranks) == pytest.approx(entropy, rel=1e-5)
    norms = [rank["grad_norm"] for rank in ranks if rank["grad_norm"] is not None]
    assert norms == pytest.approx([reference.grad_norm] * config.dp, rel=1e-4)

    if config.dp == config.parallel.cp == 1:
        grads = {name: grad for rank in ranks for name, grad in rank["grads"].items()}
        assert grads.keys() == reference.grads.keys()
        for name, expected in reference.grads.items():
            error = (grads[name] - expected).abs().max() / expected.abs().max()
            assert error < 1e-4, f"{name}: relative gradient error {error:.1e}"

    weights = {name: tensor for rank in ranks for name, tensor in rank["weights"].items()}
    expected_weights = dict(updated.named_parameters())
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        # Adam's first step is lr * sign(g) wherever |g| >> eps; where g is all rounding the sign may differ.
        close = (weights[name] - expected).abs() < 1e-3 * ranks_actor.LR
        certain = reference.grads[name].abs() > 1e-3 * reference.grads[name].abs().max()
        assert bool((close | ~certain).all()), f"{name}: next weights differ"


def test_clipped_ratio_equals_dense_reference(models: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    sequences = with_log_probs_near(model, make_sequences(320), "old_log_probs")
    reference = dense_step(model, sequences, temperature=0.9, **STEP)
    ranks = run_ranks(2, ranks_actor.one_step, make_config(models["llama"], tp=2), sequences)
    assert ranks[0]["loss"] == pytest.approx(reference.loss, rel=1e-4)
    assert ranks[0]["grad_norm"] == pytest.approx(reference.grad_norm, rel=1e-4)


@pytest.mark.parametrize(
    "loss",
    [{"clip_low": 0.1, "clip_high": 0.28, "importance_cap": 1.1, "kl_coefficient": 0.1}, {"surrogate": "gradient"}],
    ids=["clip-cap-kl", "gradient"],
)
def test_every_term_of_the_loss_equals_the_dense_reference_over_chunks_of_a_few_tokens(
    loss: dict[str, Any], models: dict
) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    others = ("engine_log_probs", "reference_log_probs") if "kl_coefficient" in loss else ()
    sequences = with_log_probs_near(model, make_sequences(320), "old_log_probs", *others)
    num_tokens = sum(s.num_response_tokens for s in sequences)
    reference = dense_step(model, sequences, temperature=0.9, **loss, **STEP)
    config = make_config(models["llama"], tp=2)
    for name, value in loss.items():
        setattr(config.loss, name, value)
    five_tokens = 5 * 4 * 384 // 2  # float32, of a rank's half of the padded vocabulary
    ranks = run_ranks(2, ranks_actor.one_step_in_chunks, five_tokens, config, sequences)
    assert ranks[0]["loss"] == pytest.approx(reference.loss, rel=1e-4)
    sums = ranks[0]["sums"]
    objective = sums["policy"] + ranks_actor.ALPHA * sums["entropy"]
    objective -= loss.get("kl_coefficient", 0.0) * sums.get("kl", 0.0)
    assert ranks[0]["loss"] == pytest.approx(-objective / num_tokens, rel=1e-5), "a chunk is missing in the sums"
    for name, expected in reference.grads.items():
        assert (ranks[0]["grads"][name] - expected).abs().max() / expected.abs().max() < 1e-4, name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(recompute: str, models: dict, references: dict) -> None:
    reference, _, sequences = references["qwen3"]
    config = make_config(models["qwen3"], recompute=recompute)
    (rank,) = run_ranks(1, ranks_actor.one_step, config, sequences)
    for name, expected in reference.grads.items():
        assert (rank["grads"][name] - expected).abs().max() / expected.abs().max() < 1e-4, name


@pytest.mark.parametrize(
    ("layout", "switch", "shares"), [((2,), True, True), ((2,), False, False), ((1, 1, 2), True, False)]
)
def test_prompts_are_shared_unless_switched_off_or_cut(layout: tuple, switch: bool, shares: bool, models: dict) -> None:
    config = make_config(models["qwen3"], *layout)
    config.parallel.share_prompts = switch
    assert run_ranks(2, ranks_actor.shares_prompts, config) == [shares, shares]


RARE = 319


def sequences_with_a_rare_token() -> list[Sequence]:
    """It stands in sequence 4 only, at place 12 of 40."""
    sequences = make_sequences(RARE)
    tokens = list(sequences[4].tokens)
    tokens[12] = RARE
    sequences[4] = replace(sequences[4], tokens=tuple(tokens))
    return sequences


@pytest.mark.parametrize(
    ("cp", "culprit"),
    [(1, 0), (2, 1)],  # with cp = 2 the chunks of 10 tokens are on ranks 0, 1, 1, 0
)
def test_a_logit_that_is_not_finite_is_named_and_no_step_is_taken(cp: int, culprit: int, models: dict) -> None:
    poison = partial(ranks_actor.poison_hidden_state, token=RARE)
    config = make_config(models["qwen3"], cp=cp)
    for message, unchanged in run_ranks(cp, ranks_actor.poisoned_update, config, sequences_with_a_rare_token(), poison):
        assert message == (
            f"rank {culprit}: the logits at token 12 of sequence 4 of the batch are not finite (log-prob nan, entropy "
            "nan); no optimizer step was taken"
        )
        assert unchanged


@pytest.mark.parametrize("tp", [1, 2])
def test_a_nan_weight_is_found_in_the_sequence_that_uses_it(tp: int, models: dict) -> None:
    """Which of its tokens is first depends on the attention kernel: 0 * NaN is NaN in masked positions, too."""
    weight = "embedding.word_embeddings.weight"
    poison = partial(ranks_actor.poison_row, weight=weight, row=RARE, value=math.nan)
    config = make_config(models["qwen3"], tp=tp)
    found = run_ranks(tp, ranks_actor.poisoned_update, config, sequences_with_a_rare_token(), poison)
    for rank, (message, unchanged) in enumerate(found):
        assert message.startswith(f"rank {rank}: the logits at token ") and " of sequence 4 of the batch" in message
        assert unchanged


def test_an_infinite_logit_that_only_the_entropy_shows_is_found(models: dict) -> None:
    """-infinity for a token that is nobody's label leaves the log-probs as they are, and p log p is NaN."""
    poison = partial(ranks_actor.poison_negative_logit, row=RARE)
    config = make_config(models["qwen3"])
    sequences = make_sequences(RARE)
    ((message, unchanged),) = run_ranks(1, ranks_actor.poisoned_update, config, sequences, poison)
    # The first that predicts a response token: at the others there are no logits.
    places = [f"token {s.num_prompt_tokens - 1} of sequence {i} of the batch" for i, s in enumerate(sequences)]
    assert message.startswith("rank 0: the logits at token ") and unchanged
    assert sum(place in message for place in places) == 1
    assert "log-prob -" in message and "entropy nan" in message


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda layout: "tp{}-pp{}".format(*layout))
@pytest.mark.parametrize("family", MODELS)
def test_weights_come_back_bit_exact(family: str, layout: tuple[int, int], models: dict) -> None:
    ranks = run_ranks(layout[0] * layout[1], ranks_actor.exported, make_config(models[family], *layout))
    exported = {name: tensor for rank in ranks for name, tensor in rank.items()}
    original = dict(AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32).named_parameters())
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name


@pytest.mark.parametrize("layout", [(1, 1), (1, 2), (3, 1)], ids=lambda layout: "tp{}-pp{}".format(*layout))
def test_smollm2_log_probs_equal_hf(layout: tuple[int, int], smollm2: Path) -> None:
    """9 heads over 3 KV heads: tp may be 1 or 3."""
    sequences = make_sequences(49152)
    config = make_config(smollm2, *layout)
    ranks = run_ranks(layout[0] * layout[1], ranks_actor.log_probs, config, sequences)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    found = {i: row for rank in ranks for i, row in rank.items()}
    assert sorted(found) == list(range(len(sequences)))
    with torch.no_grad():
        for i, sequence in enumerate(sequences):
            expected, _ = token_quantities(model, sequence, 0.9)
            torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=0)


def test_resume_is_bitwise_and_loads_at_other_degrees(models: dict, tmp_path: Path) -> None:
    sequences = make_sequences(320)
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    config = make_config(models["llama"], tp=2, dp=2)
    went_on = run_ranks(4, ranks_actor.save_and_go_on, config, sequences, directory, 2)
    resumed = run_ranks(4, ranks_actor.load_and_go_on, config, sequences, directory, 2)
    for (losses, state), (expected, wanted) in zip(resumed, went_on, strict=True):
        assert losses == expected and len(state) == len(wanted) > 10
        assert all(map(torch.equal, state, wanted)), "weights, moments or generator differ"
    assert len({tuple(state[-1].tolist()) for _, state in went_on}) == 4, "the ranks share a generator"
    total = [sum(losses) for losses in zip(*(losses for losses, _ in went_on), strict=True)]
    for other in [make_config(models["llama"], pp=2), make_config(models["llama"], dp=2)]:
        ranks = run_ranks(2, ranks_actor.load_and_go_on, other, sequences, directory, 2)
        found = [sum(losses) for losses in zip(*(losses for losses, _ in ranks), strict=True)]
        assert found == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("key", ["weight_decay", "beta1"])
def test_a_resume_takes_the_optimizers_settings_from_the_configuration(key: str, models: dict, tmp_path: Path) -> None:
    """And not from the checkpoint: one step with another value, against what follows from the step without it."""
    sequences, directory = make_sequences(320), tmp_path / "checkpoint"
    directory.mkdir()
    config, other = make_config(models["llama"]), make_config(models["llama"])
    setattr(other.optimizer, key, 0.5)
    run_ranks(1, ranks_actor.save_and_go_on, config, sequences, directory, 0)

    def after(config: Config, steps: int) -> list[torch.Tensor]:
        ((_, state),) = run_ranks(1, ranks_actor.load_and_go_on, config, sequences, directory, steps)
        return [tensor.view(torch.float32) for tensor in state[:-1]]  # without the generator's numbers

    before, same, changed = after(config, 0), after(config, 1), after(other, 1)
    num_weights = len(before) // 4  # each with step and two moments
    matrices = 0
    for i in range(num_weights):
        if key == "weight_decay":  # w - lr decay w - ...; norms are not decayed
            difference, decayed = changed[i] - same[i], -1e-3 * (0.5 - config.optimizer.weight_decay) * before[i]
            if not torch.equal(changed[i], same[i]):
                matrices += 1
                torch.testing.assert_close(difference, decayed, atol=1e-7, rtol=1e-2)
        else:  # m = beta m + (1 - beta) g
            place = num_weights + 3 * i + 1
            expected = 5 * same[place] - 4 * before[place]
            torch.testing.assert_close(changed[place], expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert key == "beta1" or 0 < matrices < num_weights


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_giving_the_memory_away_and_back_changes_no_bit(dtype: str, models: dict) -> None:
    sequences = make_sequences(320)
    config = make_config(models["llama"], dp=2, dtype=dtype)
    kept = run_ranks(2, ranks_actor.updates_with_handovers, config, sequences, 0)
    handed = run_ranks(2, ranks_actor.updates_with_handovers, config, sequences, 50)
    for (state, _), (same, held) in zip(kept, handed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(state, same, strict=True))
        assert set(held[1::2]) == {0} and len(set(held[::2])) == 1 and held[0] > 0, held


def test_a_full_disk_while_saving_is_one_clear_error(models: dict, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    config = make_config(models["llama"], dp=2)
    said = run_ranks(2, ranks_actor.save_on_a_full_disk, config, tmp_path / "checkpoint")
    for one in said:
        assert one.startswith("UserError") and "File too large" in one and "\\n" not in one, said


def test_a_killed_writer_ends_the_save(models: dict, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    said = run_ranks(
        2, ranks_actor.save_with_a_killed_writer, make_config(models["llama"], dp=2), tmp_path / "checkpoint"
    )
    assert said[0].startswith("RuntimeError") and "the writing process ended with exit code -9" in said[0], said
    assert all(said)


def test_the_reference_stays_the_initial_model(models: dict[str, Path]) -> None:
    """The policy is lent the reference's weights for the pass and has its own again afterwards, bit for bit."""
    config = make_config(models["llama"])
    config.loss.kl_coefficient = 0.1
    (found,) = run_ranks(1, ranks_actor.reference_after_a_step, config, make_sequences(320))
    start, reference, before, after = found
    assert all(torch.equal(reference[i], start[i]) for i in start)
    assert all(torch.equal(before[i], after[i]) for i in start)
    assert any(not torch.equal(before[i], start[i]) for i in start)
