"""Submits a training run to Slurm.

    python slurm/submit.py RECIPE [key=value ...] --nodes 16 [--time 1-00:00:00] [--partition ...] [--dry-run]

Runs on a login node with any Python from 3.8 on; standard library only. It checks the recipe against the nodes and the
nodes against the cluster, then lays all that the job needs into the run folder (RUN/slurm: the code, the resolved
recipe, the batch script, job.json) and submits that. Later changes of the checkout do not reach a waiting job.
With several recipes (--array) each becomes a run of its own in one job array.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import site_limits
from site_limits import Refused

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_GIT = (("rev-parse", "HEAD"), ("diff", "HEAD", "--stat"))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="submit.py", description="Submit a training run to Slurm.")
    parser.add_argument("words", nargs="+", metavar="RECIPE | key=value", help="recipe file, then overrides")
    add = parser.add_argument
    add("--nodes", type=int, required=True, help="nodes of each run")
    add("--gpus-per-node", type=int, default=8, help="default 8")
    add("--time", default="1-00:00:00", help="limit of one attempt; default 1-00:00:00")
    add("--partition", default="", help="one, or several with commas between them; default: the cluster's")
    add("--account", default="", help="whom the job is charged to; default: your own")
    add("--qos", default="", help="quality of service; default: the account's")
    add("--exclude", default="", help="nodes not to use, as Slurm writes them")
    add("--run-dir", type=Path, help="run folder, on a file system that all nodes see; default runs_dir/NAME-TIME")
    add("--python", default=default_python(), help="the job's Python, by its path on the nodes; default %(default)s")
    add("--container-image", default="", help="pyxis/enroot image to run in; --python is then the image's")
    add("--container-mounts", default="", help="besides the run folder and this directory: SRC:DST[,SRC:DST]")
    add("--chain", choices=("stages",), help="one job for each stage, each after the one before has ended well")
    add("--array", action="store_true", help="several recipes, one run each, as a job array")
    add("--interface", default="", help="network interface between the nodes; default: that of the route")
    add("--lead", type=float, default=30, help="minutes before the limit at which a save is asked for; default 30")
    add("--max-restarts", type=int, default=20, help="a job starts itself anew at most so often; default 20")
    add("--stall-minutes", type=float, default=0, help="without a trace for so long it is stuck; 0: by its steps")
    add("--start-minutes", type=float, default=10, help="for Ray to have every GPU; default 10")
    add("--object-store-gb", type=float, default=8, help="shared memory of Ray on each node; default 8")
    add("--gpu-memory-gb", type=float, default=80, help="of one GPU, for the check; default 80")
    add("--program", default="", help="Python file to run in place of `or1 train`; it finds RAY_ADDRESS and OR1_RUN")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="further option for sbatch, may be repeated")
    add("--dry-run", action="store_true", help="check, print plan and script; write and submit nothing")
    options, behind = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in behind):
        parser.error(f"unrecognized arguments: {' '.join(behind)}")
    options.words += behind
    return options


def default_python() -> str:
    own = ROOT / ".venv" / "bin" / "python"
    return str(own) if own.exists() else "python3"


def job_python(options: argparse.Namespace) -> str:
    """By its path on the nodes; in an image the checkout's own is of no use."""
    if options.container_image:
        return "python3" if options.python == default_python() else options.python
    found = shutil.which(options.python) or options.python
    return os.path.abspath(found) if "/" in found else found  # the job runs elsewhere; a link stays, it makes a venv


def recipes_and_overrides(options: argparse.Namespace) -> tuple:
    recipes = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if not recipes or (len(recipes) > 1 and not options.array):
        raise Refused(f"give one recipe (or several with --array); there are {len(recipes)}: {recipes}")
    if options.chain and options.array:
        raise Refused("--array and --chain exclude each other: the recipes' stages end at steps of their own")
    for recipe in recipes:
        if Path(recipe).is_dir():
            raise Refused(f"recipe {recipe} is a folder; give a YAML file, see launch/recipes/")
        if not Path(recipe).is_file():
            raise Refused(f"recipe {recipe} does not exist; recipes are YAML files, see launch/recipes/")
    return recipes, overrides


