"""Verdicts on math answers: the steps of 7.1, pairs judged by hand, real gold answers against themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_solutions import FOLDER

from or1_megatron.reward.math import _last_closed_box, extract_answer, may_take_long, score
from or1_megatron.reward.problem import Task
from or1_megatron.reward.service import RewardService
from or1_megatron.sections import RewardConfig

# One JSON object a line: ground_truth, response, correct (as a strict person judges), and known_limit where we differ.
HARD_PAIRS = [json.loads(line) for line in Path(__file__).with_name("hard_pairs.jsonl").read_text().splitlines()]

VERDICTS = [
    ("\\boxed{9}", "9", "correct"),
    ("\\boxed{ 9 }", "9", "correct"),
    ("\\boxed{8}", "9", "wrong"),
    ("the answer is 9", "9", "unparsable"),
    ("\\boxed{}", "9", "unparsable"),
    ("\\boxed{9", "9", "unparsable"),
    ("\\boxed{1} and then \\boxed{2}", "2", "correct"),
    ("\\boxed{1} and then \\boxed{2}", "1", "wrong"),
    ("\\boxed{2}. The final answer is: $1$", "1", "wrong"),
    ("\\boxed{x \\in \\{1, 2\\}}", "\\{1,2\\}", "correct"),
    ("\\boxed {7}", "7", "correct"),
    ("\\boxed{1_{" + "9" * 4400 + "}}", "7", "wrong"),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardService]:
    with RewardService(RewardConfig(num_workers=2), tmp_path_factory.mktemp("logs")) as service:
        yield service


def verdicts(service: RewardService, pairs: list[tuple[str, str]]) -> list[str]:
    futures = [service.submit(Task(response, (gold,))) for response, gold in pairs]
    return [future.result(60).name for future in futures]


@pytest.mark.parametrize(("response", "gold", "verdict"), VERDICTS)
def test_verdict(response: str, gold: str, verdict: str) -> None:
    assert score(response, (gold,)) == verdict


def test_any_gold_answer_counts() -> None:
    assert score("\\boxed{x=3}", ("5", "3")) == "correct"
    assert score("\\boxed{4}", ("5", "3")) == "wrong"


def test_last_balanced_box_is_taken() -> None:
    assert extract_answer("\\boxed{a{b}c} \\boxed{open") == "a{b}c"
    assert extract_answer("\\boxed{\\text{(}1, 2)}") == "\\text{(}1, 2)"
    assert extract_answer("none") is None


PARTS = ["\\boxed{", "\\fbox {", "\\boxed 5", "{", "}", "\\{", "\\}", "\\", "7", " "]


@given(st.lists(st.sampled_from(PARTS), max_size=30))
def test_the_short_way_to_the_answer_finds_the_same(parts: list[str]) -> None:
    text = "".join(parts)
    assert extract_answer(text) == _last_closed_box(text, 0)


@pytest.mark.parametrize(
    "answer", ["9^{9^{9^{9}}}", "99999999!", "(x+y+z)^{200}(x-y)^{200}", "(" * 30 + "1" + ")" * 30]
)
def test_what_may_take_long_is_known(answer: str) -> None:
    assert may_take_long("\\boxed{7}" + "so $x^2 = y^2!$ " * 1000 + f"\\boxed{{{answer}}}")


@pytest.mark.parametrize("text", ["\\boxed{x^2+1} since 5! = 120", "no box: 5!", "", "5!" * 5000, "\\boxed{f(g(x))}"])
def test_what_does_not_is_known_too(text: str) -> None:
    assert not may_take_long(text)


def test_hard_pairs_are_judged_as_by_hand(service: RewardService) -> None:
    found = verdicts(service, [(pair["response"], pair["ground_truth"]) for pair in HARD_PAIRS])
    firm = [pair for pair in HARD_PAIRS if "known_limit" not in pair]
    assert sum(not pair["correct"] for pair in firm) >= 150 and sum(pair["correct"] for pair in firm) >= 150
    expected = [pair["correct"] != pair.get("known_limit", False) for pair in HARD_PAIRS]
    accepted = [name == "correct" for name in found]
    assert [pair for pair, is_right, was in zip(HARD_PAIRS, expected, accepted, strict=True) if is_right != was] == []


def real_golds() -> list[str]:
    """Gold answers of MATH and AIME."""
    if not (FOLDER / "math").is_dir():
        pytest.skip("the problems of MATH are not on this machine")
    files = ("math/math500.json", "aime/test_aime.json", "math/train_math.json")
    return [str(row["answer"]) for file in files for row in json.loads((FOLDER / file).read_text())][:2000]


def rewritten(gold: str) -> str:
    """The same answer in another writing: 9.0 for 9, \\dfrac, \\left( and \\right), ^{2}, spaces around signs."""
    if re.fullmatch(r"-?\d+", gold):
        return gold + ".0"
    gold = re.sub(r"\\frac(?=\{)", r"\\dfrac", gold)
    gold = re.sub(r"\^(\w)", r"^{\1}", gold)
    if "left" not in gold and "text" not in gold:
        gold = gold.replace("(", r"\left(").replace(")", r"\right)")
    return re.sub(r"(?<=[^\\ ]) ?([+=-]) ?(?=\w)", r" \1 ", gold)


def test_2000_real_gold_answers_match_themselves(service: RewardService) -> None:
    golds = real_golds()
    assert len(golds) == 2000
    assert sum(rewritten(gold) != gold for gold in golds) > 1700, "equal strings show nothing"
    found = verdicts(service, [(f"so \\boxed{{{rewritten(gold)}}}.", gold) for gold in golds])
    assert [gold for gold, verdict in zip(golds, found, strict=True) if verdict != "correct"] == []


def test_real_gold_answers_of_other_problems_are_wrong(service: RewardService) -> None:
    golds = real_golds()[:600]
    pairs = [(f"\\boxed{{{other}}}", gold) for gold, other in zip(golds, golds[7:], strict=False) if gold != other]
    found = verdicts(service, pairs)
    assert [pair for pair, verdict in zip(pairs, found, strict=True) if verdict == "correct"] == []
