"""HF or converted checkpoint directory -> Megatron GPTModel with its weights, for this rank's shard and stage."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from or1_megatron.actor.attention import PackedAttention, RMSNorm, SwiGLU
from or1_megatron.actor.converted import load_converted
from or1_megatron.actor.mesh import Mesh
from or1_megatron.architecture import Architecture
from or1_megatron.config import Config
from or1_megatron.parallel.context import Part
from or1_megatron.parallel.device import (
    device,
    has_cuda,
    has_fused_weight_gradients,
    make_deterministic,
    use_transformer_engine,
)
from or1_megatron.parallel.hf_files import HFWeights
from or1_megatron.parallel.layout import Entry, entries, shard_into
from or1_megatron.parallel.megatron_files import is_megatron
from or1_megatron.parallel.weight_gradients import lookup
from or1_megatron.types import MicroBatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    config: Config, architecture: Architecture, softmax_scale: float, *, transformer_engine: bool
) -> TransformerConfig:
    """Megatron's configuration of the decoder."""
    a, tp, pp = architecture, config.parallel.tp, config.parallel.pp
    full = config.model.recompute == "full"
    return TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_hidden_size,
        num_attention_heads=a.num_heads,
        num_query_groups=a.num_kv_heads,
        kv_channels=a.head_dim,
        softmax_scale=softmax_scale,
        normalization="RMSNorm",
        layernorm_epsilon=a.norm_eps,
        qk_layernorm=a.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=config.parallel.cp,
        sequence_parallel=tp > 1,
        params_dtype=DTYPES[config.model.dtype],
        pipeline_dtype=DTYPES[config.model.dtype],
        bf16=config.model.dtype == "bf16",
        # Megatron refuses variable lengths for dense models unless this MoE setting, otherwise unused, is set.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        # Weights come from the checkpoint. perform_initialization=False would also skip marking the sharded
        # parameters, and the gradient norm would then count one tensor rank's shard only.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        gradient_accumulation_fusion=has_fused_weight_gradients(),
        masked_softmax_fusion=False,
        # Of the torch implementation: takes the activation from the layer spec, which is one kernel.
        use_te_activation_func=not transformer_engine,
        bias_activation_fusion=transformer_engine,
        bias_dropout_fusion=has_cuda(),
        apply_rope_fusion=False,
        deterministic_mode=config.model.deterministic,
        recompute_granularity=None if config.model.recompute == "none" else config.model.recompute,  # type: ignore[arg-type]
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
    )


def _leave_as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def build_model(config: Config, architecture: Architecture, mesh: Mesh) -> GPTModel:
    """GPTModel of this rank's stage and shard, weights loaded, on this process's device."""
    if config.model.deterministic:
        make_deterministic()
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(config.model.path))  # type: ignore[arg-type]
    # yarn scales cos and sin by a factor f: the scores, a product of two rotated vectors, by f^2.
    scale = float(rotary.attention_scaling) ** 2 * architecture.head_dim**-0.5
    fused_norms = use_transformer_engine(config.model.transformer_impl, config.model.dtype)
    settings = transformer_config(config, architecture, scale, transformer_engine=fused_norms)
    model = GPTModel(
        config=settings,
        transformer_layer_spec=_layer_spec(settings, mesh, fused_norms),  # type: ignore[arg-type]
        vocab_size=architecture.padded_vocab_size(config.parallel.tp),
        max_sequence_length=config.rollout.context_length,
        pre_process=mesh.first_stage,
        post_process=mesh.last_stage,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope" if fused_norms else "none",  # PackedAttention has its own
    )
    # No buffer: bf16 models turn their buffers into bf16, and positions with them.
    frequencies_C = rotary.inv_freq.data.to(device(), torch.float32)
    if fused_norms:
        model.rotary_pos_emb.inv_freq = frequencies_C
    model.rope_frequencies_C = frequencies_C  # type: ignore[assignment]
    if mesh.first_stage:
        _add_embedding_gradients_in_place(model)
    path = Path(config.model.path)
    if is_megatron(path):
        load_converted(model, path)
    else:
        load_hf_weights(model, architecture, path, mesh, fused_norms=fused_norms)
    return model.to(device())