def resolve(recipe: str, overrides: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's facts by the job's Python; without one here {"name"}: the job then checks it first of all."""
    command = [options.python, str(HERE / "resolve.py"), str(options.gpu_memory_gb), recipe, *overrides]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    usable = not options.container_image and shutil.which(options.python)
    if usable:
        probe = [options.python, "-c", "import or1_megatron, omegaconf"]
        usable = subprocess.run(probe, check=False, env=environment, stderr=subprocess.DEVNULL).returncode == 0
    if not usable:
        print(f"note: {options.python} is not usable here, so the recipe is checked only when the job starts")
        return {"name": Path(recipe).stem, "runs_dir": "runs", "stages": [], "plan": [], "yaml": ""}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def check_plan(facts: dict[str, Any], options: argparse.Namespace) -> None:
    """Does the recipe fit the nodes? Raises Refused."""
    if options.nodes < 1 or options.gpus_per_node < 1:
        raise Refused(f"--nodes {options.nodes} --gpus-per-node {options.gpus_per_node}: at least 1 each")
    if min(options.start_minutes, options.object_store_gb) <= 0 or options.stall_minutes < 0:
        raise Refused("--start-minutes and --object-store-gb must be above 0, --stall-minutes 0 or more")
    if options.lead * 2 > (site_limits.minutes(options.time) or math.inf):
        raise Refused(f"--time {options.time} is less than twice --lead {options.lead:g} minutes")
    if options.chain and len(facts["stages"]) < 2:
        raise Refused("--chain stages needs a recipe with two stages or more, resolved here")
    if "ranks" not in facts:
        return
    gpus, ranks, engines = options.nodes * options.gpus_per_node, facts["ranks"], facts["engines"]
    least = ranks + engines if facts["placement"] == "separate" else max(ranks, engines)
    most = max(ranks, engines) if facts["placement"] == "colocated" else ranks + engines
    words = f"parallel.num_ranks={ranks} and engines on {engines}, {facts['placement']},"
    if gpus < least:
        raise Refused(f"{words} needs {least} GPUs, --nodes {options.nodes} has {gpus}")
    if math.ceil(most / options.gpus_per_node) < options.nodes:
        fitting = math.ceil(most / options.gpus_per_node)
        raise Refused(f"{words} uses {most} of {gpus} GPUs; use --nodes {fitting}, or more of both")
    if facts["unfit"]:
        raise Refused(facts["unfit"])
    for path in facts["missing"]:
        print(f"note: {path} does not exist here; the nodes must have it under this name")


def run_folder(facts: dict[str, Any], options: argparse.Namespace, taken: list[Path]) -> Path:
    """The run folder's path, absolute, not there yet and none of `taken`. Raises Refused."""
    if options.run_dir and not options.array:
        run = options.run_dir.absolute()
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise Refused(f"--run-dir {run} is not empty; a run goes on by itself, for a new one choose another")
    else:
        parent = (options.run_dir or Path(facts["runs_dir"])).absolute()
        run = first = parent / (f"{facts['name']}-{time.strftime('%Y%m%d-%H%M%S')}")
        number = 1
        while run.exists() or run in taken:
            number += 1
            run = first.with_name(f"{first.name}-{number}")
    if re.search(r"[\s\"'$`\\,:%#]", str(run)):
        raise Refused(f"run folder {run}: Slurm and the shell read blanks and signs in it otherwise; choose another")
    return run


def script(runs: list[Path], facts: dict[str, Any], options: argparse.Namespace) -> str:
    """The batch script: the template with its options and settings."""
    output = "%A_%a.out" if options.array else "job-%j.out"
    lines = {
        "job-name": re.sub(r"[^\w.+-]", "-", facts["name"]),
        "nodes": options.nodes, "ntasks-per-node": 1, "exclusive": None, "mem": 0,
        "gres": f"gpu:{options.gpus_per_node}", "time": options.time, "requeue": None,
        "signal": f"B:USR1@{round(options.lead * 60)}", "open-mode": "append",
        "output": runs[0] / "slurm" / output, "chdir": runs[0], "partition": options.partition,
        "account": options.account, "qos": options.qos, "exclude": options.exclude,
        "array": f"0-{len(runs) - 1}" if options.array else "",
    }  # fmt: skip
    given = {name: value for name, value in lines.items() if value != ""}
    head = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in given.items()]
    head += [f"#SBATCH {option}" for option in options.sbatch]
    mounts = [f"{path}:{path}" for path in [*runs, Path.cwd()]] + list(filter(None, [options.container_mounts]))
    settings = {
        "MAX_RESTARTS": options.max_restarts,
        "PREFLIGHT_S": 180,
        "LEAD_S": round(options.lead * 60),
        "OR1_SHM_MB": round(options.object_store_gb * 1024),
        "PYTHON": job_python(options),
        "CONTAINER": options.container_image,
        "MOUNTS": ",".join(mounts),
    }
    body = [f"RUNS=({' '.join(shlex.quote(str(run)) for run in runs)})"]
    body += [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    text = (HERE / "train.sbatch").read_text()
    return text.replace("#@SBATCH@", "\n".join(head)).replace("#@SETTINGS@", "\n".join(body))


def write_run(run: Path, recipe: str, overrides: list[str], facts: dict[str, Any], options: argparse.Namespace) -> None:
    """RUN/slurm: the code, the recipe and what node.py reads."""
    folder = run / "slurm"
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(str(ROOT / "or1_megatron"), str(folder / "code" / "or1_megatron"), ignore=ignore)
    for name in ("node.py", "ray_node.py", "ports.py", "progress.py", "preflight", "cluster.env"):
        shutil.copy2(str(HERE / name), str(folder / name))
    if facts["yaml"]:
        (folder / "recipe.yaml").write_text(facts["yaml"])
        name, left = "recipe.yaml", []
    else:
        name, left = copy_recipe(Path(recipe), folder), overrides
    job = {
        "name": facts["name"], "recipe": name, "overrides": left, "workdir": str(Path.cwd()),
        "python": job_python(options), "steps": str(facts["stages"][-1]) if options.chain else "",
        "program": str(Path(options.program).absolute()) if options.program else "", "interface": options.interface,
        "object_store_gb": options.object_store_gb, "start_deadline_s": options.start_minutes * 60,
        "stall_s": options.stall_minutes * 60, "time": options.time, "nodes": options.nodes, "plan": facts["plan"],
        "git": [site_limits.ask("git", "-C", str(ROOT), *words) for words in _GIT],
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job, indent=1))


