"""The report of a made-up run folder, in headless Chromium: no errors, nothing empty, nothing off the screen."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from or1_megatron import cli
from or1_megatron.profiling.spans import Count, Record, Span
from or1_megatron.profiling.trace import trace_text
from or1_megatron.recipe import load
from or1_megatron.report import rundata
from or1_megatron.report.advice import advice
from or1_megatron.report.page import page
from or1_megatron.report.rundata import read_run, tail_of
from or1_megatron.report.write import report, watch
from or1_megatron.runfolder import RunFolder
from or1_megatron.types import Group, Prompt, Sample

EVIL = "<script>window.pwned = 1</script><img src=x onerror='window.pwned=1'> \\boxed{1} & </pre>"
SECOND = 1_000_000_000


def make_run(root: Path, name: str, steps: int = 6, rollout_s: float = 7.0, words: Sequence[str] = ()) -> Path:
    words = [f"name={name}", f"run_dir={root / name}", "model.path=model", "rollout.group_size=2", *words]
    (root / "recipe.yaml").write_text("steps: 6\n")
    run = RunFolder.create(load(root / "recipe.yaml", words))
    for step in range(1, steps + 1):
        run.metrics.log(step, {
            "stage": 1 + (step > 2),
            "reward/mean": step / 10, "entropy/signal": 0.5 - step / 20, "entropy/c": 0.01, "entropy/alpha": 0.0,
            "length/mean": 100 + step, "length/max": 400, "truncated": 0.2, "clip_fraction": 0.01 * step,
            "grad_norm": 2.0, "mismatch/mean": 0.02, "mismatch/max": 0.3, "mismatch/ess": 0.9, "mfu": 0.3,
            "groups/kept": step % 3, "groups/generated": 8, "verdict/correct": step, "verdict/wrong": 8 - step,
            "seconds/step": 10.0, "seconds/rollout": rollout_s, "seconds/update": 1.5, "seconds/save": 1.0,
            "seconds/others": 8.5 - rollout_s, "tokens_per_second/rollout": 90.0, "tokens_per_second/update": 70.0,
            "idle": {"rank0": 8.0, "engine0": 3.0}, "memory": {"rank0": 3 << 30, "engine0": 2 << 30},
            **({"eval/T0.6/avg@4" if name == "other" else "eval/avg@4": 0.1} if step == 1 else {}),
        })  # fmt: skip
        prompts = [Prompt(f"p{i}", f"What is {i}?", (1,), ("1",)) for i in range(4)]
        run.save_rollouts(step, [
            Group(prompt, [
                Sample(prompt, j, np.ones(20 * i + 30 * j + 5), np.zeros(0), EVIL, "length" if i == 3 else "stop", 0,
                       "correct" if j == 0 else "wrong", float(j == 0 and i > 0))
                for j in range(2)
            ])
            for i, prompt in enumerate(prompts)
        ])  # fmt: skip
    driver = [Span("sync", 0, SECOND, 1), Span("rollout", SECOND, 8 * SECOND, 1), Span("step", 0, 10 * SECOND, 0)]
    driver.insert(2, Span("update", 8 * SECOND, 10 * SECOND, 1))
    counts = [
        Count("responses", SECOND, 40, 0),
        Count("responses", 3 * SECOND, 2, 20),
        Count("responses", 8 * SECOND, 0, 70),
    ]
    records = {
        "driver": Record(driver, [], 0),
        "engine0": Record([Span("idle", 0, SECOND, 0), Span("generate", SECOND, 8 * SECOND, 0)], counts, 0),
        "rank0": Record([Span("idle", 0, 8 * SECOND, 0), Span("update", 8 * SECOND, 10 * SECOND, 0)], [], 0),
    }
    run.write("trace.json", trace_text(records, {}))
    run.metrics.close()
    return run.path


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize("name", ["trace.json", "rollouts/step-000006.parquet", "rollouts/step-000002.parquet"])
def test_a_file_that_was_cut_is_named_and_may_be_removed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [make_run(tmp_path, "good"), make_run(tmp_path, "short")]
    cut(runs[1] / name)
    assert cli.main(["report", *map(str, runs), "--out", str(tmp_path / "page")]) == 2
    assert f"{runs[1] / name} " in (said := capsys.readouterr().err) and said.count("\n") == 1
    (runs[1] / name).unlink()
    read_run(runs[1])


def test_a_line_of_the_metrics_that_is_torn_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path, "torn")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    assert cli.main(["report", str(run)]) == 2
    assert "metrics.jsonl line 2 " in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_tables_advice_and_tail(tmp_path: Path):
    run = read_run(make_run(tmp_path, "long"))
    assert run.tail == tail_of(json.loads((run.folder.path / "trace.json").read_text()))
    assert run.tail is not None and run.tail.share == pytest.approx(5 / 7) and run.tail.waiting == 0
    hours = {name: round(3600 * value, 6) for name, value in run.hours().items()}
    assert hours == {"total": 60, "rollout": 42, "update": 9, "others": 9, "evaluation": 0}
    said = " ".join(advice(run))
    assert "71% of rollout waits for the longest 5 % of the responses" in said
    assert "save alone takes 10% of the time" in said and "rollout 70%, update 15%, others 15%" in said
    assert "20% of the responses are cut" in said and "12% of the groups" in said and "90% of the tokens" in said
    assert [(example.verdict, example.reward) for example in run.examples] == [("correct", 1), ("correct", 1)] + [
        ("wrong", 0)
    ] * 2
    path, written_page = report([run.folder.path], tmp_path / "out")[::-1]
    written = json.loads(path.read_text())[0]
    assert written["series"]["reward/mean"][2] == [3, 0.3] and written["tail"]["rollouts"] == 1
    text = written_page.read_text()
    assert len(text) < 2_000_000 and "<script" not in text and "http" not in text.replace("http-equiv", "")


def test_the_stages_that_ran_are_told(tmp_path: Path):
    table = "stages=[{until: 2, context_length: 4096}, {until: 6, rollout_batch_size: 32, mini_batch_size: 16}]"
    run = read_run(
        make_run(tmp_path, "staged", words=[table, "rollout.context_length=8192", "loss.old_log_probs=engine"])
    )
    text = page([run])
    assert "D_R 32, gs 2, T 8192 in stage 2 of 2" in text and "(1, 64, 64, 1), then (2, 32, 16, 1)" in text
    assert "(1, 64, 64, 1)<" in page([read_run(make_run(tmp_path, "plain"))])


def test_what_a_resume_took_back_is_not_shown_and_the_last_evaluation_counts(tmp_path: Path):
    folder = RunFolder.open(make_run(tmp_path, "resumed"))
    folder.metrics.rewind(1)
    folder.metrics.log(1, {"seconds/evaluation": 36.0, "seconds/sync": 1.0})
    run = read_run(folder.path)
    assert len(run.lengths) == 8, "those of step 1 only"
    assert run.hours()["evaluation"] == pytest.approx(0.01)
    folder.metrics.close()


def test_with_an_overlap_nothing_is_said_of_the_tail(tmp_path: Path):
    words = ["rollout.overlap=true", "loss.old_log_probs=engine"]
    assert read_run(make_run(tmp_path, "ahead", words=words)).tail is None


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    empty = make_run(tmp_path, "empty", steps=0)
    for path, said in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "no config.yaml"),
        (empty, "no finished step"),
    ):
        assert cli.main(["report", str(path)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not list(empty.glob("report*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "{}/file"], "file is a file; give a folder"),
        (["--watch", "--port", "99999"], "--port 99999: use 1 to 65535, or 0"),
        (["--watch", "--port", "-1"], "--port -1: use 1 to 65535, or 0"),
    ],
)
def test_places_and_ports_that_cannot_be(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("mine")
    run = make_run(tmp_path, "run")
    assert cli.main(["report", str(run), *(word.format(tmp_path) for word in words)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_watch_serves_what_the_run_has_by_now(tmp_path: Path):
    path, told = make_run(tmp_path, "live"), threading.Event()
    addresses: list[str] = []

    def ready(address: str) -> None:
        addresses.append(address)
        told.set()

    threading.Thread(target=watch, args=([path], 0, ready), daemon=True).start()
    assert told.wait(10) and addresses[0].startswith("http://127.0.0.1:")

    def get() -> str:
        with urllib.request.urlopen(addresses[0], timeout=20) as answer:
            return answer.read().decode()

    assert "6 of 6" in get() and 'http-equiv="refresh"' in get()
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "seconds/step": 1.0, "seconds/rollout": 1.0, "reward/mean": 0.5}) + "\n")
    assert "7 of 6" in get()


LOOK = """() => {
  const marks = [...document.querySelectorAll('svg[data-plot]')].map(svg => {
    const shown = svg.getBoundingClientRect().width > 0;
    const boxes = [...svg.querySelectorAll('.mark')].map(mark => mark.getBBox());
    const sizes = [...svg.querySelectorAll('text')].map(text => {
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      return parseFloat(getComputedStyle(text).fontSize) * scale; });
    return {name: svg.dataset.plot, shown, marks: boxes.filter(box => box.width + box.height > 0).length,
            smallest: Math.min(...sizes)}; });
  const ink = getComputedStyle(document.body);
  return {marks, width: document.documentElement.scrollWidth, pwned: window.pwned || 0,
          colours: [ink.color, ink.backgroundColor]};
}"""


def luminance(colour: str) -> float:
    """Of an rgb(...) text, as WCAG defines it."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_in_a_browser(tmp_path: Path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs chromium on PATH and the package playwright")
    from playwright.sync_api import sync_playwright

    one, other = make_run(tmp_path, "one"), make_run(tmp_path, "other", rollout_s=5.0)
    pages = {"one": report([one], tmp_path / "a")[0], "two": report([one, other], tmp_path / "b")[0]}
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        schemes: tuple[tuple[int, Literal["light", "dark"]], ...] = ((1280, "light"), (390, "dark"))
        for width, scheme in schemes:
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
            for which, file in pages.items():
                tab, said = context.new_page(), []
                tab.on("console", lambda message, said=said: said.append(message.text))
                tab.on("pageerror", lambda error, said=said: said.append(str(error)))
                tab.goto(file.resolve().as_uri())
                seen = tab.evaluate(LOOK)
                shown = [mark for mark in seen["marks"] if mark["shown"]]
                assert not said and not seen["pwned"] and seen["width"] == width, (said, seen)
                assert len(shown) == {"one": 17, "two": 20}[which], [mark["name"] for mark in shown]
                assert all(mark["marks"] and mark["smallest"] >= 9 for mark in shown), shown
                light, dark = sorted(map(luminance, seen["colours"]), reverse=True)
                assert (light + 0.05) / (dark + 0.05) > 7  # contrast of text
                assert (luminance(seen["colours"][1]) > 0.5) == (scheme == "light")
        browser.close()


