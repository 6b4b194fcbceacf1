"""What an HF config.json says, as one frozen record; anything it says that we do not implement is an error.

Every key of the file is either read, or listed as having no effect on the mathematics, or required to hold the one
value we implement. An unknown key is an error, not a silent default.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from or1_megatron.errors import UserError, either, no_folder

# HF's model_type -> what the family has beyond the plain decoder; the tensors of each part are in parallel/layout.py.
FAMILIES: dict[str, frozenset[str]] = {
    "llama": frozenset(),
    "qwen2": frozenset({"qkv_bias"}),
    "qwen3": frozenset({"qk_norm"}),
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_READ = frozenset(
    "model_type architectures hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim vocab_size rms_norm_eps tie_word_embeddings max_position_embeddings rope_theta rope_scaling "
    "rope_parameters attention_bias".split()
)
_NO_EFFECT = frozenset(
    "transformers_version use_cache bos_token_id eos_token_id pad_token_id unk_token_id "
    "initializer_range is_llama_config max_window_layers sliding_window transformers.js_config attn_implementation "
    "return_dict output_hidden_states output_attentions id2label label2id problem_type chunk_size_feed_forward "
    "is_encoder_decoder".split()
)
_DTYPE_KEYS = ("dtype", "torch_dtype")
_DTYPES = ("float32", "bfloat16", "float16", "float64")  # as written; a run has its own, model.dtype
_ROPE_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "original_max_position_embeddings",
)  # fmt: skip
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "use_sliding_window": (False,),
    "rope_interleaved": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1, 1.0),
    "use_mrope": (False,),
    "quantization_config": (None,),
}


@dataclass(frozen=True)
class Architecture:
    """A dense decoder. Sizes are logical, never sharded or padded."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int
    rope_type: str

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of the embedding in Megatron: a multiple of 128 and of tp."""
        multiple = math.lcm(128, tp)
        return -(-self.vocab_size // multiple) * multiple

    @property
    def matrix_parameters_per_layer(self) -> int:
        """Weights of one layer's matrices: query, key, value, output, gate, up, down."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters, the tied head counted once."""
        layer = self.matrix_parameters_per_layer + 2 * self.hidden_size
        layer += self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * layer + self.hidden_size + embeddings

    @property
    def linear_work(self) -> float:
        """alpha of the work of one sequence, alpha * L + L^2, in units of one attention score pair.

        Per token and layer 2 * (parameters per layer) multiply-adds; per causal pair 2 * heads * head_dim of them
        forward: the ratio is (parameters per layer) / (heads * head_dim).
        """
        head = self.vocab_size * self.hidden_size / self.num_layers
        return (self.matrix_parameters_per_layer + head) / (self.num_heads * self.head_dim)


def read_architecture(model: str | Path, option: str = "model.path=") -> Architecture:
    """config.json of a model directory, which the user gave as `option`. Raises UserError: missing, corrupt or
    unsupported."""
    path = Path(model)
    if not path.is_dir():
        raise UserError(f"{option}{path} {no_folder(path)}; give a model directory")
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{option}{path} holds no config.json; give a model directory that has one")
    try:
        values = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    return parse_architecture(values, str(file))


