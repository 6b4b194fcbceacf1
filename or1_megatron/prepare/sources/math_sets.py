"""Adapters of the mathematical sets, and of the field's own training schema."""

from __future__ import annotations

import json
import re
from typing import Any

from or1_megatron.prepare.sources.schemas import (
    Form,
    Problem,
    Schema,
    answer_of,
    known,
    solution_of,
    text_of,
    without_instruction,
)
from or1_megatron.prepare.step import Unusable
from or1_megatron.reward.math import extract_answer

_NO_ANSWER = frozenset({"proof", "notfound", "not found"})


def _numinamath(row: dict[str, Any]) -> Problem:
    answer = answer_of(row, "answer", _NO_ANSWER)
    info = known(row, "question_type", "problem_type", "problem_is_valid", "solution_is_valid", "synthetic")
    return Problem(text_of(row, "problem"), answer, solution_of(row), info=info)


def _with_answer(row: dict[str, Any]) -> Problem:
    """problem and answer, as DeepScaleR writes MATH; the rest where it is there."""
    info = known(row, "type", "subject", "level", "difficulty", "domain", "source")
    return Problem(
        text_of(row, "problem"),
        answer_of(row, "answer"),
        solution_of(row),
        identity=str(row.get("unique_id") or ""),
        info=info,
    )


def _boxed_solution(row: dict[str, Any]) -> Problem:
    """MATH as its authors published it: the answer is what the solution puts in a box."""
    solution = solution_of(row)
    answer = extract_answer(solution)
    if not answer:
        raise Unusable("no_answer", "nothing in a box in solution")
    return Problem(text_of(row, "problem"), answer, solution, info=known(row, "type", "level"))


def _question_and_answer(row: dict[str, Any]) -> Problem:
    return Problem(text_of(row, "question"), answer_of(row, "answer"), solution_of(row))


def _gsm8k(row: dict[str, Any]) -> Problem:
    solution = solution_of(row, "answer")
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise Unusable("no_answer", "nothing behind #### in answer")
    return Problem(text_of(row, "question"), answer.strip(), solution)


def _aime(row: dict[str, Any]) -> Problem:
    numbers = [row.get(name) for name in ("year", "aime_number", "problem_number")]
    return Problem(
        text_of(row, "problem"),
        answer_of(row, "answer"),
        solution_of(row),
        identity="/".join(map(str, numbers)) if None not in numbers else "",
        info=known(row, "year", "aime_number", "problem_number", "difficulty"),
    )


# What LeetCodeDataset and LiveCodeBench put before a problem.
_PREAMBLE = re.compile(r"\AYou are an expert Python programmer\..{0,600}?### Question:\s*", re.DOTALL)


def training_row(row: dict[str, Any]) -> Problem:
    """The field's schema: data_source, prompt, ability, reward_model.ground_truth, extra_info."""
    prompt = row["prompt"]
    if isinstance(prompt, list):
        asked = [message for message in prompt if isinstance(message, dict) and message.get("role") == "user"]
        prompt = asked[-1].get("content") if asked else None
    text = text_of({"prompt": prompt}, "prompt")
    gold = (row["reward_model"] or {}).get("ground_truth") if isinstance(row["reward_model"], dict | None) else None
    ability = "code" if str(row.get("ability") or "").lower().startswith("cod") else "math"
    info = row.get("extra_info")
    return Problem(
        without_instruction(text) if ability == "math" else _PREAMBLE.sub("", text),
        _gold(gold),
        ability=ability,
        source=str(row.get("data_source") or ""),
        info={name: value for name, value in info.items() if value is not None} if isinstance(info, dict) else {},
    )


def _gold(gold: Any) -> str:
    """The released data hold a JSON list of answers as text; several stay one."""
    if isinstance(gold, str) and gold.startswith("["):
        try:
            listed = json.loads(gold)
        except ValueError:
            listed = gold
        gold = listed if isinstance(listed, list) and all(isinstance(item, str) for item in listed) else gold
    if isinstance(gold, list):
        gold = json.dumps(gold, ensure_ascii=False) if len(gold) > 1 else (gold or [""])[0]
    return answer_of({"reward_model.ground_truth": gold}, "reward_model.ground_truth")


TRAINING = Form(("prompt", "reward_model"), ("data_source", "ability", "extra_info"), training_row)
_MATH_FIELDS = ("solution", "type", "subject", "level", "difficulty", "unique_id")

MATH_SCHEMAS = (
    Schema(
        "numinamath",
        "NuminaMath-1.5",
        (
            Form(
                ("problem", "answer", "question_type"),
                ("solution", "source", "problem_type", "problem_is_valid", "solution_is_valid", "synthetic"),
                _numinamath,
            ),
        ),
        "Apache-2.0",
        hub="AI-MO/NuminaMath-1.5:data/train-*.parquet",
        subset="source",
        named_by_subset=True,
    ),
    Schema(
        "deepscaler",
        "DeepScaleR-Preview-Dataset",
        (Form(("problem", "answer"), ("solution",), _with_answer),),
        "MIT",
        hub="agentica-org/DeepScaleR-Preview-Dataset:deepscaler.json",
    ),
    Schema(
        "still3",
        "STILL-3-Preview-RL-Data",
        (Form(("question", "answer"), ("solution",), _question_and_answer),),
        "none stated",
        hub="RUC-AIBOX/STILL-3-Preview-RL-Data",
    ),
    Schema(
        "omni_math",
        "Omni-MATH",
        (Form(("problem", "answer", "domain"), ("solution", "difficulty", "source"), _with_answer),),
        "Apache-2.0",
        hub="KbsdJames/Omni-MATH:test.jsonl",
        subset="source",
    ),
    Schema(
        "aime",
        "AIME",
        (
            Form(("problem", "answer", "year"), ("solution", "aime_number", "problem_number", "difficulty"), _aime),
            TRAINING,
        ),
        "MIT for the collection; problem statements (c) MAA",
        home="agentica-project/deepscaler; aime24, aime25: SkyworkAI/Skywork-OR1",
        subset="year",
    ),
    Schema(
        "gsm8k",
        "GSM8K",
        (Form(("question", "answer"), (), _gsm8k),),
        "MIT",
        hub="openai/gsm8k:main/train-*.parquet",
        home="openai/grade-school-math",
    ),
    Schema(
        "math",
        "MATH",
        (
            Form(("problem", "answer"), _MATH_FIELDS, _with_answer),
            Form(("problem", "solution", "level"), ("type",), _boxed_solution),
        ),
        "MIT",
        hub="EleutherAI/hendrycks_math:*/train-*.parquet",
        home="agentica-project/deepscaler",
        subset="type",
    ),
    Schema(
        "skywork_or1",
        "Skywork-OR1-RL-Data, or any file in the training schema",
        (TRAINING,),
        "Apache-2.0",
        hub="Skywork/Skywork-OR1-RL-Data:data/*.parquet",
        subset="data_source",
    ),
)
