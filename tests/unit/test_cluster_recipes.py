"""The layouts for 32 to 256 H800s: each loads, its degrees fit the model, every phase fits 80 GB, no GPU is idle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from or1_megatron import cli
from or1_megatron.architecture import check_degrees, read_architecture
from or1_megatron.dryrun import gpu_peaks, memory_per_engine, memory_per_rank, unfit
from or1_megatron.recipe import load

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "recipes" / "cluster"
LAYOUTS = sorted(FOLDER.glob("*gpu_*.yaml"))
SIZES = {  # hidden, FFN, layers, heads, KV heads of the two distilled Qwen2 models
    "7b": (3584, 18944, 28, 28, 4),
    "32b": (5120, 27648, 64, 40, 8),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shared = {
        "model_type": "qwen2", "hidden_act": "silu", "vocab_size": 152064, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000, "use_sliding_window": False,
    }  # fmt: skip
    for name, sizes in SIZES.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({**shared, **dict(zip(names, sizes, strict=True))}))
    return {name: root / name for name in SIZES}


def test_there_is_one_for_each_size_and_context() -> None:
    wanted = {f"{m}_{g}gpu_{c}k" for m in SIZES for g in (32, 64, 128, 256) for c in (8, 16, 24, 32)}
    assert {path.stem for path in LAYOUTS} == wanted


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_layout_fits(models: dict[str, Path], path: Path) -> None:
    model, gpus, context = path.stem.split("_")
    config = load(path, [f"model.path={models[model]}"])
    architecture = read_architecture(config.model.path)
    check_degrees(architecture, tp=config.parallel.tp, pp=config.parallel.pp)
    assert config.name == path.stem and config.rollout.context_length == 1024 * int(context.removesuffix("k"))
    number = int(gpus.removesuffix("gpu"))
    engines = config.rollout.num_engines * config.rollout.engine_tp
    assert config.parallel.num_ranks == engines == number, "colocated: both use every GPU"
    assert 8 % config.rollout.engine_tp == 0 == architecture.num_heads % config.rollout.engine_tp
    assert config.parallel.tp <= 8 and config.mini_batch_size * config.rollout.group_size % config.dp == 0
    assert unfit(config, architecture) == ""
    assert max(gpu_peaks(config, architecture).values()) < 0.96 * 80e9


def test_arithmetic_by_hand(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(FOLDER / "7b_32gpu_16k.yaml"), "--dry-run", f"model.path={models['7b']}"]
    assert cli.main(words) == 0
    assert "a GPU of 80 GB by phase, GB: update 31.0, rollout 70.2, push 27.5; fits" in capsys.readouterr().out
    config = load(FOLDER / "7b_32gpu_16k.yaml", [f"model.path={models['7b']}"])
    architecture = read_architecture(config.model.path)
    engine, actor = memory_per_engine(config, architecture), memory_per_rank(config, architecture)
    assert engine["weights"] == 2 * 7615616512 and engine["kv of a token"] == 2 * 28 * 4 * 128 * 2
    buffers = 2 * 2 * 3584 * 152064  # the embedding is larger than rollout.bucket_mb
    assert engine["kv cache"] == pytest.approx(0.85 * 80e9 - engine["weights"] - 2.5e9)
    assert gpu_peaks(config, architecture)["push"] == actor["weights"] + engine["weights"] + 2.5e9 + buffers


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.tp=1", "parallel.num_ranks=1", "model.recompute=none"], "update needs"),
        (["rollout.gpu_memory_utilization=0.99"], "rollout needs 81.4 of 80 GB"),
        (["rollout.gpu_memory_utilization=0.2"], "an engine has 0.0 GB for its KV cache"),
    ],
)
def test_what_does_not_fit_is_named(models: dict[str, Path], words: list[str], said: str) -> None:
    config = load(FOLDER / "7b_32gpu_16k.yaml", [f"model.path={models['7b']}", *words])
    assert unfit(config, read_architecture(config.model.path)).startswith(said)


def test_a_32b_engine_of_one_gpu_has_no_room_for_32k(models: dict[str, Path]) -> None:
    words = [f"model.path={models['32b']}", "rollout.num_engines=64", "rollout.gpu_memory_utilization=0.9"]
    config = load(FOLDER / "32b_64gpu_32k.yaml", [*words, "rollout.engine_tp=1", "rollout.placement=separate"])
    assert "one response of 32768 tokens needs 8.6" in unfit(config, read_architecture(config.model.path))
    assert unfit(load(FOLDER / "32b_64gpu_32k.yaml", words[:1]), read_architecture(config.model.path)) == ""
