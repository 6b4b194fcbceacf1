"""From one sharding to another: which box of which parameter goes where (pure).

A layout says, for every rank and parameter, which boxes of which HF tensors lie where in it. Two layouts meet in the
HF tensors' coordinates, so `plan` is nothing but intersections of boxes: any (tp, pp) of the actor to any tp of an
engine, or of another actor. Invariant: the transfers of a plan write every element of every target parameter exactly
once, padding included.

All parameters are seen as matrices (rows, columns); a vector is one column. A place is (tensor rank, pipeline rank).

    actor   Megatron's shards, see parallel/layout.py
    engine  vLLM's: qkv_proj is [q heads of rank r; k heads; v heads], where more ranks than KV heads share a head;
            gate_up_proj is [gate piece r; up piece r]; the vocabulary is padded to a multiple of 64 and cut
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from or1_megatron.architecture import Architecture, check_degrees
from or1_megatron.errors import UserError, either
from or1_megatron.parallel.layout import Entry, entries, hf_shapes, stored_entries

Place = tuple[int, int]
Pair = tuple[int, int]  # rows, columns

ENGINE_VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class Piece:
    """A box of an HF tensor, and where it begins in the parameter that holds it. `tensor` None: zeros."""

    tensor: str | None
    start: Pair
    size: Pair
    offset: Pair


@dataclass(frozen=True)
class Shard:
    """One parameter of one rank. The pieces cover it exactly."""

    name: str
    size: Pair
    pieces: tuple[Piece, ...]


Layout = dict[Place, tuple[Shard, ...]]


@dataclass(frozen=True)
class Transfer:
    """One box to copy. `source` None: fill the target's box with zeros."""

    source: Place | None
    source_name: str
    source_start: Pair
    target: Place
    target_name: str
    target_start: Pair
    size: Pair


def actor_layout(architecture: Architecture, *, tp: int, pp: int, fused_norms: bool = False) -> Layout:
    """Every Megatron rank's parameters. Raises UserError when tp or pp does not divide the model."""
    check_degrees(architecture, tp=tp, pp=pp)
    table = entries(architecture, fused_norms=fused_norms)
    if architecture.tied and pp == 1:
        del table["output_layer.weight"]  # the embedding itself
    per_stage = architecture.num_layers // pp

    def stage(entry: Entry) -> int:
        if entry.layer is not None:
            return entry.layer // per_stage
        return 0 if entry.megatron.startswith("embedding") else pp - 1

    return {
        (rank, p): tuple(
            _shard(entry.megatron, _actor_pieces(entry, architecture, tp, rank))
            for entry in table.values()
            if stage(entry) == p
        )
        for p in range(pp)
        for rank in range(tp)
    }


def engine_layout(architecture: Architecture, *, tp: int) -> Layout:
    """Every rank's parameters of a vLLM engine, under vLLM's names. Raises UserError when tp does not fit."""
    a = architecture
    good = [t for t in range(1, a.num_heads + 1) if _engine_fits(a, t)]
    if tp not in good:
        raise UserError(
            f"an engine of tp={tp} cannot hold {a.num_heads} heads, {a.num_kv_heads} KV heads and "
            f"{a.ffn_hidden_size} FFN columns; use {either(good)}"
        )
    return {
        (rank, 0): tuple(_shard(_engine_name(entry), _engine_pieces(entry, a, tp, rank)) for entry in stored_entries(a))
        for rank in range(tp)
    }


def hf_layout(architecture: Architecture) -> Layout:
    """The whole checkpoint at one place, under its own names."""
    tensors = _matrices(architecture).items()
    return {(0, 0): tuple(_shard(name, [Piece(name, (0, 0), size, (0, 0))]) for name, size in tensors)}


def _engine_fits(a: Architecture, tp: int) -> bool:
    shares = a.num_kv_heads % tp == 0 or tp % a.num_kv_heads == 0
    return shares and a.num_heads % tp == 0 and a.ffn_hidden_size % tp == 0 and ENGINE_VOCAB_MULTIPLE % tp == 0


def _engine_name(entry: Entry) -> str:
    return entry.hf[0].replace(".q_proj.", ".qkv_proj.").replace(".gate_proj.", ".gate_up_proj.")


