"""Problem files: good rows are read, bad ones are named by file and line; the stream is seeded and resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing

from or1_megatron.architecture import read_architecture
from or1_megatron.data.prompts import Difficulty, PromptStream, load_prompts, load_tokenizer, prompts_of
from or1_megatron.errors import UserError
from or1_megatron.types import Prompt
from tests.tiny_models import BOS, write_tiny_model

GOOD = {"data_source": "s", "prompt": "1 + 1 =", "reward_model": {"ground_truth": "2"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("m") / "model", "llama", tied=True)


@pytest.fixture(scope="module")
def tokenizer(model: Path):
    return load_tokenizer(str(model), read_architecture(model))


def write(path: Path, *rows: object) -> list[str]:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return [str(path)]


def test_strings_chats_and_several_golds(tmp_path: Path, tokenizer) -> None:
    chat = {"prompt": [{"role": "user", "content": "hi"}], "reward_model": {"ground_truth": '["1", "2"]'}}
    raw, chatted = load_prompts(
        write(tmp_path / "p.jsonl", GOOD, chat), tokenizer, context_length=64, instruction_suffix=" box it"
    )
    assert raw.text == "1 + 1 =" and raw.ground_truth == ("2",)
    assert "hi box it" in chatted.text and chatted.text.endswith("assistant: ")
    assert chatted.ground_truth == ("1", "2") and raw.uid != chatted.uid


def test_parquet_equals_jsonl(tmp_path: Path, tokenizer) -> None:
    parquet.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "p.parquet")
    (prompt,) = load_prompts([str(tmp_path / "p.parquet")], tokenizer, context_length=64)
    assert prompt.text == GOOD["prompt"] and prompt.ground_truth == ("2",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 2 is not JSON"),
        ("[1]", "line 2 is not an object: holds a list"),
        ({"prompt": "x"}, "line 2: reward_model.ground_truth=None"),
        ({"reward_model": {"ground_truth": "1"}}, "line 2: prompt='None' is neither"),
        ({"prompt": [{"role": "user", "content": None}]}, "line 2: prompt=.* is neither"),
        ({"prompt": "x", "reward_model": {"ground_truth": ""}}, "line 2: reward_model.ground_truth=''"),
        ({"prompt": "cut \ud83d", "reward_model": {"ground_truth": "1"}}, r"line 2: .*ud83d.* is half a sign"),
        ({"prompt": "x", "reward_model": {"ground_truth": "\ud83d"}}, r"line 2: .*ud83d.* is half a sign"),
        ({"prompt": "x" * 80, "reward_model": {"ground_truth": "1"}}, "line 2: the prompt has 80 tokens"),
        ({"prompt": "x" * 64, "reward_model": {"ground_truth": "1"}}, "line 2: .* leaves no room for a response"),
    ],
)
def test_bad_rows_are_named(row: object, message: str, tmp_path: Path, tokenizer) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path / "p.jsonl", GOOD, row), tokenizer, context_length=64)


def test_bad_files_are_named(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "broken.parquet").write_text("no")
    for files, message in [
        ([str(tmp_path / "none.jsonl")], "does not exist"),
        (write(tmp_path / "empty.jsonl"), "is empty"),
        (write(tmp_path / "p.csv", GOOD), "is of no known kind"),
        ([str(tmp_path / "broken.parquet")], "broken.parquet cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            load_prompts(files, tokenizer, context_length=64)


def test_files_of_one_name_are_refused(tmp_path: Path, tokenizer) -> None:
    """Their problems would have the same uids."""
    for name in ("math", "code"):
        (tmp_path / name).mkdir()
    files = [*write(tmp_path / "math" / "train.jsonl", GOOD), *write(tmp_path / "code" / "train.jsonl", GOOD)]
    with pytest.raises(UserError, match=r"math/train.jsonl and .*code/train.jsonl have the same name"):
        load_prompts(files, tokenizer, context_length=64)


def test_tokenizer_larger_than_the_model_is_refused(model: Path, tmp_path: Path) -> None:
    small = write_tiny_model(tmp_path / "small", "llama", tied=True, vocab=260)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(UserError, match="tokenizer has 259 tokens but config.json says vocab_size=200"):
        load_tokenizer(str(small), read_architecture(small))


def test_stream_deals_every_prompt_each_epoch_and_resumes() -> None:
    prompts = [Prompt(str(i), "", (i,), ("",)) for i in range(7)]
    stream = PromptStream(prompts, seed=3)
    first, second = stream.take(7), stream.take(7)
    assert sorted(p.uid for p in first) == sorted(p.uid for p in second) == [p.uid for p in prompts]
    assert first != second, "epochs differ in order"
    stream = PromptStream(prompts, seed=3)
    stream.take(10)
    resumed = PromptStream(prompts, seed=3)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.take(9) == stream.take(9)
    with pytest.raises(UserError, match="7 problems, the checkpoint was made with 8"):
        resumed.load_state_dict({"epoch": 0, "position": 0, "num_prompts": 8})


def test_what_transformers_cannot_read_may_be_config_json(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "llama", tied=True)
    architecture = read_architecture(model)
    (model / "tokenizer_config.json").unlink()  # names the tokenizer's class; without it config.json has to
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "bos_token_id": "x"}))
    with pytest.raises(UserError, match="bos_token_id.*; mend config.json if a key of it is named, else copy "):
        load_tokenizer(str(model), architecture)


def test_only_problems_of_the_wanted_difficulty(tmp_path: Path, tokenizer):
    rows = [{**GOOD, "extra_info": {"model_difficulty": {"7B": n, "32B": 0}}} for n in (0, 1, 9, 15, 16)]
    file = write(tmp_path / "p.jsonl", *rows)
    found = load_prompts(file, tokenizer, context_length=64, wanted=Difficulty("7B", 1, 15))
    assert [prompt.uid for prompt in found] == ["p.jsonl:1", "p.jsonl:2", "p.jsonl:3"]  # as without the filter
    assert [prompt.place for prompt in found] == [f"{tmp_path / 'p.jsonl'} line {line}" for line in (2, 3, 4)]
    with pytest.raises(UserError, match=r"p.jsonl has no problem of difficulty 1 to 15 for 32B"):
        load_prompts(file, tokenizer, context_length=64, wanted=Difficulty("32B", 1, 15))
    with pytest.raises(UserError, match=r"line 1: .* has no number for 1B; it has 7B, 32B"):
        load_prompts(file, tokenizer, context_length=64, wanted=Difficulty("1B", 1, 15))
    with pytest.raises(UserError, match=r"line 1: .* has no number for 7B"):
        load_prompts(write(tmp_path / "q.jsonl", GOOD), tokenizer, context_length=64, wanted=Difficulty("7B", 1, 15))


def test_a_tokenizer_as_large_as_the_model_fits(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "llama", tied=True, vocab=259)
    assert len(load_tokenizer(str(model), read_architecture(model))) == 259


def test_the_suffix_ends_the_last_message_and_the_row_stays_as_it_is(tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    row = {"prompt": messages, "reward_model": {"ground_truth": "2"}}
    before = json.dumps(row)
    for _ in range(2):
        (prompt,) = prompts_of([("here", row)], "s", tokenizer, 64, " Box it.")
        assert prompt.text == "system: Be brief.\nuser: 1 + 1? Box it.\nassistant: "
    assert json.dumps(row) == before


def test_a_list_of_numbers_is_one_answer(tokenizer) -> None:
    row = {"prompt": "Roots?", "reward_model": {"ground_truth": "[1, 2]"}}
    (prompt,) = prompts_of([("here", row)], "s", tokenizer, 64)
    assert prompt.ground_truth == ("[1, 2]",)


def test_a_prompt_has_no_tokens_but_those_of_its_text(model: Path) -> None:
    """A chat template writes what has to stand at the beginning; a tokenizer would put it there once more."""
    adding: Any = load_tokenizer(str(model), read_architecture(model))
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    assert adding.encode("1") == [BOS, ord("1")]
    (prompt,) = prompts_of([("here", {"prompt": "1", "reward_model": {"ground_truth": "2"}})], "s", adding, 64)
    assert prompt.tokens == (ord("1"),)


def test_the_seed_is_the_order() -> None:
    prompts = [Prompt(str(i), "", (i,), ("",)) for i in range(7)]
    assert len({tuple(p.uid for p in PromptStream(prompts, seed=seed).take(7)) for seed in range(10)}) > 5
