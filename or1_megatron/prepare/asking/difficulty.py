"""Model-aware difficulty (6.2): how often a model answers each problem rightly, and dropping by it.

`difficulty` rolls out N responses a problem with the project's engines and scores them with its reward service. In
`info` it stores

    model_difficulty  {model: failed attempts of 16}   0: all right, 16: all wrong
    model_correct     {model: [right, N]}

The first is what Skywork-OR1-RL-Data publishes and `data.difficulty_model` reads. With another N it is the failed share
times 16, rounded, but 1 to 15 wherever a response was right and another wrong: 0 and 16 always mean 0/N and N/N failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from or1_megatron.data.benchmarks import INSTRUCTION
from or1_megatron.data.prompts import ATTEMPTS, Difficulty
from or1_megatron.errors import UserError
from or1_megatron.prepare.asking.model import Model, content_sum, opened, waves
from or1_megatron.prepare.ledger import Ledger
from or1_megatron.prepare.step import (
    REQUIRED,
    Context,
    Drop,
    JudgeRow,
    Row,
    RowStep,
    Step,
    Table,
    TableStep,
    check_positive,
    information,
    option,
    with_information,
)
from or1_megatron.prepare.weights import weights_sum
from or1_megatron.reward.preflight import reached_isolation
from or1_megatron.reward.problem import code_tests
from or1_megatron.reward.service import RewardService
from or1_megatron.types import Group, Prompt

Record = dict[str, Any]  # of one problem: uid, of (content_sum), verdicts {name: count}, lengths [tokens], cut


@dataclass(frozen=True)
class DifficultyOptions:
    model: str = option(REQUIRED, "model directory, run folder or recipe, as `or1 eval` takes it")
    name: str = option("", "the model's name in info; empty: the directory's, the run's or the recipe's")
    math_samples: int = option(16, "N: responses to a math problem")
    code_samples: int = option(8, "N: responses to a code problem")
    temperature: float = option(1.0, "sampling temperature")
    max_response_length: int = option(
        0, "response limit, tokens; 0: that of the run or recipe, else what the context leaves"
    )
    math_instruction: str = option(INSTRUCTION, "appended to a math problem; give the one of the training")
    code_instruction: str = option("", "appended to a code problem; give the one of the training")
    wave: int = option(
        1024, "problems that the engines are given at once; each wave waits for its longest response", in_key=False
    )
    settings: tuple[str, ...] = option((), "key=value of a run's configuration, e.g. rollout.num_engines=8")

    def __post_init__(self) -> None:
        check_positive(self, "math_samples", "code_samples", "temperature", "wave")


def estimate(table: Table, options: DifficultyOptions, context: Context) -> Iterator[Row | tuple[str, Drop]]:
    """Every row with its difficulty; dropped where a problem cannot be asked or its check failed.

    Raises UserError (model, settings, isolation of code) and RunFailure (engines or verifiers died); problems that are
    done by then are not asked again.
    """
    with opened(options.model, options.settings, context) as model:
        name = options.name or model.config.name
        made_with = {**asdict(options), "settings": list(options.settings), "seed": context.seed}
        made_with = {**made_with, "name": name, "wave": 0, "weights": _weights(options)}
        with Ledger(context.scratch / "difficulty.jsonl", made_with, context.message) as ledger:
            done = {(record["uid"], record["of"]): record for record in ledger.records}
            _ask_all(table, options, context, model, ledger, done)
        records = []
        for rows in table.batches():
            for row in rows:
                record = done.get((row["uid"], content_sum(row)))
                if record is not None:
                    records.append(record)
                    yield with_difficulty(row, name, record["verdicts"].get("correct", 0), len(record["lengths"]))
                else:
                    unchecked = Drop("check_failed", "a response could not be checked")
                    yield row["uid"], model.unasked.get(row["uid"], unchecked)
        for line in report_lines(name, records):
            context.message(line)


def ready(options: DifficultyOptions) -> None:
    """Raises UserError for a model that is not there."""
    if not Path(options.model).exists():
        raise UserError(f"model={options.model} does not exist; give a model directory, a run folder or a recipe")


def _weights(options: DifficultyOptions) -> int:
    return weights_sum(options.model, options.settings)


def _ask_all(
    table: Table,
    options: DifficultyOptions,
    context: Context,
    model: Model,
    ledger: Ledger,
    done: dict[tuple[str, int], Record],
) -> None:
    """Adds a record of every problem that can be asked and is not done."""
    from or1_megatron.collect import scored
    from or1_megatron.rollout.engine import SamplingSpec

    rollout = model.config.rollout
    sampling = SamplingSpec(
        temperature=options.temperature,
        top_p=1.0,
        max_response_length=options.max_response_length or rollout.max_response_length,
        stop=tuple(rollout.stop),
        seed=context.seed,
    )
    under_way: dict[str, int] = {}  # uid -> content_sum

    def wanted(row: Row) -> Prompt | None:
        of = content_sum(row)
        prompt = None if (row["uid"], of) in done else _prompt(model, row, options)
        if prompt is None:
            context.progress(1)
        else:
            under_way[row["uid"]] = of
        return prompt

    if done:
        context.message(f"difficulty: {len(done)} of {table.num_rows} problems were done before")
    with RewardService(model.config.reward, context.scratch / "logs") as rewards:
        for is_code, samples in ((False, options.math_samples), (True, options.code_samples)):
            mine = waves(table, options.wave, wanted, lambda row, kind=is_code: (row["ability"] == "code") == kind)
            for number, wave in enumerate(mine):
                if is_code and not number:
                    context.message(reached_isolation(model.config.reward))
                for group in scored(model.start(), rewards, wave, samples, sampling):
                    of = under_way.pop(group.prompt.uid)
                    record = _record(group, of)
                    ledger.append(record)
                    done[group.prompt.uid, of] = record
                    context.progress(1)


def _prompt(model: Model, row: Row, options: DifficultyOptions) -> Prompt | None:
    is_code = row["ability"] == "code"
    try:
        prompt = model.prompt(row, row["problem"] + (options.code_instruction if is_code else options.math_instruction))
        if prompt is not None and bool(code_tests(prompt.ground_truth, prompt.data_source)) != is_code:
            raise UserError(f"ability={row['ability']} but the answer {'has no' if is_code else 'is code'} tests")
    except UserError as error:
        model.unasked[row["uid"]] = Drop("no_usable_answer", str(error))
        return None
    return prompt


def _record(group: Group, of: int) -> Record:
    return {
        "uid": group.prompt.uid,
        "of": of,
        "verdicts": dict(Counter(sample.verdict for sample in group.samples)),
        "lengths": [len(sample.tokens) for sample in group.samples],
        "cut": sum(group.truncated),
    }


def with_difficulty(row: Row, name: str, right: int, samples: int) -> Row:
    """The row with this model's numbers beside those of others."""
    info = information(row)
    value = round(ATTEMPTS * (samples - right) / samples)
    if 0 < right < samples:
        value = min(max(value, 1), ATTEMPTS - 1)
    return with_information(
        row,
        model_difficulty={**info.get("model_difficulty", {}), name: value},
        model_correct={**info.get("model_correct", {}), name: [right, samples]},
    )


