"""Files of an HF checkpoint: cut where they are full, aligned, and refused with the names of what is wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from or1_megatron.architecture import Architecture, read_architecture
from or1_megatron.errors import UserError
from or1_megatron.parallel.hf_files import INDEX, HFWeights, run_all, write_hf
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("m") / "tiny", "llama", tied=True)


@pytest.fixture(scope="module")
def architecture(model: Path) -> Architecture:
    return read_architecture(model)


def written(model: Path, architecture: Architecture, out: Path, limit: int) -> list[Path]:
    out.mkdir()
    with HFWeights(model, architecture) as weights:
        write_hf(
            out,
            architecture,
            weights.dtypes,
            weights.tensors,
            max_shard_bytes=limit,
            num_threads=2,
            advance=lambda _: None,
        )
    return sorted(out.glob("*.safetensors"))


def test_a_file_is_full_at_its_limit(model: Path, architecture: Architecture, tmp_path: Path):
    total = 4 * architecture.num_parameters
    (file,) = written(model, architecture, tmp_path / "one", total)
    assert not (tmp_path / "one" / INDEX).exists()
    files = written(model, architecture, tmp_path / "two", total - 1)
    assert [path.name for path in files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert json.loads((tmp_path / "two" / INDEX).read_text())["metadata"] == {"total_size": total}
    original = load_file(model / "model.safetensors")
    for tensors in (load_file(file), load_file(files[0]) | load_file(files[1])):
        assert tensors.keys() == original.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in original.items())


def test_numbers_begin_at_a_multiple_of_eight_bytes(model: Path, architecture: Architecture, tmp_path: Path):
    """So that they are mapped, not copied."""
    for limit in (10**9, 10**5):
        for file in written(model, architecture, tmp_path / str(limit), limit):
            assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_what_is_missing_is_named_and_counted(model: Path, architecture: Architecture, tmp_path: Path):
    weights = load_file(model / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors")}))
    with pytest.raises(UserError, match=r"a.safetensors named in model.safetensors.index.json is missing"):
        HFWeights(tmp_path, architecture)
    save_file({name: weights[name] for name in sorted(weights)[7:]}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"missing: .* and 2 more$"):
        HFWeights(tmp_path, architecture)


def test_the_first_failure_ends_the_rest():
    done = []

    def work(item: int) -> None:
        if not item:
            raise UserError("disk full")
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(UserError, match="disk full"):
        run_all(work, range(100), 1)
    assert len(done) < 50
