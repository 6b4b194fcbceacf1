"""The reshard plan: every target element written exactly once, with what an independent sharding puts there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from or1_megatron.architecture import Architecture
from or1_megatron.errors import UserError
from or1_megatron.parallel.layout import entries, hf_shapes, shard
from or1_megatron.parallel.reshard import Layout, Place, actor_layout, engine_layout, plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LARGEST_TP = 8


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    return Architecture(
        family=family,
        num_layers=draw(st.sampled_from([1, 2, 4, 6])),
        hidden_size=draw(st.integers(1, 7)),
        ffn_hidden_size=24 * draw(st.integers(1, 2)),
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4])),
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 300)),
        norm_eps=1e-6,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=draw(st.booleans()),
        max_positions=64,
        rope_type="default",
    )


def divisors(number: int) -> list[int]:
    return [d for d in range(1, LARGEST_TP + 1) if number % d == 0]


def engine_degrees(a: Architecture) -> list[int]:
    powers = [1, 2, 4, 8]
    return [t for t in powers if a.num_heads % t == 0 and (a.num_kv_heads % t == 0 or t % a.num_kv_heads == 0)]


def hf_tensors(a: Architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All values differ, none is zero."""
    tensors, count = {}, 0
    for name, shape in hf_shapes(a).items():
        size = int(torch.Size(shape).numel())
        bits = torch.arange(count + 1, count + size + 1, dtype=torch.int64)
        tensors[name] = bits if dtype.itemsize == 8 else bits.to(torch.int16 if dtype.itemsize == 2 else torch.int32)
        tensors[name] = tensors[name].view(dtype).view(shape)
        count += size
    return tensors


def actor_parameters(a: Architecture, tensors: dict, tp: int, pp: int) -> dict[tuple[Place, str], torch.Tensor]:
    """By `shard`, which knows nothing of boxes."""
    return {
        ((rank, p), shard_.name): shard(
            entries(a)[shard_.name], tensors.__getitem__, a, tp=tp, rank=rank
        )
        for (rank, p), shards in actor_layout(a, tp=tp, pp=pp).items()
        for shard_ in shards
    }  # fmt: skip


