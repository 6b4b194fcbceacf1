"""The stage table: which stage a step is in, when it ends early, what the online filter drops, and resuming inside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from or1_megatron.config import Config
from or1_megatron.data.prompts import PromptStream
from or1_megatron.errors import UserError
from or1_megatron.recipe import from_tree, load, to_yaml
from or1_megatron.rl.stages import Stages, solved
from or1_megatron.types import Prompt

TABLE = [
    {"until": 3, "context_length": 64, "rollout_batch_size": 8, "mini_batch_size": 4, "group_size": 4},
    {"until": 5, "context_length": 128},
    {"until": 9, "context_length": 256, "group_size": 16, "token_budget": 512, "temperature": 0.5},
]


def make(table: list[dict] = TABLE, **keys: object) -> Config:
    base = {
        "model": {"path": "/m"}, "steps": table[-1].get("until", 3), "stages": table,
        "rollout": {"context_length": 32, "rollout_batch_size": 2, "group_size": 2},
        "loss": {"old_log_probs": "recompute"},
    }  # fmt: skip
    return from_tree([("test", base), ("more", dict(keys))])


def test_each_stage_has_its_own_configuration():
    config = make()
    first, second, third = config.all_stages()
    assert (first.rollout.context_length, first.mini_batch_size, first.num_sgd_steps) == (64, 4, 2)
    assert (second.rollout.group_size, second.rollout.rollout_batch_size, second.num_sgd_steps) == (2, 2, 1)
    assert (third.token_budget, third.rollout.temperature, second.token_budget) == (512, 0.5, 128)
    widest = config.widest()
    assert (widest.rollout.context_length, widest.token_budget) == (256, 512)
    assert make([{"until": 4}]).all_stages()[0].rollout == make([{"until": 4}]).rollout


def test_a_table_survives_the_run_folder(tmp_path: Path):
    config = make()
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "c.yaml") == config


def test_stages_begin_after_until():
    stages = Stages(make())
    starts = []
    for step in range(1, 10):
        if stages.moves_on(step):
            starts.append((step, stages.index, stages.first_step))
        stages.record(0.1, responses=4, truncated=1)
        assert stages.lasts(step + 1) == (step + 1 not in (4, 6))
    assert starts == [(4, 1, 4), (6, 2, 6)]


def test_truncation_is_counted_per_stage():
    stages = Stages(make())
    seen = []
    for step in range(1, 6):
        stages.moves_on(step)
        seen.append(stages.record(0.0, responses=10, truncated=step))
    assert [s["stage/truncated"] for s in seen] == [1, 3, 6, 4, 9]
    assert [s["stage/responses"] for s in seen] == [10, 20, 30, 10, 20] and seen[3]["stage"] == 2


def test_a_stage_without_gain_ends_early():
    stages = Stages(make([{"until": 90, "patience": 2}, {"until": 99}]))
    rewards = [0.1, 0.2, 0.3, 0.4, 0.35, 0.35, 0.9]
    moved = []
    for step, reward in enumerate(rewards, 1):
        if stages.moves_on(step):
            moved.append(step)
        stages.record(reward, responses=1, truncated=0)
    assert moved == [7]  # .35 + .35 is not above .3 + .4


@pytest.mark.parametrize("cut", range(1, 9))
def test_resuming_inside_a_stage_changes_nothing(cut: int):
    config = make([{"until": 5, "patience": 2}, {"until": 7}, {"until": 9}])

    def run(stages: Stages, first: int, last: int) -> list:
        seen = []
        for step in range(first, last + 1):
            seen.append((stages.moves_on(step), stages.index))
            seen.append(stages.record([0.5, 0.4][step % 2], responses=3, truncated=step % 3))
        return seen

    straight = run(Stages(config), 1, 9)
    before, after = Stages(config), Stages(config)
    first = run(before, 1, cut)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert first + run(after, cut + 1, 9) == straight


def test_solved_means_always_correct():
    assert solved([("a", 4, 4), ("b", 4, 3), ("c", 4, 0), ("b", 4, 4), ("a", 2, 2)]) == {"a"}


def test_dropped_problems_are_never_dealt_again():
    prompts = [Prompt(str(i), "", (i,), ("",)) for i in range(5)]
    stream = PromptStream(prompts, seed=0)
    stream.take(3)
    stream.drop(["1", "4"])
    assert sorted({p.uid for p in stream.take(9)}) == ["0", "2", "3"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([{"until": 3}, {"until": 3}], "stage 2 ends with until=3, not after step 3"),
        ([{"until": 0}], "not after step 0"),
        ([{"until": 9, "patience": 3}], "no stage follows"),
        ([{"until": 9, "rollout_batch_size": 6, "mini_batch_size": 4}], "stage 1: loss.mini_batch_size=4 does not"),
        ([{"until": 9, "contxt": 4}], "contxt"),
        ([{"context_length": 4}], "until must be set"),
        ([{"until": 9, "token_budget": 8}], "stage 1: parallel.token_budget=8 is below"),
    ],
)
def test_a_bad_table_gets_one_line(table: list[dict], words: str):
    with pytest.raises(UserError) as error:
        make([{**row} for row in table], steps=3)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_steps_beyond_the_table_are_refused():
    with pytest.raises(UserError, match="steps=10 is above until=9"):
        make(steps=10)


def test_each_stage_has_a_patience_of_its_own():
    stages = Stages(make([{"until": 90, "patience": 2}, {"until": 95, "patience": 2}, {"until": 99}]))
    moved = []
    for step in range(1, 12):
        if stages.moves_on(step):
            moved.append(step)
        stages.record(0.5, responses=1, truncated=0)
    assert moved == [5, 9]


def test_a_state_is_not_changed_by_later_steps():
    """A checkpoint's files are written while the run goes on."""
    stages = Stages(make())
    stages.record(0.5, responses=1, truncated=0)
    state = stages.state_dict()
    before = json.dumps(state)
    stages.record(0.9, responses=1, truncated=0)
    assert json.dumps(state) == before


def test_a_resume_is_in_the_stage_that_was_running_or_in_the_last_that_is_left():
    before, after, shorter = Stages(make()), Stages(make()), Stages(make(TABLE[:2]))
    for step in range(1, 8):
        before.moves_on(step)
    after.load_state_dict(before.state_dict())
    assert after.describe() == before.describe() and after.describe().startswith("stage 3 of 3 from step 6: ")
    shorter.load_state_dict(before.state_dict())
    assert shorter.describe().startswith("stage 2 of 2 ")