def _layer_spec(
    settings: TransformerConfig, mesh: Mesh, transformer_engine: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=settings.qk_layernorm)
    spec = get_gpt_layer_local_spec(qk_layernorm=settings.qk_layernorm, normalization="RMSNorm")
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    mlp = layer.mlp.keywords["submodules"] if isinstance(layer.mlp, partial) else layer.mlp.submodules  # since 0.19
    mlp.activation_func = SwiGLU
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if settings.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(settings, None, mesh.coordinates.pp)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)  # type: ignore[arg-type]


def named_entries(
    model: torch.nn.Module, architecture: Architecture, *, fused_norms: bool
) -> Iterator[tuple[torch.nn.Parameter, Entry]]:
    """This rank's parameters with their layout entries, in the model's order (equal on all tensor ranks)."""
    table = entries(architecture, fused_norms=fused_norms)
    offsets = {
        f"decoder.layers.{i}.": f"decoder.layers.{layer.layer_number - 1}."
        for i, layer in enumerate(m for m in model.modules() if isinstance(m, TransformerLayer))
    }
    for name, parameter in model.named_parameters():
        local = ".".join(name.split(".")[:3]) + "."
        yield parameter, table[name.replace(local, offsets.get(local, local), 1)]


def load_hf_weights(
    model: torch.nn.Module, architecture: Architecture, path: Path, mesh: Mesh, *, fused_norms: bool
) -> None:
    """Copies this rank's slices out of the memory-mapped checkpoint into the parameters."""
    with HFWeights(path, architecture) as weights, torch.no_grad():
        for parameter, entry in named_entries(model, architecture, fused_norms=fused_norms):
            shard_into(parameter, entry, weights.read, architecture, tp=mesh.dims.tp, rank=mesh.coordinates.tp)


def hand_hidden_states_through(model: GPTModel) -> None:
    """The output layer keeps its weight and returns its input: the fused head (parallel/vocab_head.py) applies it."""
    layer: Any = model.output_layer
    layer.forward = lambda hidden, **_: (hidden, None)


def _add_embedding_gradients_in_place(model: GPTModel) -> None:
    """The embedding adds to the rows of main_grad that it looked up, once DistributedDataParallel has made one."""
    layer: Any = model.embedding.word_embeddings

    def forward(ids_1T: torch.Tensor) -> torch.Tensor:
        main_grad = getattr(layer.weight, "main_grad", None)
        rows_1TH = lookup(layer.weight, main_grad, ids_1T - layer.vocab_start_index)
        if layer.reduce_scatter_embeddings:
            rows_T1H = rows_1TH.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(rows_T1H, group=layer.tp_group)
        return reduce_from_tensor_model_parallel_region(rows_1TH, group=layer.tp_group)

    layer.forward = forward


def head_inputs(
    model: GPTModel, hidden_1tH: torch.Tensor, rows_R: torch.Tensor, mesh: Mesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """([R, H] hidden states of these tokens on every tensor rank, [V, H] weight of the head). With sequence parallel
    the ranks hold a stretch of the tokens each: gathered here, and in backward summed over the ranks and cut again."""
    hidden_tH = hidden_1tH.squeeze(0)
    if mesh.dims.tp > 1:
        hidden_tH = gather_from_sequence_parallel_region(hidden_tH, tensor_parallel_output_grad=True)
    hidden_RH = hidden_tH.index_select(0, rows_R)
    tied = model.share_embeddings_and_output_weights
    weight: Any = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return hidden_RH, weight


def packed_parameters(
    micro_batch: MicroBatch, part: Part, positions_t: torch.Tensor, model: GPTModel, max_seqlen: int
) -> PackedSeqParams:
    """Megatron's description of a packed micro-batch, of which this rank holds `part` with tokens at `positions_t`.

    `max_seqlen` sizes Megatron's RoPE table, cached by its value: one constant above any sequence and any pack, since
    Megatron reads a table as long as the pack as already unpacked. All counts are of the whole pack.
    """
    assert micro_batch.num_tokens < max_seqlen
    assert not micro_batch.continues or model.position_embedding_type == "none", (
        "TE's attention knows no shared prompts"
    )
    offsets = torch.tensor(micro_batch.cu_seqlens, dtype=torch.int32, device=device())
    packed: Any = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
    packed.part = part
    angles_tC = positions_t[:, None] * cast(torch.Tensor, model.rope_frequencies_C)
    packed.cos_tC, packed.sin_tC = angles_tC.cos(), angles_tC.sin()
    return packed