def parse_architecture(values: Any, origin: str) -> Architecture:
    """The checked reading of what config.json holds; `origin` names it in errors. Raises UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{origin} holds a {type(values).__name__}; it must be a mapping of keys to values")
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{origin}: model_type={family!r} is not supported; known families: {', '.join(FAMILIES)}")
    _check_support(values, origin)
    numbers = _Numbers(values, origin)
    hidden, heads = numbers.whole("hidden_size"), numbers.whole("num_attention_heads")
    kv_heads = numbers.whole("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise UserError(f"{origin}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")
    if values.get("head_dim") is None and hidden % heads:
        raise UserError(f"{origin}: num_attention_heads={heads} must divide hidden_size={hidden}, or give head_dim")
    return Architecture(
        family=family,
        num_layers=numbers.whole("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=numbers.whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=numbers.whole("head_dim", default=hidden // heads),
        vocab_size=numbers.whole("vocab_size"),
        norm_eps=numbers.positive("rms_norm_eps"),
        qkv_bias=_qkv_bias(family, values, origin),
        qk_norm="qk_norm" in FAMILIES[family],
        tied=numbers.flag("tie_word_embeddings"),
        max_positions=numbers.whole("max_position_embeddings"),
        rope_type=_rope_type(values, origin),
    )


def _check_support(values: dict[str, Any], origin: str) -> None:
    for name, value in values.items():
        if name in _MUST_BE:
            if value not in _MUST_BE[name]:
                raise UserError(f"{origin}: {name}={value!r} is not supported; only {_MUST_BE[name][0]!r} is")
        elif name == "layer_types":
            kinds = value if isinstance(value, list) else [value]
            if value is not None and any(kind != "full_attention" for kind in kinds):
                raise UserError(f"{origin}: layer_types={value!r:.80} is not supported; only full_attention is")
        elif name in _DTYPE_KEYS:
            if value is not None and value not in _DTYPES:
                raise UserError(f"{origin}: {name}={value!r} is not known; it must be one of {', '.join(_DTYPES)}")
        elif name not in _READ and name not in _NO_EFFECT and not name.startswith("_"):  # _: the writer's own notes
            raise UserError(f"{origin}: {name}={value!r} is not known to this version, so its effect would be lost")


@dataclass(frozen=True)
class _Numbers:
    """Reads keys of one mapping of config.json; raises UserError naming file, key and value."""

    values: dict[str, Any]
    origin: str

    def whole(self, name: str, default: int | None = None) -> int:
        """default: what an absent key or null stands for; None: there must be a number."""
        value = self._given(name, default)
        if type(value) is not int or value < 1:
            raise UserError(f"{self.origin}: {name}={json.dumps(value):.60} must be a whole number above 0")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self._given(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{self.origin}: {name}={json.dumps(value):.60} must be a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._given(name, False)
        if not isinstance(value, bool):
            raise UserError(f"{self.origin}: {name}={json.dumps(value):.60} must be true or false")
        return value

    def _given(self, name: str, default: Any) -> Any:
        if default is None and name not in self.values:
            raise UserError(f"{self.origin}: {name} is missing")
        value = self.values.get(name)
        return default if value is None else value


def _qkv_bias(family: str, values: dict[str, Any], origin: str) -> bool:
    has_bias = "qkv_bias" in FAMILIES[family]
    if _Numbers(values, origin).flag("attention_bias") and not has_bias:
        raise UserError(f"{origin}: attention_bias=true is not supported for {family} (it would add an output bias)")
    return has_bias


def _rope_type(values: dict[str, Any], origin: str) -> str:
    _Numbers(values, origin).positive("rope_theta", default=1.0)
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(name) or {}, dict):
            raise UserError(f"{origin}: {name}={values[name]!r:.60} must be a mapping, or null")
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    scaling = values.get(name) or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UserError(f"{origin}: rope type {kind!r} is not supported; known: {', '.join(ROPE_TYPES)}")
    for number in _ROPE_NUMBERS:
        _Numbers(scaling, f"{origin}: {name}").positive(number, default=1.0)
    return kind


def check_degrees(architecture: Architecture, *, tp: int, pp: int) -> None:
    """tp must divide the heads, the KV heads and the FFN; pp the layers. Raises UserError saying which degrees do."""
    a = architecture
    sizes = {"attention heads": a.num_heads, "KV heads": a.num_kv_heads, "FFN columns": a.ffn_hidden_size}
    good = [t for t in range(1, a.num_heads + 1) if all(size % t == 0 for size in sizes.values())]
    for what, size in sizes.items():
        if size % tp:
            raise UserError(f"parallel.tp={tp} does not divide the model's {size} {what}; use {either(good)}")
    if a.num_layers % pp:
        good = [p for p in range(1, a.num_layers + 1) if a.num_layers % p == 0]
        raise UserError(f"parallel.pp={pp} does not divide the model's {a.num_layers} layers; use {either(good)}")