def copy_recipe(recipe: Path, folder: Path, number: int = 0) -> str:
    """Copies a recipe and those it inherits from; its name in the folder."""
    name = "recipe.yaml" if number == 0 else f"recipe-{number}.yaml"

    def copied(match: Any) -> str:
        return match.group(1) + copy_recipe(recipe.parent / match.group(2).strip("\"'"), folder, number + 1)

    (folder / name).write_text(re.sub(r"(?m)^(inherits:\s*)(\S+)", copied, recipe.read_text()))
    return name


def sbatch(*words: str) -> str:
    done = subprocess.run(["sbatch", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise Refused("sbatch: " + (done.stderr.strip().splitlines() or ["failed"])[-1].replace("sbatch: error: ", ""))
    return done.stdout.strip().split(";")[0]


def submit(batch: Path, steps: list[int]) -> list[str]:
    """Job ids: one, or a chain's."""
    if not steps:
        return [sbatch("--parsable", str(batch))]
    jobs: list[str] = []
    try:
        for last in steps:
            after = ["--dependency=afterok:" + jobs[-1], "--kill-on-invalid-dep=yes"] if jobs else []
            jobs.append(sbatch("--parsable", f"--export=ALL,OR1_STEPS={last}", *after, str(batch)))
    except Refused:
        if jobs:
            site_limits.ask("scancel", *jobs)
        raise
    return jobs


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    runs: list[Path] = []
    try:
        recipes, overrides = recipes_and_overrides(options)
        plans = [resolve(recipe, overrides, options) for recipe in recipes]
        for facts in plans:
            check_plan(facts, options)
        partition, qos = options.partition, options.qos
        site_limits.check(partition, options.time, options.nodes, options.gpus_per_node, options.account, qos)
        for facts in plans:
            runs.append(run_folder(facts, options, runs))
        text = script(runs, plans[0], options)
        if options.dry_run:
            print("\n".join([*plans[0]["plan"], "", "run folder " + " ".join(map(str, runs)), "", text]))
            return 0
        return write_and_submit(runs, recipes, overrides, plans, text, options)
    except Refused as refused:
        print(f"submit: error: {refused}", file=sys.stderr)
        return 2


def write_and_submit(
    runs: list[Path], recipes: list[str], overrides: list[str], plans: list[dict[str, Any]], text: str,
    options: argparse.Namespace,
) -> int:  # fmt: skip
    """Everything or nothing: what was written goes again when Slurm refuses the job."""
    made: list[Path] = []
    try:
        for number, run in enumerate(runs):
            (run / "slurm").mkdir(parents=True)
            made.append(run)
            write_run(run, recipes[number], overrides, plans[number], options)
        batch = runs[0] / "slurm" / "train.sbatch"
        batch.write_text(text)
        sbatch("--test-only", str(batch))
        jobs = submit(batch, plans[0]["stages"] if options.chain else [])
    except (OSError, Refused) as error:
        for run in made:
            shutil.rmtree(str(run / "slurm"), ignore_errors=True)
            if run.is_dir() and not any(run.iterdir()):
                run.rmdir()
        raise (error if isinstance(error, Refused) else Refused(f"run folder {runs[0]}: {error}")) from None
    for number, run in enumerate(runs):
        ids = [f"{job}_{number}" if options.array else job for job in jobs]
        (run / "slurm" / "jobs").write_text("".join(id + "\n" for id in ids))
    print(f"submitted {', then '.join(jobs)}: {', '.join(map(str, runs))}")
    print(f"follow it: or1 status {runs[0]}; logs: {runs[0]}/slurm")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