def engine_parameters(a: Architecture, tensors: dict, tp: int) -> dict[tuple[Place, str], torch.Tensor]:
    """As vLLM's weight loaders cut: by heads and pieces of whole HF tensors."""
    made = {}
    for rank in range(tp):
        for name, tensor in tensors.items():
            if "q_proj" in name:
                parts = [tensor.unflatten(0, (a.num_heads, -1)).chunk(tp)[rank]]
                for other in "kv":
                    heads = tensors[name.replace("q_proj", f"{other}_proj")].unflatten(0, (a.num_kv_heads, -1))
                    copies = heads.repeat_interleave(max(1, tp // a.num_kv_heads), dim=0)
                    parts.append(copies.chunk(tp)[rank])
                made[(rank, 0), name.replace("q_proj", "qkv_proj")] = torch.cat(parts).flatten(0, 1)
            elif "gate_proj" in name:
                halves = [t.chunk(tp)[rank] for t in (tensor, tensors[name.replace("gate", "up")])]
                made[(rank, 0), name.replace("gate_proj", "gate_up_proj")] = torch.cat(halves)
            elif "embed" in name or "lm_head" in name:
                rows = -(-a.vocab_size // 64) * 64
                padded = torch.cat([tensor, tensor.new_zeros(rows - a.vocab_size, a.hidden_size)])
                made[(rank, 0), name] = padded.chunk(tp)[rank]
            elif "o_proj" in name or "down_proj" in name:
                made[(rank, 0), name] = tensor.chunk(tp, dim=1)[rank]
            elif not any(part in name for part in ("k_proj", "v_proj", "up_proj")):
                made[(rank, 0), name] = tensor
    return made


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(tensor.shape[0], -1)


def check_plan(source: Layout, held: dict, target: Layout, expected: dict) -> None:
    sizes = {(place, s.name): s.size for place, shards in target.items() for s in shards}
    assert sizes.keys() == expected.keys()
    assert all(tuple(matrix(expected[key]).shape) == size for key, size in sizes.items())
    made = {key: torch.empty_like(matrix(tensor)) for key, tensor in expected.items()}
    writes = {key: torch.zeros(size, dtype=torch.int32) for key, size in sizes.items()}
    for t in plan(source, target):
        key = (t.target, t.target_name)
        box = tuple(slice(start, start + size) for start, size in zip(t.target_start, t.size, strict=True))
        writes[key][box] += 1
        if t.source is None:
            made[key][box] = 0
            continue
        origin = matrix(held[t.source, t.source_name])
        taken = origin[tuple(slice(start, start + size) for start, size in zip(t.source_start, t.size, strict=True))]
        assert tuple(taken.shape) == t.size, "outside of the source"
        made[key][box] = taken
    for key, tensor in expected.items():
        assert bool((writes[key] == 1).all()), f"{key}: not every element exactly once"
        assert torch.equal(made[key].view(torch.uint8), matrix(tensor).contiguous().view(torch.uint8)), key


@settings(max_examples=60)
@given(architectures(), st.data(), st.sampled_from(DTYPES))
def test_any_actor_fills_any_engine(a: Architecture, data: st.DataObject, dtype: torch.dtype) -> None:
    tp = data.draw(st.sampled_from(divisors(a.num_kv_heads)), "tp")
    pp = data.draw(st.sampled_from(divisors(a.num_layers)), "pp")
    engine_tp = data.draw(st.sampled_from(engine_degrees(a)), "engine tp")
    tensors = hf_tensors(a, dtype)
    check_plan(
        actor_layout(a, tp=tp, pp=pp),
        actor_parameters(a, tensors, tp, pp),
        engine_layout(a, tp=engine_tp),
        engine_parameters(a, tensors, engine_tp),
    )


@settings(max_examples=30)
@given(architectures(), st.data(), st.sampled_from(DTYPES))
def test_any_actor_fills_any_other(a: Architecture, data: st.DataObject, dtype: torch.dtype) -> None:
    degrees = [
        (data.draw(st.sampled_from(divisors(a.num_kv_heads))), data.draw(st.sampled_from(divisors(a.num_layers))))
        for _ in range(2)
    ]
    tensors = hf_tensors(a, dtype)
    layouts = [actor_layout(a, tp=tp, pp=pp) for tp, pp in degrees]
    parameters = [actor_parameters(a, tensors, tp, pp) for tp, pp in degrees]
    check_plan(layouts[0], parameters[0], layouts[1], parameters[1])


QWEN = Architecture("qwen2", 2, 12, 24, 8, 4, 2, 100, 1e-6, True, False, False, 64, "default")


def test_equal_degrees_need_no_exchange_between_ranks() -> None:
    """Every shard of a linear comes from the same tensor rank; only the vocabulary is cut elsewhere."""
    transfers = plan(actor_layout(QWEN, tp=2, pp=1), engine_layout(QWEN, tp=2))
    crossing = {t.target_name for t in transfers if t.source and t.source[0] != t.target[0]}
    assert crossing <= {"model.embed_tokens.weight", "lm_head.weight"}, crossing


def test_copies_are_taken_from_different_ranks() -> None:
    transfers = plan(actor_layout(QWEN, tp=4, pp=1), engine_layout(QWEN, tp=4))
    assert {t.source for t in transfers if t.target_name == "model.norm.weight"} == {(r, 0) for r in range(4)}


@pytest.mark.parametrize("tp", [3, 5, 16])
def test_engine_degree_that_does_not_fit(tp: int) -> None:
    with pytest.raises(UserError, match=rf"tp={tp} cannot hold 8 heads, 4 KV heads .* use 1, 2, 4 or 8"):
        engine_layout(QWEN, tp=tp)


def test_actor_degree_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"parallel.tp=8 does not divide the model's 4 KV heads"):
        actor_layout(QWEN, tp=8, pp=1)
    with pytest.raises(UserError, match=r"parallel.pp=2 does not divide the model's 3 layers"):
        actor_layout(replace(QWEN, num_layers=3), tp=1, pp=2)


def test_a_tied_head_is_a_parameter_of_the_last_stage() -> None:
    """On one stage it is the embedding itself."""
    one, two = (actor_layout(replace(QWEN, tied=True), tp=1, pp=pp) for pp in (1, 2))
    last = [{shard.name for shard in layout[0, stage]} for layout, stage in ((one, 0), (two, 1))]
    assert ["output_layer.weight" in names for names in last] == [False, True]


@pytest.mark.parametrize(("tp", "cut"), [(3, {"num_heads": 6, "num_kv_heads": 3}), (8, {"ffn_hidden_size": 20})])
def test_engine_degree_that_cuts_the_vocabulary_or_the_ffn_unevenly(tp: int, cut: dict[str, int]) -> None:
    with pytest.raises(UserError, match=rf"tp={tp} cannot hold"):
        engine_layout(replace(QWEN, **cut), tp=tp)
