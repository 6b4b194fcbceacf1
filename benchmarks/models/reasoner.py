"""A small policy that reasons in steps, is right in part and sometimes does not come to an end: for studies of RL that
need hundreds of steps in minutes.

A problem is `91+4+9+8=`. The demonstrations that it is taught from add one digit a line, `91+4=95`, are wrong in a
share ERROR of these lines, and write a line again with the chance CHECK, `?91+4=95`, when it is wrong less often: as
with a language model, being right takes better steps or longer answers, samples differ all over the response, and one
in eight does not fit into RESPONSE tokens. 45 % of the demonstrations are right; after 500 lessons of 64 (two or three
minutes on two cores) a quarter of what the model samples is.

Tokens: a character each, and `\\boxed{` as one.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from or1_megatron.parallel.file_sums import publish_text

BOX = "\\boxed{"
TOKENS = ("<eos>", "<pad>", *"0123456789", "+", "=", "?", "\n", BOX, "}")
EOS, PAD = 0, 1
CONTEXT, RESPONSE = 64, 48  # tokens; the longest prompt has 9
NUM_TRAIN, NUM_HELD_OUT = 2048, 128
ERROR, CHECK_ERROR = 0.3, 0.1  # share of a demonstration's steps, and of its checks, with a wrong sum
CHECK = 0.25  # chance of another check after a step, and after a check

Problem = tuple[int, ...]


def draw(generator: random.Random) -> Problem:
    """A number below 100 and the digits to add to it."""
    return (generator.randrange(1, 100), *(generator.randrange(1, 10) for _ in range(3)))


def prompt(problem: Problem) -> str:
    return "+".join(map(str, problem)) + "=\n"


def demonstration(problem: Problem, generator: random.Random) -> str:
    """A worked answer as a teacher writes it who is not always right."""
    lines, total = [], problem[0]
    for number in problem[1:]:
        step, error = f"{total}+{number}=", ERROR
        while True:
            found = total + number
            if generator.random() < error:
                found = max(0, found + generator.choice((-10, -2, -1, 1, 2, 10)))
            lines.append(f"{'?' if error == CHECK_ERROR else ''}{step}{found}\n")
            error = CHECK_ERROR
            if generator.random() >= CHECK:
                break
        total = found
    return "".join(lines) + f"{BOX}{total}}}"


def write_problems(train: Path, held_out: Path, seed: int) -> None:
    """Two files in the field's schema, no problem twice."""
    generator = random.Random(seed)
    drawn: dict[Problem, None] = {}
    while len(drawn) < NUM_TRAIN + NUM_HELD_OUT:
        drawn[draw(generator)] = None
    problems = list(drawn)
    for path, part in ((held_out, problems[:NUM_HELD_OUT]), (train, problems[NUM_HELD_OUT:])):
        publish_text(path, "".join(json.dumps(row(problem)) + "\n" for problem in part))


def row(problem: Problem) -> dict[str, object]:
    gold = {"style": "rule", "ground_truth": str(sum(problem))}
    return {"data_source": "sums", "prompt": prompt(problem), "ability": "math", "reward_model": gold}


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<eos>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def teach(directory: Path, steps: int, seed: int = 0, batch: int = 64, lr: float = 2e-3) -> Path:
    """Writes a Llama of 0.8 million parameters, taught from demonstrations, as a checkpoint; returns `directory`."""
    torch.manual_seed(seed)
    generator, encode = random.Random(seed + 1), tokenizer()
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=CONTEXT * 2, tie_word_embeddings=True,
        bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(1, steps + 1):
        tokens, labels = zip(*(_lesson(generator, encode) for _ in range(batch)), strict=True)
        loss = model(input_ids=torch.tensor(tokens), labels=torch.tensor(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"taught {step}/{steps}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.save_pretrained(directory)
    encode.save_pretrained(directory)
    return directory


def _lesson(generator: random.Random, encode: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """CONTEXT tokens and what is to be learned at each of them: the demonstration and its end, as far as they fit."""
    problem = draw(generator)
    asked = encode(prompt(problem))["input_ids"]
    told = [*encode(demonstration(problem, generator))["input_ids"], EOS]
    room = max(0, CONTEXT - len(asked) - len(told))
    return (asked + told + [PAD] * room)[:CONTEXT], ([-100] * len(asked) + told + [-100] * room)[:CONTEXT]
