"""The configuration: every key documented, every mistake one line that names place, value and fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from or1_megatron.config import Config, all_keys
from or1_megatron.errors import UserError
from or1_megatron.recipe import load, to_yaml


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {path: /models/tiny}\nrollout: {context_length: 1024}\nsteps: 7\n")
    return path


def test_defaults_recipe_and_overrides_in_this_order(recipe: Path):
    config = load(recipe, ["steps=9", "optimizer.lr=1e-5", "data.train=[a.jsonl, b.jsonl]"])
    assert config.steps == 9
    assert config.optimizer.lr == 1e-5
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    assert config.rollout.group_size == Config().rollout.group_size
    assert load(recipe).steps == 7


def test_saved_configuration_loads_back_equal(recipe: Path, tmp_path: Path):
    config = load(recipe, ["rollout.stop=['\\n', ': #']", "name='a: b'", "optimizer.lr=3e-7"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert load(saved) == config


def test_off_is_a_word_where_words_are_wanted(recipe: Path):
    config = load(recipe, ["entropy.rule=off", "loss.rejection=off", "reward.during_rollout=no"])
    assert (config.entropy.rule, config.loss.rejection, config.reward.during_rollout) == ("off", False, False)
    recipe.write_text(recipe.read_text() + "entropy: {rule: off}\nloss: {rejection: True}\n")
    assert load(recipe).entropy.rule == "off"
    assert load(recipe).loss.rejection


@pytest.mark.parametrize(
    "text",
    ["\nThink. Answer after #### at the end. ", "Answer: yes", "a\n\nb", " # no comment", "2025-02-30", "2025-02-03",
     "- a", "it's", " ", "0x_", "{x} is the answer", "\n1", "2 # of boxes", '"Final": the number', "'a' or 'b'"],
)  # fmt: skip
def test_text_is_taken_as_it_stands(recipe: Path, text: str):
    assert load(recipe, [f"data.instruction_suffix={text}"]).data.instruction_suffix == text


def test_marked_values_are_read_as_in_a_recipe(recipe: Path):
    words = ['data.instruction_suffix="\\n1"', 'rollout.stop=["}", x]', "entropy.initial=1e-3", "name='7'"]
    config = load(recipe, words)
    assert (config.data.instruction_suffix, config.rollout.stop, config.name) == ("\n1", ["}", "x"], "7")
    assert config.entropy.initial == 1e-3 and load(recipe, ["data.instruction_suffix="]).data.instruction_suffix == ""


def test_every_key_is_documented():
    keys = all_keys()
    assert len(keys) > 50
    for key in keys:
        assert key.meaning and key.meaning[-1] != ".", key.name
        assert not key.choices or key.default in key.choices, key.name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("group_size=4", "rollout.group_size"),
        ("zzzqqq=4", "lists all keys"),
        ("steps", "is not key=value"),
        ("steps=5 # five", "steps"),
        ("optimizer=3", "optimizer is a section"),
        ("steps=many", "steps"),
        ("model.path=", "model.path is empty; give a model directory"),
        ("data.train=foo.jsonl", "data.train=foo.jsonl must be a list; write data.train=[foo.jsonl]"),
        (
            "evaluation.temperatures=0.6",
            "evaluation.temperatures=0.6 must be a list; write evaluation.temperatures=[0.6]",
        ),
        ("data={train: foo.jsonl}", "data.train=foo.jsonl must be a list; write data.train=[foo.jsonl]"),
        ("data.train=null", "data.train= must be a list; write data.train=[]"),
        ("stages=3", "stages=3 must be a list; write stages=[3]"),
        ("model.dtype=fp16", "model.dtype='fp16' is not one of fp32, bf16"),
        ("steps=0", "steps=0 must be above 0"),
        ("deadline_minutes=0", "deadline_minutes=0.0 must be above 0"),
        ("max_restarts=-1", "max_restarts=-1 must be 0 or more"),
        ("evaluation.temperatures=[0,1]", "at 0 every response is the same"),
        ("stages=[{until: 5, patience: -3},{until: 999}]", "patience=-3 must be 0 or more"),
        ("model.path=${oc.env:NO_SUCH_NAME}/7b", "model.path: "),
        ("rollout.temperature=0", "rollout.temperature=0.0 must be above 0"),
        ("optimizer.weight_decay=-1", "must be 0 or more"),
        ("rollout.group_size=1", "use 2 or more"),
        ("rollout.top_p=1.5", "(0, 1]"),
        ("rollout.max_generated_factor=0.5", "at least 1"),
        ("parallel.tp=3", "does not divide parallel.num_ranks=1"),
        ("parallel.cp=2", "x parallel.cp=2 does not divide parallel.num_ranks=1"),
        ("parallel.token_budget=100", "parallel.token_budget=100 is below rollout.context_length=1024: "),
        ("parallel.token_budget=100", "use at least 1024"),
        ("loss.mini_batch_size=48", "use 1, 2, 4, 8, 16, 32 or 64"),
        ("loss.num_reuse=2", "use recompute or engine"),
        ("rollout={transport: ray, verify_weights: true}", "verify_weights=true compares nothing"),
    ],
)
def test_a_bad_override_gets_one_line(recipe: Path, override: str, words: str):
    base = ["rollout.context_length=1024", "parallel.token_budget=1024"]
    assert load(recipe, base).rollout.context_length == 1024
    with pytest.raises(UserError) as error:
        load(recipe, [*base, override])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # 1002 tokens are 1008 in chunks of 2 * cp * tp = 8, and the budget counts those.
        ({"tp": 2, "cp": 2, "token_budget": 1004}, "1008 tokens when padded to a multiple of 8"),
        ({"tp": 2, "cp": 2, "token_budget": 1004}, "use at least 1008"),
        ({"tp": 3, "token_budget": 1002}, None),
        ({"tp": 2, "cp": 2, "token_budget": 1008}, None),
        ({"cp": 1024}, "more padding than tokens"),
    ],
)
def test_the_longest_sequence_is_counted_with_its_padding(recipe: Path, overrides: dict, words: str | None):
    num_ranks = overrides.get("tp", 1) * overrides.get("cp", 1)
    settings = [f"parallel.{name}={value}" for name, value in overrides.items()]
    settings += ["rollout.context_length=1002", f"parallel.num_ranks={num_ranks}"]
    if words is None:
        config = load(recipe, settings)
        assert config.token_budget == overrides["token_budget"] >= config.longest_sequence
        return
    with pytest.raises(UserError) as error:
        load(recipe, settings)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [", "is not valid YAML"),
        ("- steps", "holds a list"),
        ("steps: 3", "model.path must be set"),
        ("model: {path: x, nme: y}", "unknown key model.nme"),
    ],
)
def test_a_bad_recipe_gets_one_line_with_its_name(tmp_path: Path, text: str, words: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(path)
    assert words in str(error.value) and "bad.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        load(tmp_path / "none.yaml")


def test_off_policy_arithmetic(recipe: Path):
    config = load(
        recipe,
        ["rollout.context_length=1024", "parallel.token_budget=1024", "rollout.rollout_batch_size=64"]
        + ["loss.mini_batch_size=16", "loss.num_reuse=2", "loss.old_log_probs=recompute"]
        + ["parallel.num_ranks=16", "parallel.tp=2", "parallel.pp=2", "parallel.cp=2"],
    )
    assert config.num_sgd_steps == 8  # 64 / 16 * 2
    assert config.dp == 2


def test_yaml_holds_every_key(recipe: Path):
    config = load(recipe)
    tree = yaml.safe_load(to_yaml(config))
    for key in all_keys():
        value = tree
        for part in key.name.split("."):
            value = value[part]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("seed=-1", "seed=-1 must be from 0 to 2147483647"),
        ("seed=2147483648", "seed=2147483648 must be from 0 to 2147483647"),
        ("optimizer.lr=.nan", "optimizer.lr=nan must be finite"),
        ("optimizer.lr=.inf", "optimizer.lr=inf must be finite"),
        ("entropy.target=.nan", "entropy.target=nan must be finite"),
        ("data.weights=[.nan]", "data.weights=[nan] must be finite"),
        ("evaluation.temperatures=[1.0, .nan]", "evaluation.temperatures=[1.0, nan] must be finite"),
        ("stages=[{until: 7, temperature: .nan}]", "stage 1: rollout.temperature=nan must be finite"),
        ("optimizer.beta1=2", "optimizer.beta1=2.0 must be in [0, 1)"),
        ("optimizer.beta2=1", "optimizer.beta2=1.0 must be in [0, 1)"),
        ("optimizer.eps=-1", "optimizer.eps=-1.0 must be 0 or more"),
        ("rollout.gpu_memory_utilization=5", "rollout.gpu_memory_utilization=5.0 must be in (0, 1]"),
        ("evaluation.top_p=0", "evaluation.top_p=0.0 must be in (0, 1]"),
        ("rollout.max_batched_tokens=0", "rollout.max_batched_tokens=0 must be above 0"),
        ("reward.max_failure_rate=7", "reward.max_failure_rate=7.0 is a share"),
        ('rollout.stop=[x, ""]', "rollout.stop=['x', ''] holds an empty string"),
    ],
)
def test_numbers_out_of_range_and_empty_stops_are_refused(recipe: Path, words: str, message: str):
    with pytest.raises(UserError) as refused:
        load(recipe, [words])
    assert message in str(refused.value) and "\n" not in str(refused.value)
