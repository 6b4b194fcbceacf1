"""Reading config.json: what is supported is read, what is not is refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from or1_megatron.architecture import Architecture, check_degrees, parse_architecture, read_architecture
from or1_megatron.errors import UserError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def parse(**changes: Any) -> Architecture:
    return parse_architecture({**LLAMA, **changes}, "config.json")


def test_smollm2_has_its_size() -> None:
    a = parse()
    assert (a.head_dim, a.qkv_bias, a.qk_norm, a.tied) == (64, False, False, True)
    assert a.num_parameters == 134_515_008


def test_families_differ_where_they_should() -> None:
    assert parse(model_type="qwen2").qkv_bias
    assert parse(model_type="qwen3", head_dim=128).qk_norm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; known families: llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"clip_qkv": 8}, "clip_qkv=8 is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_unsupported_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "config.json: hidden_size=null must be a whole number above 0"),
        ({"num_hidden_layers": "30"}, 'config.json: num_hidden_layers="30" must be a whole number above 0'),
        ({"num_hidden_layers": True}, "config.json: num_hidden_layers=true must be a whole number above 0"),
        ({"num_hidden_layers": 2.0}, "config.json: num_hidden_layers=2.0 must be a whole number above 0"),
        ({"vocab_size": -1}, "config.json: vocab_size=-1 must be a whole number above 0"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads=0 must be a whole number above 0"),
        ({"head_dim": 0}, "config.json: head_dim=0 must be a whole number above 0"),
        ({"num_key_value_heads": 0}, "config.json: num_key_value_heads=0 must be a whole number above 0"),
        ({"num_key_value_heads": 2}, "config.json: num_key_value_heads=2 must divide num_attention_heads=9"),
        ({"hidden_size": 577}, "num_attention_heads=9 must divide hidden_size=577, or give head_dim"),
        ({"rms_norm_eps": "x"}, 'config.json: rms_norm_eps="x" must be a number above 0'),
        ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps=NaN must be a number above 0"),
        ({"rms_norm_eps": None}, "config.json: rms_norm_eps=null must be a number above 0"),
        ({"rope_theta": -1}, "config.json: rope_theta=-1 must be a number above 0"),
        ({"rope_scaling": [4]}, "config.json: rope_scaling=[4] must be a mapping, or null"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, 'rope_scaling: factor="4" must be a number above 0'),
        ({"rope_parameters": {"rope_theta": 0}}, "config.json: rope_parameters: rope_theta=0 must be a number above 0"),
        ({"tie_word_embeddings": "no"}, 'config.json: tie_word_embeddings="no" must be true or false'),
        ({"attention_bias": 1}, "config.json: attention_bias=1 must be true or false"),
        ({"dtype": "foo"}, "config.json: dtype='foo' is not known; it must be one of float32, bfloat16"),
        ({"torch_dtype": 16}, "config.json: torch_dtype=16 is not known"),
        ({"layer_types": 3}, "config.json: layer_types=3 is not supported"),
        ({"model_type": ["llama"]}, "config.json: model_type=['llama'] is not supported"),
    ],
)
def test_values_of_a_wrong_kind_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse(**changes)


def test_a_file_that_holds_no_mapping_is_named(tmp_path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="config.json holds a list; it must be a mapping of keys to values"):
        read_architecture(tmp_path)


def test_null_stands_for_the_default() -> None:
    assert parse() == parse(
        head_dim=None, rope_theta=None, rope_scaling=None, rope_parameters=None, dtype=None, attention_bias=None,
        layer_types=None,
    )  # fmt: skip
    assert parse(num_key_value_heads=None).num_kv_heads == parse().num_heads
    assert parse(head_dim=128, hidden_size=577).head_dim == 128


def test_missing_and_corrupt_files_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="^model.path=.*none does not exist; give a model directory"):
        read_architecture(tmp_path / "none")
    with pytest.raises(UserError, match="no config.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="^--hf .*config.json is a file; give a model directory"):
        read_architecture(tmp_path / "config.json", "--hf ")
    with pytest.raises(UserError, match="not valid JSON"):
        read_architecture(tmp_path)


def test_degrees_that_do_not_divide_name_those_that_do() -> None:
    with pytest.raises(UserError, match="tp=2 does not divide the model's 9 attention heads; use 1 or 3"):
        check_degrees(parse(), tp=2, pp=1)
    with pytest.raises(UserError, match="pp=4 does not divide the model's 30 layers; use 1, 2, 3, 5"):
        check_degrees(parse(), tp=1, pp=4)
    check_degrees(parse(), tp=3, pp=5)


def test_padded_vocabulary_is_a_multiple_of_128_and_tp() -> None:
    assert parse(vocab_size=151_665).padded_vocab_size(4) == 151_680
    assert parse(vocab_size=100).padded_vocab_size(3) == 384
