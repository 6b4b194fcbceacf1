"""Which transport a run gets: the best that the machines and the installed vLLM allow, or one line why not."""

from __future__ import annotations

from typing import Any

import pytest

from or1_megatron.cluster.transport import check, choose, compare
from or1_megatron.errors import RunFailure, UserError

OLD = "the worker of vllm 0.1 has no rank"
GOOD: dict[str, Any] = {"num_gpus": 0, "colocated": False, "num_hosts": 1, "lacking": None, "paired": True}
GPUS = {"num_gpus": 8}
TOGETHER = {"num_gpus": 8, "colocated": True}


@pytest.mark.parametrize(
    ("wanted", "facts", "chosen"),
    [
        ("auto", {}, "shm"),
        ("auto", {"colocated": True}, "shm"),
        ("auto", {"num_hosts": 2}, "ray"),
        ("auto", GPUS, "nccl"),
        ("auto", {**GPUS, "num_hosts": 2}, "nccl"),
        ("auto", {**TOGETHER, "num_hosts": 2}, "ipc"),
        ("gloo", {"num_hosts": 2}, "gloo"),
        ("ray", GPUS, "ray"),
        ("shm", TOGETHER, "shm"),
    ],
)
def test_the_best_is_taken_without_a_word(wanted: str, facts: dict[str, Any], chosen: str) -> None:
    assert choose(wanted, **{**GOOD, **facts}) == (chosen, "")


@pytest.mark.parametrize(
    ("facts", "chosen", "words"),
    [
        ({**GPUS, "lacking": OLD}, "shm", f"{OLD}: weights go by shm instead of nccl"),
        ({**TOGETHER, "lacking": OLD, "num_hosts": 2}, "ray", f"{OLD}: weights go by ray instead of ipc"),
        ({"num_hosts": 2, "verify": True}, "ray", "rollout.verify_weights compares nothing: weights go by ray"),
        ({**TOGETHER, "paired": False}, "shm", "an engine's GPU has no rank whose weights it could map: weights go by"),
    ],
)
def test_auto_says_what_it_falls_back_from(facts: dict[str, Any], chosen: str, words: str) -> None:
    found, line = choose("auto", **{**GOOD, **facts})
    assert found == chosen and line.startswith(words)


@pytest.mark.parametrize(
    ("wanted", "facts", "words"),
    [
        ("shm", {"num_hosts": 3}, "on one host, they are on 3; use ray"),
        ("nccl", {**GPUS, "lacking": OLD}, f"rollout.transport=nccl: {OLD}; use shm"),
        ("gloo", {"lacking": OLD, "num_hosts": 2}, f"rollout.transport=gloo: {OLD}; use ray"),
        ("gloo", {"num_hosts": 2, "engine_tp": 2}, "rollout.transport=gloo between hosts needs rollout.engine_tp=1"),
        ("ipc", {**TOGETHER, "paired": False}, "rollout.transport=ipc: an engine's GPU has no rank"),
    ],
)
def test_what_was_asked_for_is_refused_not_replaced(wanted: str, facts: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        choose(wanted, **{**GOOD, **facts})
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wanted", "num_gpus", "colocated", "words"),
    [
        ("nccl", 0, False, "rollout.transport=nccl needs GPUs, and there are none; use auto, shm, gloo or ray"),
        ("ipc", 0, True, "rollout.transport=ipc needs GPUs"),
        ("gloo", 2, False, "for machines without a GPU; use auto, nccl or ipc"),
        ("nccl", 2, True, "use ipc, or rollout.placement=separate"),
        ("ipc", 2, False, "use nccl, or rollout.placement=colocated"),
    ],
)
def test_impossible_on_these_machines(wanted: str, num_gpus: int, colocated: bool, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(wanted, num_gpus=num_gpus, colocated=colocated)


def test_possible_on_these_machines() -> None:
    for colocated in (False, True):
        for wanted in ("auto", "shm", "ray", "gloo"):
            check(wanted, num_gpus=0, colocated=colocated)
        for wanted in ("auto", "shm", "ray", "ipc" if colocated else "nccl"):
            check(wanted, num_gpus=2, colocated=colocated)


def test_a_tensor_that_one_process_got_wrong_ends_the_run() -> None:
    """Two ranks share `a`; sums are modulo 2^64."""
    sent = [{"a": 2**63, "b": -5}, {"a": 2**63 + 7}]
    right, wrong = {"a": 7, "b": 2**64 - 5}, {"a": 7, "b": 5}
    compare(sent, [[right, right], [right]])
    with pytest.raises(RunFailure, match="b arrived with another checksum than the actor's"):
        compare(sent, [[right, wrong], [right]])
