"""What a run's numbers say in words: where the time goes and what to try, with the figure each sentence rests on."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from or1_megatron.report.rundata import RunData

_PARTS = ("sync", "probe", "reward_wait", "old_log_probs", "reference_log_probs", "save", "entropy", "history")
_WINDOW = 8  # steps whose mean reward is compared with that of others


def advice(run: RunData) -> list[str]:
    """Sentences, the most important first."""
    return [*_time(run), *_rollout(run), *_update(run), *_learning(run)]


def _time(run: RunData) -> Iterator[str]:
    hours = run.hours()
    total = hours["total"] or 1.0
    shares = {part: hours[part] / total for part in ("rollout", "update", "others")}
    largest = max(shares, key=shares.__getitem__)
    listed = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    yield f"Most of a step is {largest}: {listed} (Table 7 of the paper: 72 %, 9 %, 19 %)."
    others = hours["others"] * 3600
    for part in _PARTS:
        seconds = run.total(f"seconds/{part}")
        if seconds > 0.05 * total * 3600:
            yield (
                f"{part} alone takes {seconds / (total * 3600):.0%} of the time, {seconds / others:.0%} of others. "
                f"{_HINTS[part]}"
            )


_HINTS = {
    "sync": "Larger rollout.bucket_mb, or rollout.transport=auto where another is set, shorten the push.",
    "probe": "rollout.probe_interval=10 probes every tenth push.",
    "reward_wait": "Scoring does not keep up with decoding: raise reward.num_workers.",
    "old_log_probs": "With one SGD step per rollout loss.old_log_probs=current needs no such pass.",
    "reference_log_probs": "It serves loss.kl_coefficient only, which the paper leaves at 0 (3.2.6).",
    "save": "A larger save_interval writes fewer checkpoints.",
    "entropy": "entropy.signal=sampled needs no actor pass.",
    "history": "The run folder is on a slow disk.",
}


def _rollout(run: RunData) -> Iterator[str]:
    if run.tail and run.tail.share > 0.2:
        yield (
            f"{run.tail.share:.0%} of rollout waits for the longest 5 % of the responses ({run.tail.rollouts} rollouts "
            "of the trace). More prompts or larger groups per engine fill that time; more engines do not shorten it."
        )
    if run.tail and run.tail.waiting > 0.05:
        yield (
            f"Engines stand still {run.tail.waiting:.0%} of the rollout until the slowest has ended: their shares of "
            "the batch are uneven."
        )
    truncated = run.mean("truncated")
    if truncated > 0.1:
        wrong = " and count as wrong" if run.folder.config.reward.truncated == "zero" else ""
        yield (
            f"{truncated:.0%} of the responses are cut at the length limit{wrong}; a longer stage, or a higher "
            "rollout.max_response_length, would let them end."
        )
    generated, kept = run.total("groups/generated"), run.total("groups/kept")
    if generated and kept < 0.5 * generated:
        yield (
            f"Only {kept / generated:.0%} of the groups carry a gradient; the rest were rolled out for nothing. Drop "
            "solved problems (drop_solved) or choose others."
        )


def _update(run: RunData) -> Iterator[str]:
    mfu = run.mean("mfu")
    if mfu:
        speed = run.mean("tokens_per_second/update")
        yield f"The update runs at {mfu:.1%} of the peak (MFU), {speed:.0f} tokens/s."
    idle = [row["idle"] for row in run.steps if isinstance(row.get("idle"), dict)]
    seconds = run.total("seconds/step")
    for kind, does in (("rank", "actor ranks"), ("engine", "engines")):
        waits = [
            statistics.fmean([v for k, v in row.items() if k.startswith(kind)])
            for row in idle
            if any(k.startswith(kind) for k in row)
        ]
        if waits and len(idle) == len(run.steps) and sum(waits) > 0.3 * seconds:
            yield f"The {does} are idle {sum(waits) / seconds:.0%} of the time, while the other side works."


def _learning(run: RunData) -> Iterator[str]:
    yield from _mismatch(run)
    yield from _entropy(run)
    empty = sum(1 for row in run.steps if row.get("groups/kept") == 0)
    if empty:
        yield f"{empty} of {len(run.steps)} steps had no informative group and no update."


def _mismatch(run: RunData) -> Iterator[str]:
    measured = [row for row in run.steps if isinstance(row.get("mismatch/ess"), float)]
    worst = min(measured, key=lambda row: row["mismatch/ess"], default={"mismatch/ess": 1.0})
    if worst["mismatch/ess"] >= 0.95:
        return
    loss = run.folder.config.loss
    if loss.importance_cap > 0:
        remedy = f"loss.importance_cap={loss.importance_cap:g} corrects for it."
    elif loss.old_log_probs == "engine":
        remedy = "loss.old_log_probs=engine has it in the ratio, where it is clipped."
    else:
        remedy = "loss.importance_cap=2 corrects for it."
    cause = "The samples are of older weights" if worst.get("staleness", 0) > 0 else "Engine and actor disagree"
    yield f"{cause}: at the worst step only {worst['mismatch/ess']:.0%} of the tokens count (ESS). {remedy}"


def _entropy(run: RunData) -> Iterator[str]:
    entropy = [value for _, value in run.series("entropy/signal")]
    target = run.folder.config.entropy.target
    if entropy and run.folder.config.entropy.rule in ("paper", "released") and entropy[-1] < 0.5 * target:
        yield (
            f"Entropy ended at {entropy[-1]:.3f}, less than half of its target {target:g}: the policy collapses faster "
            "than the coefficient grows; a larger entropy.delta reacts sooner."
        )
    newest = [row for row in run.steps if row.get("stage") == run.steps[-1].get("stage") and "entropy/alpha" in row]
    windows = [newest[end - _WINDOW : end] for end in range(len(newest), _WINDOW - 1, -_WINDOW)][::-1]
    reward, alpha = (
        [statistics.fmean(row[name] for row in window) for window in windows]
        for name in ("reward/mean", "entropy/alpha")
    )
    best = max(range(len(windows)), key=reward.__getitem__, default=0)
    if windows and reward[-1] < 0.8 * reward[best] and (most := max(alpha[best:])) > alpha[best]:
        yield (
            f"The reward fell from {reward[best]:.2f} about step {windows[best][0]['step']} to {reward[-1]:.2f} while "
            f"the entropy coefficient rose from {alpha[best]:.3f} to {most:.3f}: the entropy loss outweighs the "
            "policy's. A lower entropy.target, or a smaller entropy.delta, leaves more to the policy."
        )