def _actor_pieces(entry: Entry, a: Architecture, tp: int, rank: int) -> list[Piece]:
    if entry.arrangement == "vocab":
        return _vocab_pieces(entry, a, a.padded_vocab_size(tp) // tp, rank)
    if entry.arrangement != "qkv":
        return _common_pieces(entry, a, tp, rank)
    heads = a.num_heads // a.num_kv_heads * a.head_dim
    columns, groups = _matrices(a)[entry.hf[0]][1], a.num_kv_heads // tp
    pieces, offset = [], 0
    for group in range(rank * groups, (rank + 1) * groups):
        for name, rows in zip(entry.hf, (heads, a.head_dim, a.head_dim), strict=True):
            pieces.append(Piece(name, (group * rows, 0), (rows, columns), (offset, 0)))
            offset += rows
    return pieces


def _engine_pieces(entry: Entry, a: Architecture, tp: int, rank: int) -> list[Piece]:
    if entry.arrangement == "vocab":
        padded = -(-a.vocab_size // ENGINE_VOCAB_MULTIPLE) * ENGINE_VOCAB_MULTIPLE
        return _vocab_pieces(entry, a, padded // tp, rank)
    if entry.arrangement != "qkv":
        return _common_pieces(entry, a, tp, rank)
    columns = _matrices(a)[entry.hf[0]][1]
    heads, kv_heads = a.num_heads // tp, max(1, a.num_kv_heads // tp)
    first_kv_head = rank * a.num_kv_heads // tp
    firsts, counts = (rank * heads, first_kv_head, first_kv_head), (heads, kv_heads, kv_heads)
    pieces, offset = [], 0
    for name, first, count in zip(entry.hf, firsts, counts, strict=True):
        rows = count * a.head_dim
        pieces.append(Piece(name, (first * a.head_dim, 0), (rows, columns), (offset, 0)))
        offset += rows
    return pieces


def _common_pieces(entry: Entry, a: Architecture, tp: int, rank: int) -> list[Piece]:
    """The arrangements that Megatron and vLLM share."""
    rows, columns = _matrices(a)[entry.hf[0]]
    if entry.arrangement == "replicated":
        return [Piece(entry.hf[0], (0, 0), (rows, columns), (0, 0))]
    if entry.arrangement == "row":
        width = columns // tp
        return [Piece(entry.hf[0], (0, rank * width), (rows, width), (0, 0))]
    assert entry.arrangement == "gate_up", entry
    height = rows // tp
    return [Piece(name, (rank * height, 0), (height, columns), (i * height, 0)) for i, name in enumerate(entry.hf)]


def _vocab_pieces(entry: Entry, a: Architecture, rows: int, rank: int) -> list[Piece]:
    first = rank * rows
    real = max(0, min(rows, a.vocab_size - first))
    pieces = [Piece(entry.hf[0], (first, 0), (real, a.hidden_size), (0, 0))] if real else []
    if real < rows:
        pieces.append(Piece(None, (0, 0), (rows - real, a.hidden_size), (real, 0)))
    return pieces


@lru_cache(maxsize=8)
def _matrices(a: Architecture) -> dict[str, Pair]:
    """HF name -> (rows, columns)."""
    return {name: (shape[0], prod(shape[1:])) for name, shape in hf_shapes(a).items()}


def _shard(name: str, pieces: list[Piece]) -> Shard:
    rows = max(piece.offset[0] + piece.size[0] for piece in pieces)
    return Shard(name, (rows, pieces[0].size[1]), tuple(pieces))


def plan(source: Layout, target: Layout) -> list[Transfer]:
    """The transfers that fill every target parameter, ordered by target place and parameter.

    Where several source ranks hold the same box, target tensor rank r takes it from the r-th of them, in turn.
    """
    holders: dict[str, dict[tuple[Pair, Pair], list[tuple[Place, str, Piece]]]] = {}
    for place, shards in source.items():
        for shard in shards:
            for piece in shard.pieces:
                if piece.tensor is not None:
                    boxes = holders.setdefault(piece.tensor, {})
                    boxes.setdefault((piece.start, piece.size), []).append((place, shard.name, piece))
    return [
        transfer
        for place, shards in target.items()
        for shard in shards
        for piece in shard.pieces
        for transfer in _fill(place, shard.name, piece, holders)
    ]


def _fill(place: Place, name: str, piece: Piece, holders: dict) -> Iterator[Transfer]:
    if piece.tensor is None:
        yield Transfer(None, "", (0, 0), place, name, piece.offset, piece.size)
        return
    covered = 0
    for held in holders[piece.tensor].values():
        origin, origin_name, origin_piece = held[place[0] % len(held)]
        start, size = _intersection(piece, origin_piece)
        if min(size) <= 0:
            continue
        covered += prod(size)
        yield Transfer(
            origin,
            origin_name,
            _within(start, origin_piece),
            place,
            name,
            _within(start, piece),
            size,
        )
    assert covered == prod(piece.size), (place, name, piece, covered)


def _intersection(x: Piece, y: Piece) -> tuple[Pair, Pair]:
    start = (max(x.start[0], y.start[0]), max(x.start[1], y.start[1]))
    ends = [min(x.start[i] + x.size[i], y.start[i] + y.size[i]) for i in (0, 1)]
    return start, (ends[0] - start[0], ends[1] - start[1])


def _within(start: Pair, piece: Piece) -> Pair:
    """A position of the HF tensor as a position of the parameter."""
    return piece.offset[0] + start[0] - piece.start[0], piece.offset[1] + start[1] - piece.start[1]
