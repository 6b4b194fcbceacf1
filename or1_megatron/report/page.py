"""The page: one HTML file that needs no network and no script, light or dark as the reader's system says."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from or1_megatron.accuracy import held_out
from or1_megatron.report.advice import advice
from or1_megatron.report.figures import Figure, figures, gantts
from or1_megatron.report.plots import NUM_COLOURS
from or1_megatron.report.rundata import Example, RunData
from or1_megatron.report.scales import short

LIGHT = ("#2563c9", "#c2590a", "#0d8268", "#8a3fb0", "#6b7280", "#b8912b")
DARK = ("#74a7ff", "#f0985a", "#4cc9a8", "#c792e8", "#9aa3af", "#e2c15c")


def palette(colours: Sequence[str]) -> str:
    """The custom properties that plots draw with."""
    assert len(colours) == NUM_COLOURS
    return "".join(f"--c{i}:{colour};" for i, colour in enumerate(colours))


STYLE = f"""
:root{{color-scheme:light dark;--paper:#fff;--ground:#f4f5f7;--ink:#1c2330;--faint:#5b6472;--grid:#e3e6ea;
--idle:#e6e8ec;{palette(LIGHT)}}}
@media(prefers-color-scheme:dark){{:root{{--paper:#1b1f27;--ground:#12151b;--ink:#e6e9ef;--faint:#a3acba;--grid:#313845;
--idle:#2b313c;{palette(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}}
main{{max-width:1280px;margin:0 auto;padding:20px}}
h1{{font-size:24px;margin:8px 0 4px;overflow-wrap:anywhere}} h2{{font-size:18px;margin:28px 0 10px}}
h3{{font-size:15px;margin:0}}
.faint,figcaption{{color:var(--faint);font-size:13px;margin:0 0 6px}}
.cards{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:14px}}
figure,.card{{margin:0;background:var(--paper);border:1px solid var(--grid);border-radius:8px;padding:12px 14px;
min-width:0}}
figure.wide{{margin-top:28px}}
svg{{display:block;width:100%;height:auto}}
svg text{{fill:var(--faint);font:12px system-ui,sans-serif}} svg text.inside{{fill:var(--paper);font-size:11px}}
.grid{{stroke:var(--grid);stroke-width:1}} .level{{stroke:var(--faint);stroke-dasharray:2 4}}
.line{{fill:none;stroke-width:2;stroke-linejoin:round}} .hover{{opacity:0}} .hover:hover{{opacity:1}}
.curve{{fill:none;stroke:var(--ink);stroke-width:1.5}}
.legend{{margin:6px 0 0;font-size:13px;display:flex;flex-wrap:wrap;gap:2px 14px}}
.legend i{{display:inline-block;width:18px;margin-right:6px;vertical-align:middle}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin:14px 0}}
.tiles b{{display:block;font-size:17px;line-height:1.5}}
.scroll{{overflow-x:auto}} table{{border-collapse:collapse;width:100%;font-size:14px}}
th,td{{text-align:right;padding:5px 10px;border-bottom:1px solid var(--grid);white-space:nowrap}}
th:first-child,td:first-child{{text-align:left}} th{{color:var(--faint);font-weight:500}}
ul.advice{{margin:0;padding-left:20px}} ul.advice li{{margin:4px 0}}
pre{{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--ground);border-radius:6px;padding:8px 10px;
margin:6px 0;font:13px/1.45 ui-monospace,monospace;max-height:320px;overflow:auto}}
.narrow{{display:none}} @media(max-width:700px){{main{{padding:12px}}
.broad{{display:none}}.narrow{{display:block}} .cards svg text{{font-size:14px}}}}
"""


def page(runs: Sequence[RunData], refresh_s: int = 0) -> str:
    """The whole document; refresh_s: reload after so many seconds, 0: never."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    reload = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    sections = [
        _head(runs),
        *(f"<h2>What the numbers say{_of(run, runs)}</h2><div class='card'>{_list(advice(run))}</div>" for run in runs),
        _time_table(runs),
        f"<h2>Seconds per step</h2><div class='card'>{_seconds_table(runs)}</div>",
        *(_figure(figure) for figure in gantts(runs)),
        f"<h2>Step by step</h2><div class='cards'>{''.join(_figure(figure) for figure in figures(runs))}</div>",
        *(_examples(run, runs) for run in runs if run.examples),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'><link rel='icon' href='data:,'>"
        f"{reload}<title>{escape(title)}: report</title><style>{STYLE}</style></head><body><main>"
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _of(run: RunData, runs: Sequence[RunData]) -> str:
    return f": {escape(run.name)}" if len(runs) > 1 else ""


def _head(runs: Sequence[RunData]) -> str:
    if len(runs) > 1:
        return "<h1>" + ", ".join(escape(run.name) for run in runs) + "</h1>"
    run, config = runs[0], runs[0].folder.config
    last, rollout = run.steps[-1], run.stages()[-1].rollout
    parallel = config.parallel
    layout = f"tp {parallel.tp}, pp {parallel.pp}, cp {parallel.cp}, dp {config.dp}"
    engines = f"{rollout.num_engines} engine{'s' if rollout.num_engines > 1 else ''}"
    told = (
        f"{config.model.path}; {parallel.num_ranks} ranks ({layout}), {engines}; "
        f"D_R {rollout.rollout_batch_size}, gs {rollout.group_size}, T {rollout.context_length}"
        + (f" in stage {last['stage']} of {len(config.stages)}" if config.stages else "")
    )
    found = [
        ("steps", f"{last['step']} of {config.steps}"),
        ("reward", f"{run.steps[0]['reward/mean']:.1%} → {last['reward/mean']:.1%}"),
        ("time", f"{short(_unit(runs)[1] * (run.hours()['total'] + run.hours()['evaluation']))} {_unit(runs)[0]}"),
        ("seconds per step", f"{run.mean('seconds/step'):.1f}"),
        ("entropy", f"{run.steps[0].get('entropy/signal', 0):.3f} → {last.get('entropy/signal', 0):.3f}"),
    ]
    if accuracies := held_out(run.evaluations):
        found.insert(2, ("held out", f"{accuracies[0][1]:.1%} → {accuracies[-1][1]:.1%}"))
    tiles = "".join(f"<div class='card'><span class='faint'>{name}</span><b>{value}</b></div>" for name, value in found)
    return f"<h1>{escape(run.name)}</h1><p class='faint'>{escape(told)}</p><div class='tiles'>{tiles}</div>"


def _list(sentences: Sequence[str]) -> str:
    return "<ul class='advice'>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _unit(runs: Sequence[RunData]) -> tuple[str, float]:
    """Name and how many make an hour: minutes for runs below an hour."""
    return ("hours", 1) if max(run.hours()["total"] for run in runs) >= 1 else ("minutes", 60)


def _time_table(runs: Sequence[RunData]) -> str:
    """As Tables 7 and 8: total = rollout + update + others."""
    unit, factor = _unit(runs)
    rows = []
    for run in runs:
        hours = run.hours()
        parts = [short(factor * hours[name]) for name in ("total", "rollout", "update", "others", "evaluation")]
        shares = [f"{hours[name] / (hours['total'] or 1):.1%}" for name in ("rollout", "update")]
        batches = [
            (stage.num_sgd_steps, stage.rollout.rollout_batch_size, stage.mini_batch_size, stage.loss.num_reuse)
            for stage in run.stages()
        ]
        rows.append([run.name, *parts, *shares, ", then ".join(map(str, dict.fromkeys(batches)))])
    head = ("run", "total", "rollout", "update", "others", "evaluation", "rollout share", "update share")
    note = "<p class='faint'>total = rollout + policy update + others, as in Tables 7 and 8; evaluation beside it</p>"
    table = _table([*head, "(N_SGD, D_R, D_T, N_reuse)"], rows)
    return f"<h2>{unit.capitalize()}</h2><div class='card'>{note}{table}</div>"


def _seconds_table(runs: Sequence[RunData]) -> str:
    first = ("rollout", "update", "sync", "probe", "reward_wait", "old_log_probs", "entropy", "pack", "prepare")
    names = [
        n for n in (*first, "history", "save", "record", "trace") if any(run.total(f"seconds/{n}") for run in runs)
    ]
    rows = [
        [run.name, f"{run.mean('seconds/step'):.3g}"]
        + [short(run.total(f"seconds/{name}") / len(run.steps)) for name in names]
        for run in runs
    ]
    return _table(["run", "step", *names], rows)


def _figure(figure: Figure) -> str:
    wide = " class='wide'" if figure.wide else ""
    remark = f"<figcaption>{escape(figure.remark)}</figcaption>" if figure.remark else ""
    return f"<figure{wide}><h3>{escape(figure.title)}</h3>{remark}{figure.body}{figure.legend}</figure>"


def _examples(run: RunData, runs: Sequence[RunData]) -> str:
    cards = "".join(_example(example) for example in run.examples)
    note = "right ones of the problems least often right, wrong ones of those most often right, newest step"
    return f"<h2>Examples{_of(run, runs)}</h2><p class='faint'>{note}</p><div class='cards'>{cards}</div>"


def _example(example: Example) -> str:
    cut = f", first {example.cut} characters left out" if example.cut else ""
    return (
        f"<div class='card'><h3>{escape(example.verdict)}, reward {example.reward:g}</h3>"
        f"<p class='faint'>{example.length} tokens{cut}</p><pre>{escape(example.prompt)}</pre>"
        f"<pre>{escape(example.response)}</pre></div>"
    )