def test_lengths_are_of_the_newest_files_and_the_limit_of_responses_that_were_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rundata, "NEWEST_FILES", 2)
    folder = RunFolder.open(make_run(tmp_path, "long"))
    prompt = Prompt("p", "x", (1,), ("1",))
    folder.save_rollouts(1, [Group(prompt, [Sample(prompt, 0, np.ones(999), np.zeros(0), "", "length", 0, "wrong")])])
    run = read_run(folder.path)
    assert len(run.lengths) == 2 * 8 and max(run.lengths) == 95
    assert run.limit == 95, "75 tokens is the longest response that ended by itself"
    folder.metrics.close()


def test_in_older_runs_checkpoints_were_no_part_of_a_step(tmp_path: Path):
    folder = RunFolder.open(make_run(tmp_path, "old", steps=0))
    seconds = {"step": 10.0, "rollout": 7.0, "update": 1.5, "evaluation": 0.5, "save": 4.0}
    folder.metrics.log(1, {f"seconds/{name}": value for name, value in seconds.items()})
    assert read_run(folder.path).total("seconds/others") == 10 - 7 - 1.5 - 0.5 + 4
    folder.metrics.close()


def test_an_example_is_the_end_of_a_response():
    row = {"uid": "a", "prompt": "?", "response": "a" * 2000 + "the end", "verdict": "wrong", "reward": 0.0}
    (shown,) = rundata.examples([{**row, "length": 9}])
    assert shown.response.endswith("athe end") and shown.cut + len(shown.response) == 2007


