"""What each subcommand of `or1` calls. Libraries are imported by the command that needs them."""

from __future__ import annotations

import argparse
from pathlib import Path

from or1_megatron.errors import UserError


def _train(options: argparse.Namespace) -> int:
    from or1_megatron.recipe import load

    if options.resume is None:
        config = load(*_recipe_and_overrides(options.words, "train"))
    else:
        _check_overrides_only(options.words)
        from or1_megatron.runfolder import RunFolder

        config = load(RunFolder.open(options.resume).path / "config.yaml", options.words)
    if options.dry_run:
        from or1_megatron.dryrun import plan_lines

        print("\n".join(plan_lines(config)))
        return 0
    from or1_megatron.train import train

    return train(config, resume=options.resume)


def _plan(options: argparse.Namespace) -> int:
    from or1_megatron import plan
    from or1_megatron.recipe import load
    from or1_megatron.runfolder import RunFolder

    if options.paper:
        others = (options.words, options.gpus, options.hardware, options.calibrate, options.lengths)
        if any(others) or options.kept is not None:
            raise UserError("--paper takes no recipe and no other option; drop them, or --paper")
        print("\n".join(plan.plan_paper()))
        return 0
    config = load(*_recipe_and_overrides(options.words, "plan"))
    if options.calibrate and (options.gpus or options.hardware):
        unused = f"--gpus {options.gpus}" if options.gpus else f"--hardware {options.hardware}"
        raise UserError(f"{unused}: --calibrate plans for the machine of its run; drop one of the two")
    run = RunFolder.open(options.calibrate) if options.calibrate else None
    assumptions = plan.assumptions(options.lengths, options.kept, run)
    if run:
        lines = plan.plan_calibrated(config, run, assumptions)
    else:
        gpus = plan.parse_gpus(options.gpus) if options.gpus else [config.parallel.num_ranks]
        lines = plan.plan_gpus(config, gpus, options.hardware or "h800", assumptions)
    print("\n".join(lines))
    return 0


def _report(options: argparse.Namespace) -> int:
    from or1_megatron.report.write import report, watch

    if options.watch:
        watch(options.runs, options.port, lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True))
        return 0
    for file in report(options.runs, options.out):
        print(file)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    if options.rescore:
        if options.words or options.benchmark or options.n is not None or options.limit or options.problems:
            raise UserError("--rescore takes the responses of one file; drop the other words and options")
        from or1_megatron.scoring import rescore
        from or1_megatron.sections import RewardConfig

        rescore(options.rescore, RewardConfig(), options.out)
        return 0
    target, overrides = _recipe_and_overrides(options.words, "eval")
    if options.n is not None:
        overrides = [*overrides, f"evaluation.num_samples={options.n}"]
    from or1_megatron.scoring import evaluate

    evaluate(
        Path(target),
        options.benchmark,
        problems=options.problems,
        limit=options.limit,
        out=options.out,
        overrides=overrides,
    )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from or1_megatron.doctor import doctor

    return doctor()


def _verify(options: argparse.Namespace) -> int:
    from or1_megatron.peers import compare
    from or1_megatron.reward.isolation import LEVELS
    from or1_megatron.sections import RewardConfig
    from or1_megatron.verify import verify

    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: use 1 or more")
    if options.require_isolation not in LEVELS:
        raise UserError(f"--require-isolation {options.require_isolation}: use one of {', '.join(LEVELS)}")
    if options.compare and options.out:
        raise UserError(f"--out {options.out}: --compare writes no verdicts; drop one of the two")
    for name in ("install", "plot", "peers"):
        if getattr(options, name) and not options.compare:
            raise UserError(f"--{name} is for --compare; add that or drop this")
    config = RewardConfig(num_workers=options.workers, require_isolation=options.require_isolation)
    if options.compare:
        compare(options.file, config, options.peers or Path(".cache/verifiers"), options.install, options.plot)
    else:
        verify(options.file, config, options.out)
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from or1_megatron.prepare.recipe import load
    from or1_megatron.prepare.runner import prepare

    recipe, overrides = _recipe_and_overrides(options.words, "prepare")
    overrides += ["write.overwrite=true"] * options.overwrite + ["write.card=true"] * options.card
    overrides += [f"ray={options.ray}"] * bool(options.ray)
    prepare(load(recipe, overrides))
    return 0


def _convert(options: argparse.Namespace) -> int:
    if options.way == "verify":
        from or1_megatron.compare import PROMPT, verify

        verify(options.a, options.b, prompt=options.prompt or PROMPT, logits=not options.no_logits)
        return 0
    from or1_megatron.convert import hf_to_megatron, megatron_to_hf

    if options.way == "to-megatron":
        hf_to_megatron(options.hf, options.out)
    else:
        source = options.hf_config or options.megatron
        megatron_to_hf(
            options.megatron, source, options.out, dtype=options.dtype, max_shard_size=options.max_shard_size
        )
    return 0


def _export(options: argparse.Namespace) -> int:
    from or1_megatron.convert import export

    export(options.run, options.step, options.out, dtype=options.dtype)
    return 0


def _data(options: argparse.Namespace) -> int:
    from or1_megatron.prepare.look import look, wanted

    filters = wanted(options.source, options.verdict, options.reason, options.difficulty, options.model)
    look(options.file, filters, options.limit)
    return 0


def _status(options: argparse.Namespace) -> int:
    from or1_megatron.status import find_run, status_lines

    print("\n".join(status_lines(find_run(options.target))))
    return 0


def _logs(options: argparse.Namespace) -> int:
    from or1_megatron.status import find_run, log_lines

    print("\n".join(log_lines(find_run(options.target), options.name, options.count)))
    return 0


def _recipe_and_overrides(words: list[str], command: str) -> tuple[str, list[str]]:
    if not words or ("=" in words[0] and not Path(words[0]).exists()):
        what = "MODEL, RUN or RECIPE" if command == "eval" else "RECIPE"
        where = "launch/recipes/data/" if command == "prepare" else "launch/recipes/"
        raise UserError(f"or1 {command} needs {what} first, then key=value ...; recipes are in {where}")
    return words[0], words[1:]


def _check_overrides_only(words: list[str]) -> None:
    for word in words:
        if "=" not in word:
            raise UserError(f"--resume takes the configuration from the run folder; drop {word!r} or make it key=value")


COMMANDS = {
    "train": _train,
    "eval": _evaluate,
    "plan": _plan,
    "report": _report,
    "verify": _verify,
    "prepare": _prepare,
    "convert": _convert,
    "export": _export,
    "data": _data,
    "status": _status,
    "logs": _logs,
    "doctor": _doctor,
}
