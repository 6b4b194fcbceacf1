"""What a run shows: a table that fits a terminal, plain lines without control codes elsewhere."""

from __future__ import annotations

import io
import math
import time

from rich.console import Console

from or1_megatron.display import Display, heartbeat

METRICS = {
    "step": 1,
    "reward/mean": 0.4375,
    "entropy/signal": 0.5712,
    "entropy/alpha": 0.0050,
    "length/mean": 812.4,
    "truncated": 0.031,
    "groups/kept": 16,
    "groups/generated": 24,
    "seconds/rollout": 4.8,
    "seconds/update": 9.7,
    "seconds/sync": 0.3,
    "seconds/step": 15.4,
}


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, height=40)


def plain() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=False, width=40), file


def drawn(display: Display) -> list[str]:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(display.render())
    return console.export_text().splitlines()


def test_table_shows_the_last_eight_steps_within_100_columns():
    with Display(30, "trial", console=terminal()) as display:
        display.phase("update")
        for step in range(1, 12):
            display.step({**METRICS, "step": step})
        lines = drawn(display)
    assert "trial" in lines[0] and "step 11/30" in lines[0] and "about 4:52 left" in lines[0]  # 19 x 15.4 s
    assert [line.split()[0] for line in lines[2:10]] == [str(step) for step in range(4, 12)]
    assert lines[9].split() == "11 0.438 0.571 0.0050 812 3% 16/24 4.8 9.7 0.3 0.6".split()
    assert lines[1].split()[-4:] == ["rollout", "update", "sync", "other"]
    assert "now: update" in lines[10]
    assert max(map(len, lines)) <= 100


def test_a_phase_starts_its_own_clock():
    with Display(3, "trial", console=terminal()) as display:
        display.phase("rollout")
        time.sleep(1.1)
        assert "now: rollout  0:01" in drawn(display)[-1]
        display.phase("update")
        assert "now: update  0:00" in drawn(display)[-1]


def test_a_phase_tells_the_share_of_the_responses_that_have_ended():
    console, file = plain()
    with Display(4, "trial", console=terminal()) as display:
        display.phase("rollout")
        display.answered(0.379)
        assert "now: rollout, 37% answered  0:00" in drawn(display)[-1]
        display.answered(1.0)
        assert "now: rollout  0:00" in drawn(display)[-1]
    with Display(4, "trial", console=console, heartbeat_s=0.2, unit="set") as display:
        display.phase("amc: 3 problems")
        display.done(2)
        display.answered(2 / 3)
        time.sleep(0.4)
    assert file.getvalue().splitlines()[0] == "trial: set 2/4 done; amc: 3 problems, 66% answered, 0:00"


def test_messages_stay_and_are_not_read_as_markup():
    console = terminal()
    with Display(3, "trial", console=console) as display:
        display.message("held-out [1/2] 40%")
    assert isinstance(console.file, io.StringIO)
    assert "held-out [1/2] 40%" in console.file.getvalue()


def test_missing_and_nan_values_show_as_dash():
    with Display(3, "trial", console=terminal()) as display:
        display.step({"step": 1, "reward/mean": math.nan, "length/mean": math.inf})
        assert drawn(display)[2].split() == ["1", "-", "-", "-", "-", "-", "-/-", "-", "-", "-", "-"]


def test_without_a_terminal_one_plain_line_a_step():
    console, file = plain()
    with Display(30, "trial", console=console) as display:
        display.message("run folder [runs/x]")
        display.phase("rollout")
        display.step(METRICS)
    first, second = file.getvalue().splitlines()  # not wrapped, though the console is narrow
    assert first == "run folder [runs/x]"
    assert second.startswith("step 1/30  reward 0.438  entropy 0.571  alpha 0.0050  length 812  cut 3%  kept 16/24")
    assert second.endswith("seconds 15.4  (rollout 4.8, update 9.7, sync 0.3, other 0.6)")
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()


def test_without_a_terminal_a_long_phase_says_that_it_lives():
    console, file = plain()
    with Display(30, "trial", console=console, heartbeat_s=0.2) as display:
        display.phase("starting engines")
        time.sleep(0.7)
    lines = file.getvalue().splitlines()
    assert 2 <= len(lines) <= 3
    assert lines[0] == "trial: step 0/30 done; starting engines, 0:00"


def test_a_resumed_run_counts_from_where_it_was():
    console, file = plain()
    with Display(30, "trial", console=console, heartbeat_s=0.2) as display:
        display.resumed(20)
        display.phase("rollout")
        time.sleep(0.4)
    assert file.getvalue().splitlines()[:2] == ["resumed after step 20", "trial: step 20/30 done; rollout, 0:00"]


def test_without_a_terminal_short_phases_are_silent():
    console, file = plain()
    with Display(30, "trial", console=console, heartbeat_s=0.4) as display:
        for _ in range(8):
            display.phase("rollout")
            time.sleep(0.1)
    assert file.getvalue() == ""


def test_a_heartbeat_ends_with_its_block():
    told: list[float] = []
    with heartbeat(told.append, every_s=0.02):
        time.sleep(0.3)
    count = len(told)
    time.sleep(0.1)
    assert count == len(told) > 1 and told == sorted(told)