def test_engines_wait_for_the_slowest_and_one_that_the_trace_cuts_off_counts_for_nothing():
    def engine(*counts: tuple[int, int]) -> Record:
        return Record([], [Count("responses", at * SECOND, left, 0) for at, left in counts], 0)

    driver = Record([Span("rollout", 0, 10 * SECOND, 1)], [], 0)
    records = {"driver": driver, "engine0": engine((0, 40), (8, 0)), "engine1": engine((0, 40), (4, 0))}
    tail = tail_of(json.loads(trace_text(records, {})))
    assert tail is not None and tail.waiting == pytest.approx(1 - (8 + 4) / (2 * 8))
    assert tail == tail_of(json.loads(trace_text({**records, "engine2": engine((0, 40), (9, 20))}, {})))


def test_advice_rests_on_the_worst_step_and_on_the_newest(tmp_path: Path):
    run = read_run(make_run(tmp_path, "one"))
    for row in run.steps[1:]:
        row["mismatch/ess"] = 0.99
    for row in run.steps:
        row["idle"] = {"rank0": 8.0, "engine0": 4.0}
    run.steps[-1]["entropy/signal"] = 0.05
    said = " ".join(advice(run))
    assert "only 90% of the tokens count" in said and "Entropy ended at 0.050" in said
    assert "The actor ranks are idle 80%" in said and "The engines are idle 40%" in said
    run.folder.config.entropy.rule = "fixed"
    del run.steps[0]["idle"]
    said = " ".join(advice(run))
    assert "Entropy ended" not in said and "are idle" not in said, "no controller; not known of every step"
