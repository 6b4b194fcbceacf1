"""What may stand behind `or1`: every subcommand's options and its help."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH = 100


class _CommandParser(argparse.ArgumentParser):
    """A subcommand's parser; its help ends with what `more_help` returns, which is called only when it is shown."""

    def __init__(self, more_help: Callable[[], str] = str, **settings: Any):
        super().__init__(**settings)
        self._more_help = more_help

    def format_help(self) -> str:
        more = self._more_help()
        return super().format_help() + ("\n" + more if more else "")


def keys_help() -> str:
    """Every configuration key with type, default, meaning and choices, by section, at most WIDTH columns wide."""
    from or1_megatron.config import all_keys

    keys = all_keys()
    name_width = max(len(key.name) for key in keys)
    type_width = max(len(key.type) for key in keys)
    defaults = {key.name: _default_text(key.default) for key in keys}
    default_width = max(len(text) for text in defaults.values())
    indent = 2 + name_width + 2 + type_width + 2 + default_width + 2
    lines = ["configuration keys: in the recipe (YAML), or as key=value behind it", ""]
    lines.append(f"  {'key':{name_width}}  {'type':{type_width}}  {'default':{default_width}}  meaning")
    section = None
    for key in keys:
        own_section = key.name.rpartition(".")[0]
        if own_section != section:
            section = own_section
            lines += ["", f"{section or 'run'}:"]
        meaning = textwrap.wrap(key.meaning, WIDTH - indent, break_on_hyphens=False)
        if key.choices:
            choices = "one of: " + ", ".join(key.choices)
            meaning += textwrap.wrap(choices, WIDTH - indent)
        head = f"  {key.name:{name_width}}  {key.type:{type_width}}  {defaults[key.name]:{default_width}}  "
        lines += [head + meaning[0], *(" " * indent + line for line in meaning[1:])]
    return "\n".join(lines) + "\n"


