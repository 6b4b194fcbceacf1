"""The real vLLM engine on a tiny model in fp32: what it samples, what it reports, what it does with new weights."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numpy.testing import assert_array_equal
from transformers import AutoModelForCausalLM

from or1_megatron.architecture import read_architecture
from or1_megatron.errors import RunFailure
from or1_megatron.parallel import shared_memory
from or1_megatron.parallel.bucket import checksum, pack_buckets, plan_buckets, slot_view
from or1_megatron.parallel.packed_weights import box_view, plan_packed
from or1_megatron.parallel.weight_exchange import LOOPBACK, Sender, join, open_meeting
from or1_megatron.recipe import from_tree
from or1_megatron.rollout.engine import Engine, EngineSpec, SamplingSpec, engine_spec
from or1_megatron.rollout.worker import RolloutWorker
from or1_megatron.types import Group, Prompt, Sample
from tests.tiny_models import EOS, byte_tokenizer, write_tiny_model

CONTEXT = 96
PROBE = list(b"Each engine must tell the same log-probs as the model it was given.")
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", tied=True)


@pytest.fixture(scope="module")
def worker(checkpoint):
    return RolloutWorker(
        EngineSpec(
            model_path=str(checkpoint),
            dtype="fp32",
            context_length=CONTEXT,
            seed=0,
            kv_cache_gb=0.05,
            gpu_memory_utilization=0.2,
            max_batched_tokens=256,
            enforce_eager=True,
            num_threads=2,
        )
    )


def prompt(text: str) -> Prompt:
    return Prompt(uid=text, text=text, tokens=tuple(text.encode()), ground_truth=("",))


def hf_log_probs(model: torch.nn.Module, tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of tokens[1:]."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def assert_log_probs_equal(sample: Sample, model: torch.nn.Module, temperature: float) -> None:
    expected = hf_log_probs(model, [*sample.prompt.tokens, *sample.tokens], temperature)[
        len(sample.prompt.tokens) - 1 :
    ]
    torch.testing.assert_close(torch.tensor(sample.log_probs), expected, atol=TOLERANCE, rtol=0)


def perturbed(checkpoint, seed: int) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def push(worker: RolloutWorker, model: torch.nn.Module, version: int, leave_out: str = "") -> None:
    """In buckets so small that the push takes many of them."""
    worker.begin_weights(version)
    tensors = ((name, tensor) for name, tensor in model.named_parameters() if name != leave_out)
    for bucket in pack_buckets(((name, tensor.detach()) for name, tensor in tensors), 40_000):
        worker.receive_bucket(bucket)
    worker.finish_weights()


def samples(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def test_samples_obey_limits_and_keep_the_token_that_ended_them(worker):
    prompts = [prompt("1 + 1 ="), prompt("two and two make")]
    letters = "abcdefghijklmnop"
    sampling = SamplingSpec(temperature=2.0, top_p=1.0, max_response_length=24, stop=(*letters, "xy"))
    groups = list(worker.generate(prompts, 8, sampling))

    assert sorted(group.prompt.uid for group in groups) == sorted(p.uid for p in prompts)
    for group in groups:
        assert [sample.index for sample in group.samples] == list(range(8))
        assert all(sample.prompt is group.prompt for sample in group.samples)
    for sample in samples(groups):
        assert 1 <= len(sample.tokens) == len(sample.log_probs) <= 24
        decoded = str(byte_tokenizer().decode(sample.tokens, skip_special_tokens=True))
        assert sample.text.rstrip("\ufffd") == decoded.rstrip("\ufffd")  # the engine drops half a character at the end
        early = sample.text if sample.truncated else sample.text[:-1]
        assert not set(early) & set(letters) and EOS not in sample.tokens[:-1]
        if sample.truncated:
            assert len(sample.tokens) == 24
        else:
            assert sample.tokens[-1] == EOS or sample.text.endswith((*letters, "xy"))
    assert {sample.finish_reason for sample in samples(groups)} == {"stop", "length"}


def test_end_of_sequence_is_part_of_the_response_and_the_context_is_the_limit(worker):
    groups = list(worker.generate([prompt("count to ten")], 200, SamplingSpec(1.0, 1.0, 0)))
    lengths = [sample.num_tokens for sample in samples(groups) if sample.truncated]
    ended = [sample for sample in samples(groups) if not sample.truncated]
    assert lengths and set(lengths) == {CONTEXT}
    assert ended and all(sample.tokens.tolist().index(EOS) == len(sample.tokens) - 1 for sample in ended)


def test_a_stage_may_have_a_shorter_context_than_the_engine(worker):
    groups = list(worker.generate([prompt("count to ten")], 100, SamplingSpec(1.0, 1.0, 0, context_length=40)))
    lengths = [sample.num_tokens for sample in samples(groups) if sample.truncated]
    assert lengths and set(lengths) == {40}


def test_log_probs_are_those_of_the_nucleus(worker, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    groups = list(worker.generate([prompt("what is 7?")], 8, SamplingSpec(1.0, 0.5, 16)))
    for sample in samples(groups):
        tokens = torch.tensor([*sample.prompt.tokens, *sample.tokens])
        with torch.no_grad():
            probs = model(tokens[None]).logits[0, len(sample.prompt.tokens) - 1 : -1].softmax(-1)
        likely, order = probs.sort(descending=True)
        inside = likely.cumsum(-1) - likely < 0.5  # up to the token that brings half of the probability
        drawn = order == torch.tensor(sample.tokens)[:, None]
        expected = (likely[drawn] / (likely * inside).sum(-1)).log()
        assert bool(inside[drawn].all())
        torch.testing.assert_close(torch.tensor(sample.log_probs), expected, atol=TOLERANCE, rtol=0)


def test_engines_runs_and_versions_draw_from_seeds_of_their_own():
    def seed(index: int = 0, run: int = 0, version: int = 1) -> int:
        engine: Any = SimpleNamespace(
            spec=engine_spec(from_tree([("t", {"model": {"path": "/m"}, "seed": run})]), index)
        )
        return Engine._seed_of(engine, version)

    assert len({seed(), seed(index=1), seed(index=2), seed(run=9), seed(version=2), seed(version=3)}) == 6


def test_a_response_that_is_packed_later_is_the_same(worker):
    sampling = SamplingSpec(1.0, 1.0, 16, seed=3)
    early, late = (
        samples(list(worker.generate([prompt("what is 7?")], 4, dataclasses.replace(sampling, pack=pack))))
        for pack in (True, False)
    )
    assert all(isinstance(sample.tokens, list) and isinstance(sample.log_probs, list) for sample in late)
    for one, other in zip(early, (sample.pack() for sample in late), strict=True):
        assert_array_equal(one.tokens, other.tokens, strict=True)
        assert_array_equal(one.log_probs, other.log_probs, strict=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_samples_equal_the_models(worker, checkpoint, temperature):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    groups = list(worker.generate([prompt("what is 7?"), prompt("b")], 4, SamplingSpec(temperature, 1.0, 32)))
    for sample in samples(groups):
        assert_log_probs_equal(sample, model, temperature)


def test_norms_are_those_of_the_c_library_and_equal_vllms(worker):
    """`worker` has started an engine in this process."""
    from vllm import ir

    single, fused = ir.ops.rms_norm, ir.ops.fused_add_rms_norm
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*size, generator=generator) for size in ((5, 64), (5, 64), (64,)))
    strided = torch.randn(5, 96, generator=generator)[:, :64]
    assert (
        single.dispatch(x, weight, 1e-5).provider == fused.dispatch(x, residual, weight, 1e-5).provider == "c_library"
    )
    assert single.dispatch(strided, weight, 1e-5).provider == "native"
    assert fused.dispatch(x, strided, weight, 1e-5).provider == "native"
    expected = single.impls["native"].impl_fn(x, weight, 1e-5)
    torch.testing.assert_close(single(x, weight, 1e-5), expected, atol=1e-6, rtol=1e-6)
    found = fused(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(found, fused.impls["native"].impl_fn(x, residual, weight, 1e-5), atol=1e-6, rtol=1e-6)


def test_first_group_comes_while_others_still_run(worker):
    short, long = prompt("x" * (CONTEXT - 2)), prompt("y")
    groups = worker.generate([long, short], 4, SamplingSpec(1.0, 1.0, 0))
    assert next(groups).prompt is short
    assert worker._engine._llm.llm_engine.has_unfinished_requests()
    groups.close()
    assert not worker._engine._llm.llm_engine.has_unfinished_requests()


def test_pushed_weights_are_the_ones_in_use(worker, checkpoint):
    model = perturbed(checkpoint, seed=1)
    cached = prompt("A prompt of more than one block of the key-value cache, asked before and after.")
    sampling = SamplingSpec(1.0, 1.0, 4)
    list(worker.generate([cached], 2, sampling))
    before = torch.tensor(worker.prompt_log_probs(PROBE))
    expected = hf_log_probs(model, PROBE)
    assert (before - expected).abs().mean() > 0.1

    push(worker, model, version=3)

    after = torch.tensor(worker.prompt_log_probs(PROBE))
    torch.testing.assert_close(after, expected, atol=TOLERANCE, rtol=0)
    (group,) = worker.generate([cached], 2, sampling)
    for sample in group.samples:
        assert_log_probs_equal(sample, model, temperature=1.0)
    assert [sample.weight_version for sample in group.samples] == [3, 3] and worker.ping() == 3


def test_same_version_draws_the_same_samples_again(worker, checkpoint):
    model = perturbed(checkpoint, seed=2)
    drawn = []
    for version in (4, 4, 5):
        push(worker, model, version)
        groups = worker.generate([prompt("3 + 4 ="), prompt("5 + 6 =")], 4, SamplingSpec(1.0, 1.0, 16))
        drawn.append({(s.prompt.uid, s.index): s.tokens.tolist() for s in samples(list(groups))})
    assert drawn[0] == drawn[1] != drawn[2]


def test_seeded_responses_are_the_same_in_any_company_and_order(worker, checkpoint):
    push(worker, perturbed(checkpoint, seed=2), version=4)

    def drawn(texts: list[str], group_size: int, seed: int) -> dict[str, list[list[int]]]:
        sampling = SamplingSpec(1.0, 1.0, 16, seed=seed)
        groups = worker.generate([prompt(text) for text in texts], group_size, sampling)
        return {group.prompt.uid: [sample.tokens.tolist() for sample in group.samples] for group in groups}

    whole = drawn(["3 + 4 =", "5 + 6 =", "name a prime"], 4, seed=0)
    assert len({str(tokens) for groups in whole.values() for tokens in groups}) == 12
    assert drawn(["name a prime", "3 + 4 ="], 4, seed=0) == {uid: whole[uid] for uid in ("name a prime", "3 + 4 =")}
    assert drawn(["5 + 6 ="], 2, seed=0)["5 + 6 ="] == whole["5 + 6 ="][:2]
    assert drawn(["5 + 6 ="], 4, seed=1)["5 + 6 ="] != whole["5 + 6 ="]
    crowd = [f"{i} of many prompts, together more tokens than one engine step takes" for i in range(6)]
    assert drawn([*crowd, "5 + 6 ="], 4, seed=0)["5 + 6 ="] == whole["5 + 6 ="]


def test_weights_written_to_shared_memory(worker, checkpoint):
    model = perturbed(checkpoint, seed=4)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    buckets, size = plan_buckets({name: tuple(t.shape) for name, t in tensors.items()}, torch.float32, 40_000)
    path = shared_memory.create(size)
    try:
        worker.attach_weights(path, buckets)
        data = shared_memory.attach(path)
    finally:
        path.unlink()
    worker.begin_weights(7)
    for index, slots in enumerate(buckets):
        for slot in slots:
            slot_view(data, slot).copy_(tensors[slot.name])
        worker.receive_written(index, {slot.name: checksum(tensors[slot.name]) for slot in slots})
    worker.finish_weights()
    got = torch.tensor(worker.prompt_log_probs(PROBE))
    torch.testing.assert_close(got, hf_log_probs(model, PROBE), atol=TOLERANCE, rtol=0)
    worker.begin_weights(8)
    with pytest.raises(RunFailure, match=f"{buckets[0][0].name} arrived with another checksum"):
        worker.receive_written(0, {buckets[0][0].name: 1})
    for index in range(len(buckets)):
        worker.receive_written(index, {})
    worker.finish_weights()


def test_weights_broadcast_by_four_ranks(worker, checkpoint):
    """Threads of this process, each with its boxes as at tp=2, pp=2."""
    plan = plan_packed(read_architecture(checkpoint), tp=2, pp=2, dtype=torch.float32, bucket_bytes=40_000)
    assert len(plan) > 4
    meeting, _store = open_meeting(LOOPBACK, 60)
    models = [perturbed(checkpoint, seed) for seed in (11, 12, 12, 12)]

    def send(rank: int) -> None:
        weights = {name: torch.empty_like(p) for name, p in models[0].named_parameters()}
        sources = [[box_view(weights[box.name], box.start, box.size) for box in bucket.boxes[rank]] for bucket in plan]
        sender = Sender(plan, rank, sources, join(meeting, rank, 5))
        for model in models:
            for name, tensor in model.named_parameters():
                weights[name].copy_(tensor.detach())
            sender.send()

    with ThreadPoolExecutor(4) as ranks:
        sent = [ranks.submit(send, rank) for rank in range(4)]
        worker.join_ranks(plan, meeting, 4, 5)
        drawn = []
        for version, model in zip((60, 61, 61, 62), models, strict=True):
            (sums,) = worker.take_weights(version, checksums=True)
            assert worker.ping() == version
            assert sums == {name: checksum(tensor.detach()) for name, tensor in model.named_parameters()}
            told = torch.tensor(worker.prompt_log_probs(PROBE))
            torch.testing.assert_close(told, hf_log_probs(model, PROBE), atol=TOLERANCE, rtol=0)
            groups = worker.generate([prompt("3 + 4 =")], 4, SamplingSpec(1.0, 1.0, 16))
            drawn.append([sample.tokens.tolist() for sample in samples(list(groups))])
        assert drawn[1] == drawn[2] != drawn[3], "the same version draws the same samples again"
        for rank in sent:
            rank.result()


def test_untied_odd_vocabulary_with_biases(tmp_path):
    """Qwen2's QKV biases and a vocabulary that vLLM pads."""
    checkpoint = write_tiny_model(tmp_path / "qwen2", "qwen2", tied=False, vocab=261)
    worker = RolloutWorker(EngineSpec(str(checkpoint), "fp32", CONTEXT, 0, 0.05, 0.2, 256, True, 2))
    model = perturbed(checkpoint, seed=1)
    push(worker, model, version=1)
    got = torch.tensor(worker.prompt_log_probs(PROBE))
    torch.testing.assert_close(got, hf_log_probs(model, PROBE), atol=TOLERANCE, rtol=0)


def test_incomplete_push_is_an_error(worker, checkpoint):
    with pytest.raises(RunFailure, match="lacks 1 tensors, first model.norm.weight"):
        push(worker, perturbed(checkpoint, seed=3), version=6, leave_out="model.norm.weight")


def test_sender_learns_that_the_loader_died(worker):
    """Last: the engine is of no use afterwards."""
    worker.begin_weights(7)
    buckets = list(pack_buckets([(f"no.such.tensor.{i}", torch.zeros(8)) for i in range(8)], 32))
    with pytest.raises(ValueError, match="no module or parameter named 'no'"):
        for bucket in buckets:
            worker.receive_bucket(bucket)
        worker.finish_weights()
