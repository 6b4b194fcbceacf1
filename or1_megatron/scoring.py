"""`or1 eval`: a model, a run's newest checkpoint or a recipe on benchmarks; or saved responses scored again."""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
from pyarrow import parquet

from or1_megatron.accuracy import Outcome, accuracy
from or1_megatron.architecture import read_architecture
from or1_megatron.cluster import Cluster
from or1_megatron.config import Config
from or1_megatron.convert import export
from or1_megatron.data.benchmarks import benchmark_rows
from or1_megatron.data.prompts import load_prompts, load_tokenizer, prompts_of
from or1_megatron.display import Display
from or1_megatron.errors import UserError
from or1_megatron.evaluate import answers
from or1_megatron.inputs import check_model
from or1_megatron.parallel.file_sums import published
from or1_megatron.recipe import from_tree, load, override_tree
from or1_megatron.responses import response_table
from or1_megatron.reward.preflight import check_rewards
from or1_megatron.reward.service import RewardService
from or1_megatron.sections import RewardConfig
from or1_megatron.types import Prompt
from or1_megatron.verify import prepare_place, read_rows, score_rows

LONGEST_CONTEXT = 32_768  # of a model given without a recipe (8.1); less where the model has fewer positions


def evaluate(
    target: Path,
    benchmarks: list[str],
    *,
    problems: Path | None = None,
    limit: int = 0,
    out: Path | None = None,
    overrides: list[str] | None = None,
) -> Path:
    """Prints accuracy on each benchmark (none: on evaluation.files) at each temperature; returns the response file,
    which after a failure or Ctrl-C has those that were done.

    problems: folder of the named benchmarks; None is OR1_PROBLEMS. limit: only the first so many problems of each.
    """
    if limit < 0:
        raise UserError(f"--limit {limit}: use 1 or more, or leave it out for all problems")
    with configuration(target, overrides or []) as config:
        check_model(config)
        sets = _problem_sets(config, benchmarks, problems, limit)
        out = out or Path(config.runs_dir) / f"eval-{config.name}-{time.strftime('%Y%m%d-%H%M%S')}.parquet"
        _prepare_table(out)  # before the answers, which may take hours
        tables: list[pyarrow.Table] = []
        try:
            for table in _answer_all(config, sets):
                tables.append(table)
        finally:  # what has been answered is not lost with what has not
            if tables:
                with published(out) as temporary:
                    parquet.write_table(pyarrow.concat_tables(tables), temporary)
                print(f"responses: {out}")
    return out


def _prepare_table(out: Path) -> None:
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: use .parquet")
    prepare_place("--out", out)


@contextmanager
def configuration(target: Path, overrides: list[str]) -> Iterator[Config]:
    """Of a run folder (its newest checkpoint exported for as long as this lasts), of a model directory, of a recipe."""
    if (target / "config.yaml").is_file():
        config = load(target / "config.yaml", overrides).widest()
        with tempfile.TemporaryDirectory(dir=target, prefix=".eval-") as scratch:
            model = export(target, None, Path(scratch) / "model")
            yield dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(model)))
    elif target.is_dir():
        context = min(read_architecture(target, "").max_positions, LONGEST_CONTEXT)
        tree = {"name": target.resolve().name, "model": {"path": str(target)}, "rollout": {"context_length": context}}
        yield from_tree([(str(target), tree), *map(override_tree, overrides)])
    elif target.suffix in (".yaml", ".yml"):
        yield load(target, overrides).widest()
    else:
        raise UserError(f"{target} is no model directory, run folder or recipe (.yaml)")


def _problem_sets(config: Config, benchmarks: list[str], problems: Path | None, limit: int) -> dict[str, list[Prompt]]:
    tokenizer = load_tokenizer(config.model.path, read_architecture(config.model.path))
    context, suffix = config.rollout.context_length, config.data.instruction_suffix
    if not benchmarks:
        files = config.evaluation.files
        if not files:
            raise UserError("nothing to evaluate on; use --benchmark, or name problem files in evaluation.files")
        found = load_prompts(files, tokenizer, context_length=context, instruction_suffix=suffix)
        return {"held-out": found[: limit or None]}
    folder = problems or (Path(os.environ["OR1_PROBLEMS"]) if os.environ.get("OR1_PROBLEMS") else None)
    sets = {}
    for name in benchmarks:
        rows = list(benchmark_rows(name, folder))
        if not rows:
            raise UserError(f"benchmark {name} holds no problem")
        sets[name] = prompts_of(rows[: limit or None], name, tokenizer, context)
    return sets


