"""Small random Hugging Face checkpoints with a working byte-level tokenizer, for tests that need a real model.

Every parameter that a conversion could forget (norm weights, QKV biases, q_norm, k_norm, an untied LM head) is
random, so that forgetting it changes the log-probs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

BOS, EOS, PAD = 256, 257, 258
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tiny_model(
    directory: Path,
    family: str,
    *,
    tied: bool,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 320,
    head_dim: int | None = None,
    seed: int = 0,
) -> Path:
    """Writes a float32 checkpoint of `family` (llama, qwen2 or qwen3) and its tokenizer; returns `directory`.

    `vocab` >= 259: the 256 bytes, bos, eos and pad; ids above those never come out of the tokenizer. `head_dim`
    may differ from hidden / heads in llama and qwen3 only; vLLM on a CPU needs 32 or more, as with the defaults.
    """
    assert vocab > PAD, f"vocab={vocab} cannot hold 256 bytes and three special tokens"
    config_class, model_class = FAMILIES[family]
    own_head_dim = {} if family == "qwen2" else {"head_dim": head_dim or hidden // heads}
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype="float32",
        **own_head_dim,
    )
    model = model_class(config)
    _randomise(model, seed)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Of the safetensors files in a directory."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte: every text tokenises and decodes back exactly."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={alphabet[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<pad>",  # never produced; without it Qwen2 tokenizers add a token of their own
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> list[str]:
    """Byte -> the printable character that ByteLevel stands it for (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1 + 0.2 * noise
        elif name.endswith("bias"):
            parameter.data = 0.5 * noise
        else:
            parameter.data = noise * (0.5 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5)
