"""config.json of models of Qwen2.5's shapes, for random weights."""

from __future__ import annotations

from typing import Any


def qwen2_config(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


QWEN_1_5B = qwen2_config(1536, 8960, 28, 12, 2, 151_936, tied=True)


def qwen_7b(layers: int = 28) -> dict[str, Any]:
    return qwen2_config(3584, 18_944, layers, 28, 4, 152_064, tied=False)