def _answer_all(config: Config, sets: dict[str, list[Prompt]]) -> Iterator[pyarrow.Table]:
    isolation = check_rewards(config.reward, [prompt for prompts in sets.values() for prompt in prompts])
    n = config.evaluation.num_samples
    with (
        tempfile.TemporaryDirectory(prefix="or1-eval-") as scratch,
        Display(len(sets) * len(config.evaluation.temperatures), config.name, unit="set") as display,
        RewardService(config.reward, Path(scratch)) as rewards,
    ):
        if isolation:
            display.message(isolation)
        display.phase("starting engines")
        with Cluster(config, Path(scratch), with_actor=False) as cluster:
            cluster.message, cluster.answered = display.message, display.answered
            asked = itertools.product(config.evaluation.temperatures, sets.items())
            for number, (temperature, (name, prompts)) in enumerate(asked, 1):
                display.phase(f"{name}: {len(prompts)} problems x {n} responses")
                groups = answers(config, cluster, rewards, prompts, temperature)
                table = response_table(groups, benchmark=name, temperature=float(temperature))
                for line in report_lines(table):
                    display.message(line)
                if len(groups) < len(prompts):
                    display.message(f"  {len(prompts) - len(groups)} problems left out: their check failed")
                display.done(number)
                yield table


def rescore(file: Path, config: RewardConfig, out: Path | None = None) -> None:
    """Scores the responses of a file that `or1 eval` or a run has written anew, prints the accuracy and what changed.

    out: where the same rows go with the new verdicts. Raises UserError.
    """
    rows = read_rows(file)
    table = parquet.read_table(file) if file.suffix == ".parquet" else None
    if table is None or not {"uid", "index", "length", "truncated", "verdict", "reward"} <= set(table.column_names):
        raise UserError(f"{file} is no file of `or1 eval` or of a run's rollouts/; `or1 verify` scores any responses")
    if out:
        _prepare_table(out)
    verdicts, _ = score_rows(rows, config)
    before = table["verdict"].to_pylist()
    new = {
        "verdict": [verdict.name for verdict in verdicts],
        "reward": [0.0 if verdict.failed else verdict.reward for verdict in verdicts],
    }
    for name, values in new.items():
        place = table.column_names.index(name)
        table = table.set_column(place, table.schema.field(place), pyarrow.array(values, table.schema.types[place]))
    print("\n".join(report_lines(table)))
    print(f"{sum(map(str.__ne__, before, new['verdict']))} of {len(before)} verdicts changed")
    if out:
        with published(out) as temporary:
            parquet.write_table(table, temporary)


def report_lines(table: pyarrow.Table) -> list[str]:
    """Accuracy per benchmark and temperature, as far as the table has these columns. Raises UserError."""
    kinds = [name for name in ("benchmark", "temperature", "step") if name in table.column_names]
    sets: dict[tuple, dict[tuple[str, int], list[dict]]] = {}
    seen: Counter[tuple] = Counter()
    for row in table.select([*kinds, "uid", "index", "length", "truncated", "verdict"]).to_pylist():
        labels = tuple(row[kind] for kind in kinds)
        response = labels, row["uid"], row["index"]
        # A step may deal a problem twice: two groups then, as the run counted them.
        sets.setdefault(labels, {}).setdefault((row["uid"], seen[response]), []).append(row)
        seen[response] += 1
    lines = []
    for labels, problems in sets.items():
        outcomes = [
            Outcome(
                sum(row["verdict"] == "correct" for row in rows),
                tuple(row["length"] for row in rows),
                sum(row["truncated"] for row in rows),
            )
            for rows in problems.values()
            if all(row["verdict"] != "infrastructure_error" for row in rows)
        ]
        label = ", ".join(f"{kind} {value}" for kind, value in zip(kinds, labels, strict=True))
        if not outcomes:
            lines.append(f"{label}: no problem could be checked")
            continue
        if len(sizes := {outcome.num_responses for outcome in outcomes}) > 1:
            raise UserError(f"{label}: problems have {min(sizes)} to {max(sizes)} responses; avg@n wants n of each")
        found = accuracy(outcomes)
        lines.append(f"{label}: {found.num_problems} problems x {found.num_samples} responses")
        lines += ["  " + line for line in found.lines()]
    return lines
