"""Other people's math verifiers by name, to compare with: `python -m or1_megatron.reward.named NAME FOLDER` answers
one JSON line {"response", "ground_truth"} with one {"correct"}; or1_megatron/peers.py keeps the deadline.

Each is the function of a published package, which lies in a folder of its own, without its dependencies: the packages
ask for versions that exclude one another. Some evaluate answers as Python, so the process first gives up what tested
code gives up, as far as the kernel can (isolation.py): it reads libraries, writes no file and starts nothing.

Two are on no index and are put together from functions that descend from theirs. DeepScaleR takes the last box behind
the reasoning and accepts what the MATH rules or PRM800K's sympy comparison accept (both in verl). Qwen2.5's evaluation
takes and cleans the answer as Trinity-RFT's copy does and compares as PRIME's grader (in verl) does, which comes from
the same harness; Trinity-RFT's own comparison reads no LaTeX.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from or1_megatron.reward import isolation

Verifier = Callable[[str, str], bool]  # response, gold -> accepted
_RULES = (
    "verl==0.9.1", "trinity-rft==0.6.0", "pylatexenc==2.10", "word2number==1.1", "antlr4-python3-runtime==4.11.0",
)  # fmt: skip


@dataclass(frozen=True)
class Named:
    """How a verifier is made, and the packages that its folder holds."""

    load: Callable[[Path], Verifier]
    folder: str = ""
    packages: tuple[str, ...] = ()


def _math(folder: Path) -> Verifier:
    """The rules of the MATH paper: last box, normalised text, equal or not."""
    rules: Any = _module(folder, "verl.utils.reward_score.math_reward")
    return lambda response, gold: rules.compute_score(response, gold) == 1.0


def _prime_rules(folder: Path) -> Any:
    """Without the process that it starts to keep its own deadline: the one from outside is the same, and none may be
    started here."""
    rules: Any = _module(folder, "verl.utils.reward_score.prime_math")
    rules.are_equal_under_sympy = rules.are_equal_under_sympy.__wrapped__
    return rules


def _prime(folder: Path) -> Verifier:
    rules = _prime_rules(folder)
    return lambda response, gold: bool(rules.compute_score(response, gold)[0])


def _deepscaler(folder: Path) -> Verifier:
    from or1_megatron.reward.math import extract_answer

    prime = _prime_rules(folder)
    rules: Any = _module(folder, "verl.utils.reward_score.math_reward")

    def accepts(response: str, gold: str) -> bool:
        answer = extract_answer(response)
        return answer is not None and bool(rules.is_equiv(answer, gold) or prime.grade_answer(answer, gold))

    return accepts


def _qwen(folder: Path) -> Verifier:
    taking: Any = _module(folder, "trinity.common.rewards.qwen25_eval")
    comparing: Any = _module(folder, "verl.utils.reward_score.prime_math.grader")
    # There verl uses a decorator as a context manager: every symbolic comparison raises, and counts as unequal. PRIME
    # is left as it is shipped; here it would leave nothing to compare. The deadline is kept from outside.
    comparing.timeout_limit = lambda seconds: contextlib.nullcontext()

    def accepts(response: str, gold: str) -> bool:
        answer = taking.extract_answer(response)
        return answer is not None and bool(comparing.math_equal(answer, taking.strip_string(gold)))

    return accepts


def _math_verify(folder: Path) -> Verifier:
    """Math-Verify on the whole response, the version that comes first on the path."""
    from math_verify import parse, verify

    return lambda response, gold: bool(verify(parse(f"\\boxed{{{gold}}}"), parse(response)))


NAMED: dict[str, Named] = {
    "MATH rules": Named(_math, "rules", _RULES),
    "PRIME": Named(_prime, "rules", _RULES),
    "Qwen2.5": Named(_qwen, "rules", _RULES),
    "DeepScaleR": Named(_deepscaler, "rules", _RULES),
    "Math-Verify 0.6": Named(_math_verify, "math-verify-0.6", ("math-verify==0.6.1", "latex2sympy2_extended==1.10.1")),
    "Math-Verify 0.9": Named(_math_verify),
}


def _module(folder: Path, name: str) -> types.ModuleType:
    """A module without what the packages above it import: verl's would load Ray."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(folder.joinpath(*parts[:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


def main(name: str, folder: Path) -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some print
    if NAMED[name].folder:
        sys.path.insert(0, str(folder))
    accepts = NAMED[name].load(folder)
    libraries = [path for path in isolation.readable_paths() if path != os.getcwd()]
    isolation.enter(isolation.landlock_rules(libraries), isolation.filter_of_any_process())
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            result: dict[str, Any] = {"correct": any(accepts(task["response"], gold) for gold in task["ground_truth"])}
        except Exception as error:  # whatever it raises is its answer
            result = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
