"""The shipped recipes: the paper's tables number by number, every ablation loadable, and the plan that is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from or1_megatron import cli
from or1_megatron.architecture import read_architecture
from or1_megatron.dryrun import memory_per_rank, unfit
from or1_megatron.errors import UserError
from or1_megatron.parallel.vocab_head import _CHUNK_BYTES
from or1_megatron.profiling.paper import MODELS
from or1_megatron.recipe import load
from tests.tiny_models import write_tiny_model

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"

# steps | context | D_R | D_T | gs, and optimizer steps per training step
TABLES = {
    "or1_math_7b": ([(740, 8, 256, 128, 16), (1740, 16, 256, 128, 16), (2080, 32, 256, 128, 16),
                     (2160, 32, 128, 64, 64)], 2),
    "or1_7b": ([(660, 16, 256, 256, 16), (1320, 32, 160, 160, 32)], 1),
    "or1_32b": ([(760, 16, 256, 256, 16), (1130, 24, 160, 160, 32)], 1),
}  # fmt: skip
# N_SGD, D_R, D_T, N_reuse, gs of section 4
SGD = {
    "baseline": (1, 64, 64, 1, 16), "sgd_2_64_32_1": (2, 64, 32, 1, 16), "sgd_4_64_16_1": (4, 64, 16, 1, 16),
    "sgd_2_64_64_2": (2, 64, 64, 2, 16), "sgd_4_64_64_4": (4, 64, 64, 4, 16), "sgd_4_256_64_1": (4, 256, 64, 1, 16),
    "rollout_batch_32": (1, 32, 32, 1, 16), "rollout_batch_16": (1, 16, 16, 1, 16), "group_4": (1, 64, 64, 1, 4),
    "group_8": (1, 64, 64, 1, 8), "mask_before": (2, 256, 128, 1, 16),
    "clip_higher_0.28": (4, 64, 16, 1, 16),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_stage_tables_are_the_papers(name: str):
    table, sgd_steps = TABLES[name]
    config = load(RECIPES / f"{name}.yaml")
    found = [
        (row.until, s.rollout.context_length // 1024, s.rollout.rollout_batch_size, s.mini_batch_size,
         s.rollout.group_size)
        for row, s in zip(config.stages, config.all_stages(), strict=True)
    ]  # fmt: skip
    assert found == table and config.steps == table[-1][0]
    assert {stage.num_sgd_steps for stage in config.all_stages()} == {sgd_steps}
    assert all(stage.rollout.context_length % 1024 == 0 for stage in config.all_stages())
    assert (config.optimizer.lr, config.loss.clip_low, config.loss.clip_high) == (1e-6, 0.2, 0.2)
    assert (config.optimizer.weight_decay, config.optimizer.clip_grad) == (0.01, 1.0)
    assert (config.entropy.rule, config.entropy.target, config.entropy.delta) == ("paper", 0.2, 0.005)
    assert config.rollout.temperature == 1.0 and config.loss.rejection and config.loss.kl_coefficient == 0
    assert (config.loss.surrogate, config.loss.mean_over, config.loss.advantage_mask) == ("clip", "tokens", "none")
    assert config.reward.truncated == "zero"


@pytest.mark.parametrize("name", TABLES)
def test_every_stage_fits_a_gpu_of_80_gb(name: str):
    for stage in load(RECIPES / f"{name}.yaml").all_stages():
        assert unfit(stage, MODELS[Path(stage.model.path).name]) == ""


@pytest.mark.parametrize("name", SGD)
def test_section_4_settings(name: str):
    config = load(RECIPES / "ablations" / f"{name}.yaml")
    rollout = config.rollout
    assert SGD[name] == (
        config.num_sgd_steps, rollout.rollout_batch_size, config.mini_batch_size, config.loss.num_reuse,
        rollout.group_size,
    )  # fmt: skip
    assert config.entropy.rule == "off" and not config.stages and config.optimizer.lr == 1e-6
    assert rollout.context_length == (8192 if name.startswith("mask") else 16384)


def test_every_ablation_loads_and_differs_from_all_others():
    files = sorted((RECIPES / "ablations").glob("*.yaml"))
    assert len(files) >= 25
    loaded = {path.stem: load(path) for path in files}
    assert all(config.name == stem for stem, config in loaded.items())
    bare = [repr(config).replace(f"name={stem!r}", "") for stem, config in loaded.items()]
    assert len(set(bare)) == len(bare)
    coefficients = sorted(c.entropy.initial for c in loaded.values() if c.entropy.rule == "fixed")
    assert coefficients == [1e-4, 5e-4, 1e-3, 5e-3, 1e-2]
    assert [loaded[f"clip_higher_{v}"].loss.clip_high for v in ("0.25", "0.265", "0.28")] == [0.25, 0.265, 0.28]
    assert [loaded[f"mask_{m}"].loss.advantage_mask for m in ("none", "before", "after")] == ["none", "before", "after"]
    assert loaded["temperature_0.6"].rollout.temperature == 0.6 and loaded["kl_1e-3"].loss.kl_coefficient == 1e-3
    released = loaded["released_entropy"].entropy
    assert (released.rule, released.signal, released.delta, released.max) == ("released", "sampled", 1e-4, 0.005)


def test_a_key_that_comes_twice_is_refused(tmp_path: Path):
    (tmp_path / "twice.yaml").write_text("optimizer: {lr: 1}\nsteps: 3\noptimizer:\n  clip_grad: 1\n")
    with pytest.raises(UserError, match="optimizer comes twice, in lines 1 and 3; join them"):
        load(tmp_path / "twice.yaml")
    with pytest.raises(UserError, match="is a folder; give a YAML file$"):
        load(tmp_path)


def test_a_mapping_as_key_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "braces.yaml").write_text("model:\n  path: {{here}}\n")
    with pytest.raises(UserError, match="braces.yaml is not valid YAML: .*unhashable key"):
        load(tmp_path / "braces.yaml")


def test_a_recipe_may_join_several_mappings(tmp_path: Path):
    text = "rollout:\n  <<: {group_size: 8}\n  <<: {context_length: 64}\nmodel: {path: /m}\nsteps: 3\n"
    (tmp_path / "joined.yaml").write_text(text)
    config = load(tmp_path / "joined.yaml")
    assert (config.rollout.group_size, config.rollout.context_length) == (8, 64)


def test_a_recipe_goes_over_what_it_inherits(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("model: {path: /m}\nrollout: {group_size: 4, context_length: 64}\nsteps: 3\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.yaml").write_text("inherits: ../base.yaml\nrollout: {group_size: 8}\n")
    config = load(tmp_path / "sub" / "own.yaml", ["steps=5"])
    assert (config.rollout.group_size, config.rollout.context_length, config.steps) == (8, 64, 5)
    (tmp_path / "base.yaml").write_text("inherits: sub/own.yaml\n")
    with pytest.raises(UserError, match="inherits from itself"):
        load(tmp_path / "sub" / "own.yaml")
    (tmp_path / "lost.yaml").write_text("inherits: none.yaml\n")
    with pytest.raises(UserError, match="none.yaml does not exist"):
        load(tmp_path / "lost.yaml")


def test_the_plan_is_printed_and_nothing_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["train", str(RECIPES / "or1_math_7b.yaml"), "--dry-run", f"runs_dir={tmp_path / 'runs'}"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["4", "2080-2160", "32768", "128", "64", "64", "2", "1.0", "32768", "8192", "2.147e+10"] in rows
    assert "32 ranks = tp 2 x pp 1 x cp 2 x dp 8" in out and "memory: not known" in out
    assert not (tmp_path / "runs").exists()


def test_memory_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = write_tiny_model(tmp_path / "model", "llama", tied=True)
    assert cli.main(["train", str(RECIPES / "or1_7b.yaml"), "--dry-run", f"model.path={model}"]) == 0
    assert "GiB (weights" in capsys.readouterr().out
    config = load(RECIPES / "or1_7b.yaml", [f"model.path={model}"]).widest()
    architecture = read_architecture(model)
    shard = architecture.num_parameters / 2  # tp 2
    found = memory_per_rank(config, architecture)
    assert (found["weights"], found["gradients"]) == (2 * shard, 4 * shard)
    assert found["optimizer"] == 12 * shard / 16  # dp 8, cp 2
    tokens = 32768 / 4  # over cp 2 and tp 2; two layers kept as inputs, one whole
    a = architecture
    whole = 4 * 128 + 2 * a.head_dim * (a.num_heads + a.num_kv_heads) + 3 * a.ffn_hidden_size
    assert found["activations"] == (2 * 128 + whole) * tokens * 2 + _CHUNK_BYTES["cuda"][1]
