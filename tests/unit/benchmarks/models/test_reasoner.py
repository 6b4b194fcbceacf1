"""The taught policy: demonstrations that are partly right and partly too long, tokens that read back, and a checkpoint
that transformers and the engine's own checks take."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import reasoner
from or1_megatron.architecture import read_architecture
from or1_megatron.data.prompts import load_prompts, load_tokenizer


def test_demonstrations_are_as_the_docstring_says():
    generator, encode = random.Random(0), reasoner.tokenizer()
    right = cut = checked = 0
    for _ in range(2000):
        problem = reasoner.draw(generator)
        text = reasoner.demonstration(problem, generator)
        tokens = encode(text)["input_ids"]
        assert encode.decode(tokens) == text and reasoner.PAD not in tokens
        assert len(encode(reasoner.prompt(problem))["input_ids"]) + reasoner.RESPONSE <= reasoner.CONTEXT
        right += text.endswith(f"{reasoner.BOX}{sum(problem)}}}")
        cut += len(tokens) + 1 > reasoner.RESPONSE
        checked += "?" in text
    assert 0.4 < right / 2000 < 0.5 and 0.1 < cut / 2000 < 0.15 and 0.5 < checked / 2000 < 0.65


def test_problems_of_the_files_differ(tmp_path: Path):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    reasoner.write_problems(train, held_out, seed=0)
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (train, held_out)]
    assert [len(part) for part in rows] == [reasoner.NUM_TRAIN, reasoner.NUM_HELD_OUT]
    assert len({row["prompt"] for part in rows for row in part}) == reasoner.NUM_TRAIN + reasoner.NUM_HELD_OUT
    first = rows[0][0]
    assert sum(map(int, first["prompt"].strip("=\n").split("+"))) == int(first["reward_model"]["ground_truth"])


def test_teaching_lowers_the_loss_and_leaves_a_checkpoint(tmp_path: Path, capsys):
    path = reasoner.teach(tmp_path / "model", steps=50, batch=8)
    said = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert said[-1] < 2.5  # ln 18 = 2.89 is what guessing has
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert torch.isfinite(model(torch.tensor([tokenizer("1+2+3+4=\n")["input_ids"]])).logits).all()
    reasoner.write_problems(tmp_path / "train.jsonl", tmp_path / "held_out.jsonl", seed=0)
    architecture = read_architecture(path)
    prompts = load_prompts(
        [str(tmp_path / "held_out.jsonl")], load_tokenizer(str(path), architecture), context_length=reasoner.CONTEXT
    )
    assert len(prompts) == reasoner.NUM_HELD_OUT