def report_lines(name: str, records: list[Record]) -> list[str]:
    """Verdicts of all responses, and how many problems were answered rightly how often, for each N."""
    lines = []
    for samples in sorted({len(record["lengths"]) for record in records}, reverse=True):
        mine = [record for record in records if len(record["lengths"]) == samples]
        responses = samples * len(mine)
        tokens, cut = sum(sum(record["lengths"]) for record in mine), sum(record["cut"] for record in mine)
        verdicts: Counter[str] = Counter()
        for record in mine:
            verdicts.update(record["verdicts"])
        right = Counter(record["verdicts"].get("correct", 0) for record in mine)
        lines.append(
            f"difficulty for {name}: {len(mine)} problems x {samples} responses of {tokens / responses:.0f} tokens, "
            f"{100 * cut / responses:.1f} % cut"
        )
        lines.append("  verdicts: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
        lines += [
            f"  right {number:3} of {samples}: {right[number]:6} {100 * right[number] / len(mine):5.1f} %"
            for number in range(samples + 1)
        ]
    return lines


@dataclass(frozen=True)
class KeepOptions:
    model: str = option(REQUIRED, "name of the model in info.model_difficulty")
    low: int = option(1, "least difficulty kept, failed attempts of 16; 1 drops what is always right")
    high: int = option(15, "largest difficulty kept; 15 drops what is never right")

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= ATTEMPTS:
            raise UserError(f"low={self.low}, high={self.high}; use 0 <= low <= high <= {ATTEMPTS}")


def open_keep(options: KeepOptions) -> JudgeRow:
    """The judge raises UserError at a row that `difficulty` has not seen."""
    wanted = Difficulty(options.model, options.low, options.high)

    def judge(row: Row) -> Row | Drop:
        info = information(row)
        if wanted.holds(f"keep_difficulty: {row['uid']}", {"extra_info": info}):
            return row
        value = info["model_difficulty"][options.model]
        bound = "too_easy" if value < options.low else "too_hard"
        reason = {0: "always_right", ATTEMPTS: "never_right"}.get(value, bound)
        return Drop(reason, f"{value} of {ATTEMPTS} failed")

    return judge


STEPS: tuple[Step, ...] = (
    TableStep("difficulty", DifficultyOptions, estimate, ready=ready, depends_on=_weights),
    RowStep("keep_difficulty", KeepOptions, open_keep),
)