def _default_text(default: object) -> str:
    if default == "???":
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    return default or '""' if isinstance(default, str) else str(default)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="or1", description="Skywork-OR1 reinforcement learning on Megatron-Core, vLLM and Ray."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    train = commands.add_parser(
        "train",
        help="train from a recipe, or go on with an earlier run",
        usage="or1 train RECIPE [--dry-run] [key=value ...]\n       or1 train --resume DIR [key=value ...]",
        more_help=keys_help,
    )
    train.add_argument("--resume", metavar="DIR", type=Path, help="run folder of the run to go on with")
    train.add_argument("--dry-run", action="store_true", help="print the resolved plan and start nothing")
    train.add_argument("words", nargs="*", metavar="RECIPE | key=value", help="recipe file, then overrides")
    _add_evaluate(commands)
    _add_verify(commands)
    _add_prepare(commands)
    _add_convert(commands)
    status = commands.add_parser("status", help="where a run or a Slurm job stands")
    status.add_argument("target", metavar="JOB|RUN", help="job id or run folder")
    logs = commands.add_parser("logs", help="last lines of a run's logs")
    logs.add_argument("target", metavar="JOB|RUN", help="job id or run folder")
    logs.add_argument(
        "name",
        nargs="?",
        metavar="LOG",
        help="driver, rank0, engine0, node1, ...; default: the driver's in a Slurm job, else the first",
    )
    logs.add_argument("-n", metavar="N", type=int, default=20, dest="count", help="lines; default 20")
    _add_plan(commands)
    report = commands.add_parser(
        "report", help="a page with plots, times and advice from one run folder, or several laid over each other"
    )
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder")
    report.add_argument("--out", metavar="DIR", type=Path, help="where the files go; default: the first run folder")
    report.add_argument("--watch", action="store_true", help="serve the page on 127.0.0.1 while the run goes on")
    report.add_argument("--port", metavar="N", type=int, default=8265, help="of --watch; default 8265, 0: any free one")
    _add_data(commands)
    commands.add_parser("doctor", help="check this machine, with a fix for whatever is wrong")
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="accuracy of a model, a run or a recipe on benchmarks",
        usage="or1 eval MODEL | RUN | RECIPE [--benchmark NAME]... [--n N] [options] [key=value ...]\n"
        "       or1 eval --rescore FILE [--out FILE]",
        description="avg@n and pass@k with 95 % intervals, lengths, truncation; see docs/evaluation.md. Without "
        "--benchmark: on evaluation.files.",
    )
    evaluate.add_argument("words", nargs="*", metavar="MODEL | RUN | RECIPE", help="directory or .yaml, then key=value")
    evaluate.add_argument(
        "--benchmark", metavar="NAME", action="append", default=[],
        help="aime24, aime25, math500, gsm8k, humaneval, mbpp, leetcode, a problem file or a hub id OWNER/NAME[:FILE]; "
        "once for each",
    )  # fmt: skip
    evaluate.add_argument("--problems", metavar="DIR", type=Path, help="the benchmarks' files; default: OR1_PROBLEMS")
    evaluate.add_argument("--n", metavar="N", type=int, help="responses per problem; is evaluation.num_samples=N")
    evaluate.add_argument("--limit", metavar="N", type=int, default=0, help="only the first N problems of each")
    evaluate.add_argument("--out", metavar="FILE", type=Path, help="responses, .parquet; default: in runs_dir")
    evaluate.add_argument("--rescore", metavar="FILE", type=Path, help="score saved responses again; starts no engine")


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="score a file of responses; compare verifiers",
        description="A row (.jsonl, .json, .parquet) has response, ground_truth; optional: data_source, truncated "
        "(true or false), prompt (as the model saw it), correct (true or false), difficulty (a number or text).",
    )
    verify.add_argument("file", metavar="FILE", type=Path)
    verify.add_argument("--out", metavar="FILE", type=Path, help="verdict of each row, one JSON line each")
    verify.add_argument("--workers", metavar="N", type=int, default=2, help="verifier processes; default 2")
    verify.add_argument(
        "--require-isolation", metavar="LEVEL", default="full",
        help="least isolation for code: rlimits, partial, full (default) or namespaces",
    )  # fmt: skip
    verify.add_argument("--compare", action="store_true", help="with other verifiers (math answers), locked down")
    verify.add_argument("--install", action="store_true", help="get the packages of those that are not here")
    verify.add_argument("--peers", metavar="DIR", type=Path, help="where their packages lie; default .cache/verifiers")
    verify.add_argument("--plot", metavar="FILE", type=Path, help="the comparison as a picture (.png, .svg, .pdf)")


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="look at problems and responses")
    ways = data.add_subparsers(dest="way", required=True, metavar="look")
    look = ways.add_parser(
        "look",
        help="page through the problems of a file",
        description="A training file, a table or the dropped rows of or1 prepare, responses of or1 eval, or the "
        "rollouts of a run: .jsonl, .json or .parquet. On a terminal one a screen, by keys; else one after the other.",
    )
    look.add_argument("file", metavar="FILE", type=Path)
    look.add_argument("--source", metavar="NAME", default="", help="of this source only; * stands for any part of it")
    look.add_argument("--difficulty", metavar="LOW:HIGH", default="", help="share of right answers, 0 to 1, as 0.1:0.5")
    look.add_argument("--model", metavar="NAME", default="", help="whose share, where a row has several models'")
    look.add_argument("--verdict", metavar="VERDICT", default="", help="of a response: correct, wrong, unparsable, ...")
    look.add_argument("--reason", metavar="REASON", default="", help="why a row was dropped")
    look.add_argument("--limit", metavar="N", type=int, help="at most so many; default: 10 where there is no terminal")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="predict seconds per step, hours and memory of a recipe",
        usage="or1 plan RECIPE [--gpus 32,64,128] [--lengths ...] [--calibrate RUN] [key=value ...]\n"
        "       or1 plan --paper",
    )
    plan.add_argument("--gpus", metavar="N,N", default="", help="numbers of GPUs; default: the recipe's actor ranks")
    plan.add_argument("--hardware", default="", help="h800 (default) or h100")
    plan.add_argument("--calibrate", metavar="RUN", type=Path, help="the machine that this run folder shows instead")
    plan.add_argument("--lengths", metavar="RUN | MEDIAN,SIGMA[,SHARE]", help="of responses, measured or log-normal")
    plan.add_argument("--kept", metavar="SHARE", type=float, help="share of the groups that are informative")
    plan.add_argument("--paper", action="store_true", help="the paper's time tables against the planner, no recipe")
    plan.add_argument("words", nargs="*", metavar="RECIPE | key=value", help="recipe file, then overrides")


