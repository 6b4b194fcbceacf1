"""A checkpoint of many ranks: chunks of any number, padded rows, an optimizer's tensors, chunks that are not there."""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from or1_megatron.architecture import Architecture, read_architecture
from or1_megatron.convert import hf_to_megatron
from or1_megatron.errors import UserError
from or1_megatron.parallel.megatron_files import MegatronWeights, all_tensors
from tests.tiny_models import write_tiny_model

ROWWISE, HEAD = "decoder.layers.mlp.linear_fc2.weight", "output_layer.weight"


class Checkpoint:
    """A converted one, whose tensors can be stored in other chunks."""

    def __init__(self, root: Path):
        self.hf = write_tiny_model(root / "hf", "llama", tied=False, hidden=32, head_dim=16)
        self.path = root / "megatron"
        hf_to_megatron(self.hf, self.path)
        self.metadata: Any = pickle.loads((self.path / ".metadata").read_bytes())

    @property
    def architecture(self) -> Architecture:
        return read_architecture(self.hf)

    def store(self, key: str, size: tuple[int, ...], chunks: dict[tuple[int, ...], torch.Tensor]) -> None:
        """`chunks` by where they begin."""
        tensor = self.metadata.state_dict_metadata[key]
        (info, *_) = self.metadata.storage_data.values()
        for offsets, chunk in chunks.items():
            buffer = io.BytesIO()
            torch.save(chunk, buffer)
            with (self.path / info.relative_path).open("ab") as file:
                place = dataclasses.replace(info, offset=file.tell(), length=file.write(buffer.getvalue()))
            self.metadata.storage_data[MetadataIndex(key, torch.Size(offsets))] = place
        tensor.chunks = [ChunkStorageMetadata(torch.Size(o), chunk.shape) for o, chunk in chunks.items()]
        tensor.size = torch.Size(size)
        (self.path / ".metadata").write_bytes(pickle.dumps(self.metadata))


def test_chunks_are_put_together_and_what_is_no_weight_is_left_out(tmp_path: Path) -> None:
    made = Checkpoint(tmp_path)
    tensors, a = load_file(made.hf / "model.safetensors"), made.architecture
    halves = {
        (layer, 0, column): tensors[f"model.layers.{layer}.mlp.down_proj.weight"][None, :, column : column + 32].clone()
        for layer in range(a.num_layers)
        for column in (0, 32)
    }
    made.store(ROWWISE, (a.num_layers, 32, 64), halves)
    head = tensors["lm_head.weight"]
    padded = {(0, 0): head[:200].clone(), (200, 0): torch.cat([head[200:], torch.ones(64, 32)])}
    made.metadata.state_dict_metadata["optimizer.exp_avg"] = made.metadata.state_dict_metadata[ROWWISE]
    made.store(HEAD, (len(head) + 64, 32), padded)
    with MegatronWeights(made.path, a) as weights:
        found = {name: tensor.clone() for name, tensor in all_tensors(weights, a)}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_parameter_of_which_a_part_is_not_stored_is_refused(tmp_path: Path) -> None:
    made = Checkpoint(tmp_path)
    a = made.architecture
    made.store(ROWWISE, (a.num_layers, 32, 64), {(layer, 0, 0): torch.ones(1, 32, 32) for layer in range(a.num_layers)})
    with MegatronWeights(made.path, a) as weights, pytest.raises(UserError, match=r"linear_fc2.weight is stored only"):
        list(all_tensors(weights, a))
