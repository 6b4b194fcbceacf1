"""Megatron <-> HF names and shapes, declared once, invertible (pure).

One `Entry` per Megatron parameter: its name, the HF tensors it is made of and how they are arranged. `shard` cuts
the slice that tensor rank r of tp holds; `unshard` puts all slices back. Arrangements (dim 0 unless said):

    replicated  the tensor itself, on every rank
    vocab       rows padded with zeros to the padded vocabulary, then cut in tp pieces
    qkv         per KV group [its query heads; its key head; its value head], groups cut in tp pieces
    gate_up     rank r holds [gate piece r; up piece r]
    row         cut in tp pieces along dim 1 (the input dimension)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from or1_megatron.architecture import Architecture


@dataclass(frozen=True)
class Entry:
    megatron: str
    hf: tuple[str, ...]
    arrangement: str


def entries(architecture: Architecture, *, fused_norms: bool = False) -> dict[str, Entry]:
    """Megatron parameter name (global layer numbers) -> Entry.

    fused_norms: TransformerEngine's spec keeps a layer norm's weight inside the linear that follows it.
    """
    a = architecture
    attention, mlp = ("linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    norm_names = (
        (f"self_attention.{attention}", mlp) if fused_norms else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    )
    table = [Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")]
    for layer in range(a.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = tuple(f"{theirs}self_attn.{x}_proj" for x in "qkv")
        table += [
            Entry(ours + norm_names[0], (theirs + "input_layernorm.weight",), "replicated"),
            Entry(ours + "self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in qkv), "qkv"),
            Entry(ours + "self_attention.linear_proj.weight", (theirs + "self_attn.o_proj.weight",), "row"),
            Entry(ours + norm_names[1], (theirs + "post_attention_layernorm.weight",), "replicated"),
            Entry(
                ours + "mlp.linear_fc1.weight",
                (theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"),
                "gate_up",
            ),
            Entry(ours + "mlp.linear_fc2.weight", (theirs + "mlp.down_proj.weight",), "row"),
        ]
        if a.qkv_bias:
            table.append(Entry(ours + "self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in qkv), "qkv"))
        if a.qk_norm:
            for x in "qk":
                norm = Entry(
                    f"{ours}self_attention.{x}_layernorm.weight", (f"{theirs}self_attn.{x}_norm.weight",), "replicated"
                )
                table.append(norm)
    table.append(Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"))
    head = "model.embed_tokens.weight" if a.tied else "lm_head.weight"
    table.append(Entry("output_layer.weight", (head,), "vocab"))
    return {entry.megatron: entry for entry in table}


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """HF tensor name -> shape, of every tensor a checkpoint of this architecture must hold."""
    a = architecture
    q_rows, kv_rows = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_layers):
        name = f"model.layers.{layer}."
        for x, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{name}self_attn.{x}_proj.weight"] = (rows, a.hidden_size)
            if a.qkv_bias:
                shapes[f"{name}self_attn.{x}_proj.bias"] = (rows,)
        shapes[f"{name}self_attn.o_proj.weight"] = (a.hidden_size, q_rows)
        if a.qk_norm:
            shapes[f"{name}self_attn.q_norm.weight"] = shapes[f"{name}self_attn.k_norm.weight"] = (a.head_dim,)
        shapes[f"{name}mlp.gate_proj.weight"] = shapes[f"{name}mlp.up_proj.weight"] = (a.ffn_hidden_size, a.hidden_size)
        shapes[f"{name}mlp.down_proj.weight"] = (a.hidden_size, a.ffn_hidden_size)
        shapes[f"{name}input_layernorm.weight"] = shapes[f"{name}post_attention_layernorm.weight"] = (a.hidden_size,)
    shapes["model.norm.weight"] = (a.hidden_size,)
    if not a.tied:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    return shapes


def shard(
    entry: Entry, read: Callable[[str], torch.Tensor], architecture: Architecture, *, tp: int, rank: int
) -> torch.Tensor:
    """What tensor rank `rank` of `tp` holds of this parameter. `read` returns a whole HF tensor by name."""
    tensors = [read(name) for name in entry.hf]
    if entry.arrangement == "replicated":
        return tensors[0]
    if entry.arrangement == "row":
        return tensors[0].chunk(tp, dim=1)[rank]
    if entry.arrangement == "gate_up":
        return torch.cat([tensor.chunk(tp, dim=0)[rank] for tensor in tensors])
    if entry.arrangement == "vocab":
        rows = architecture.padded_vocab_size(tp) // tp
        piece = tensors[0][rank * rows : (rank + 1) * rows]
        return torch.cat([piece, piece.new_zeros(rows - len(piece), piece.shape[1])])
    assert entry.arrangement == "qkv", entry
    groups = [tensor.unflatten(0, (architecture.num_kv_heads, -1)).chunk(tp, dim=0)[rank] for tensor in tensors]
    return torch.cat(groups, dim=1).flatten(0, 1)


def unshard(entry: Entry, shards: Sequence[torch.Tensor], architecture: Architecture) -> list[tuple[str, torch.Tensor]]:
    """Inverse of `shard`: all ranks' pieces, in rank order -> (HF name, whole tensor)."""
    a = architecture
    if entry.arrangement == "replicated":
        return [(entry.hf[0], shards[0])]
    if entry.arrangement == "row":
        return [(entry.hf[0], torch.cat(list(shards), dim=1))]
    if entry.arrangement == "gate_up":
        halves = [piece.chunk(2, dim=0) for piece in shards]
        return [(name, torch.cat([pair[i] for pair in halves])) for i, name in enumerate(entry.hf)]
    whole = torch.cat(list(shards))
    if entry.arrangement == "vocab":
        return [(entry.hf[0], whole[: a.vocab_size])]
    assert entry.arrangement == "qkv", entry
    rows_per_group = a.num_heads // a.num_kv_heads * a.head_dim
    grouped = whole.unflatten(0, (a.num_kv_heads, rows_per_group + 2 * a.head_dim))
    parts = grouped.split([rows_per_group, a.head_dim, a.head_dim], dim=1)
    return [(name, part.flatten(0, 1)) for name, part in zip(entry.hf, parts, strict=True)]
