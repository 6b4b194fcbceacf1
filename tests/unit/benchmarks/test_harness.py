"""The benchmark convention: turns, minimum and median, marks as the last lines, --json, exit code 0 always."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest

from benchmarks.harness import Benchmark, main


def test_cases_take_turns_after_one_warm_up():
    order: list[str] = []
    bench = Benchmark("b", "d")
    for name in "abc":
        bench.case(name, lambda name=name: order.append(name))
    bench.measure(rounds=3, budget_s=100)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [len(case.seconds) for case in bench.cases] == [3, 3, 3]


def test_minimum_median_and_rate_of_self_timed_runs():
    times = iter([99.0, 4.0, 2.0, 3.0])
    bench = Benchmark("b", "d")
    case = bench.case("x", lambda: next(times), amount=10, unit="checks")
    bench.measure(rounds=3, budget_s=100)
    assert (case.best, case.median, case.rate) == (2.0, 3.0, 5.0)
    assert case.median_rate == pytest.approx(10 / 3)


def test_no_round_is_begun_that_would_not_end_in_time():
    import time

    bench = Benchmark("b", "d")
    case = bench.case("slow", lambda: time.sleep(0.05))
    bench.measure(rounds=100, budget_s=0.3)
    assert 1 <= len(case.seconds) <= 5


def test_parts_take_turns_among_themselves_and_close_before_the_next():
    order: list[str] = []
    bench = Benchmark("b", "d")

    def part(names: str) -> None:
        bench.stack.callback(lambda: order.append("|"))
        for name in names:
            bench.case(name, lambda name=name: order.append(name))

    bench.part(lambda: part("ab"))
    bench.part(lambda: part("c"))
    bench.measure(rounds=2, budget_s=100)
    assert "".join(order) == "ab" + "ab" + "ba" + "|" + "ccc" + "|"
    assert [case.label for case in bench.cases] == ["a", "b", "c"]


def test_a_program_that_is_stopped_has_said_the_rows_of_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    bench = Benchmark("b", "d")
    bench.part(lambda: bench.case("columns", lambda: 0.25) and None)
    bench.part(stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.measure(rounds=1, budget_s=100)
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[:4] for line in said if line.startswith("columns")] == [["columns", "ours", "0.25", "0.25"]]


def test_what_a_part_held_is_freed_with_it():
    class Large:
        def run(self) -> None:
            pass

    alive: list[weakref.ref[Large]] = []

    def part() -> None:
        gc.collect()
        assert all(ref() is None for ref in alive)
        large = Large()
        alive.append(weakref.ref(large))
        bench.case("large", large.run)

    bench = Benchmark("b", "d")
    bench.part(part)
    bench.part(part)
    bench.measure(rounds=1, budget_s=100)
    assert len(alive) == 2


def test_what_was_timed_before_takes_no_turns():
    order: list[str] = []
    bench = Benchmark("b", "d")
    case = bench.recorded("whole run", [3.0, 5.0], amount=8)
    bench.measure(rounds=3, budget_s=100)
    bench.case("a", lambda: order.append("a"))
    bench.measure(rounds=3, budget_s=100)
    assert case.seconds == [3.0, 5.0] and case.median_rate == 2 and order == ["a"] * 4


@pytest.mark.parametrize(
    ("value", "target", "better", "verdict"),
    [
        (2.0, 1.5, "higher", "holds"),
        (1.0, 1.5, "higher", "falls short"),
        (1.0, 1.5, "lower", "holds"),
        (2.0, 1.5, "lower", "falls short"),
    ],
)
def test_marks(value: float, target: float, better, verdict: str):
    bench = Benchmark("b", "d")
    bench.mark("speed", lambda: value, target, better)
    assert bench.mark_lines() == [f"mark speed {value:.4g} {target:.4g} {verdict}"]


def test_main_prints_the_table_then_the_marks_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    closed: list[bool] = []

    def build(bench: Benchmark, quick: bool) -> None:
        assert quick
        bench.stack.callback(lambda: closed.append(True))
        ours = bench.case("mine", lambda: 1.0, amount=4, unit="checks")
        peer = bench.case("theirs", lambda: 2.0, "peer", amount=4, unit="checks")
        bench.note("the floor needs a GPU")
        bench.mark("faster", lambda: ours.rate / peer.rate, 1.5)
        bench.mark("much_faster", lambda: ours.rate / peer.rate, 10)

    main("demo", "a demonstration", build, ["--quick", "--json", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "demo: a demonstration"
    assert lines[-2:] == ["mark faster 2 1.5 holds", "mark much_faster 2 10 falls short"]
    assert "the floor needs a GPU" in lines
    assert closed == [True]
    record = json.loads((tmp_path / "out.json").read_text())
    assert [(row["label"], row["kind"], row["seconds"]) for row in record["rows"]] == [
        ("mine", "ours", [1.0] * 3),
        ("theirs", "peer", [2.0] * 3),
    ]
    assert [mark["holds"] for mark in record["marks"]] == [True, False]
    assert record["machine"]["cores"] >= 1 and record["versions"]["python"].startswith("3.")