def _add_prepare(commands: Any) -> None:
    prepare = commands.add_parser(
        "prepare",
        help="problems of many sources -> a file to train on",
        usage="or1 prepare RECIPE [--overwrite] [--card] [--ray ADDRESS] [key=value ...]",
        description="Runs the steps of a recipe (launch/recipes/data/), each from the cache where it has run before; "
        "see docs/data.md. An interrupted one goes on where it was.",
        more_help=_recipe_help,
    )
    prepare.add_argument("words", nargs="*", metavar="RECIPE | key=value", help="recipe file, then overrides")
    prepare.add_argument("--overwrite", action="store_true", help="replace write.path; is write.overwrite=true")
    prepare.add_argument("--card", action="store_true", help="also write a card of the file; is write.card=true")
    prepare.add_argument(
        "--ray", metavar="ADDRESS", default="", help="a Ray cluster for steps that judge row by row; is ray=ADDRESS"
    )


def _recipe_help() -> str:
    from or1_megatron.prepare.recipe_help import recipe_help

    return recipe_help(WIDTH)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser("convert", help="weights between Hugging Face and Megatron directories")
    ways = convert.add_subparsers(dest="way", required=True, metavar="to-megatron | to-hf | verify")
    to_megatron = ways.add_parser("to-megatron", help="Hugging Face directory -> Megatron dist_checkpointing directory")
    to_megatron.add_argument("--hf", metavar="DIR", type=Path, required=True, help="Hugging Face checkpoint directory")
    to_megatron.add_argument("--out", metavar="DIR", type=Path, required=True, help="new directory")
    to_hf = ways.add_parser("to-hf", help="Megatron dist_checkpointing directory -> Hugging Face directory")
    to_hf.add_argument("--megatron", metavar="DIR", type=Path, required=True, help="directory with .metadata")
    to_hf.add_argument(
        "--hf-config", metavar="DIR", type=Path, help="config.json, tokenizer and the rest; default: --megatron itself"
    )
    to_hf.add_argument("--out", metavar="DIR", type=Path, required=True, help="new directory")
    to_hf.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as stored")
    to_hf.add_argument("--max-shard-size", metavar="SIZE", default="5GB", help="of one safetensors file; default 5GB")
    verify = ways.add_parser("verify", help="do two directories, of either kind, hold the same model?")
    verify.add_argument("a", metavar="A", type=Path)
    verify.add_argument("b", metavar="B", type=Path)
    verify.add_argument("--prompt", help="text whose logits are compared; default: a grade-school problem")
    verify.add_argument("--no-logits", action="store_true", help="compare tensors only; needs little memory")
    export = commands.add_parser("export", help="write a Hugging Face directory from a run folder's checkpoint")
    export.add_argument("run", metavar="RUN", type=Path, help="run folder")
    export.add_argument("--step", metavar="N", type=int, help="checkpoint after step N; default: the newest")
    export.add_argument("--out", metavar="DIR", type=Path, help="new directory; default: RUN/hf/step-N")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as stored, the actor's")
