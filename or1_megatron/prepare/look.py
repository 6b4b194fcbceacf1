"""`or1 data look FILE`: the problems of a file one after the other, those that are wanted.

A file holds one of three kinds of row, told by its fields: the training schema; a table of `or1 prepare`, kept or
dropped; responses with verdicts, as `or1 eval` and the rollouts of a run leave them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from or1_megatron.data.prompts import ATTEMPTS
from or1_megatron.data.rows import BadRow, read_rows
from or1_megatron.errors import UserError

_NOT_TOLD = ("model_difficulty", "model_correct", "uid", "licence", "origin")  # of info: has a place of its own


@dataclass(frozen=True)
class Wanted:
    """Which rows. source, verdict, reason: the whole word, * stands for any part of it; empty: any."""

    source: str = ""
    verdict: str = ""
    reason: str = ""
    low: float | None = None  # share of right answers, both ends included; None: any, and rows without one too
    high: float | None = None
    model: str = ""  # whose share; empty: the only one


@dataclass(frozen=True)
class Item:
    """One screen. `facts` are told in one line; `parts` are (heading, text), one below the other."""

    place: str
    source: str
    verdict: str = ""
    reason: str = ""
    shares: dict[str, float] = field(default_factory=dict)  # model -> share of right answers
    facts: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = ()


def wanted(source: str, verdict: str, reason: str, difficulty: str, model: str) -> Wanted:
    """difficulty: LOW:HIGH, shares from 0 to 1, either may be left out. Raises UserError."""
    low, colon, high = difficulty.partition(":")
    try:
        least = float(low) if low.strip() else 0.0
        most = float(high) if high.strip() else 1.0
    except ValueError:
        least, most = 1.0, 0.0
    if difficulty and (not colon or not 0 <= least <= most <= 1):
        raise UserError(
            f"--difficulty {difficulty}: use LOW:HIGH, shares of right answers with 0 <= LOW <= HIGH <= 1, as 0.1:0.5"
        )
    return Wanted(source, verdict, reason, least if difficulty else None, most if difficulty else None, model)


def items(path: Path, filters: Wanted) -> Iterator[Item]:
    """In the file's order. Raises UserError: not such a file, a broken row, no row, none that is wanted."""
    shares = _shares_of_responses(path) if filters.low is not None else {}
    found, met = 0, Meeting()
    for where, row in read_rows(path):
        if isinstance(row, BadRow):
            raise UserError(f"{path} {where} is {row.reason}: {row.detail}")
        item = _item(path, where, row, shares)
        met.note(item)
        if _is_wanted(item, filters):
            found += 1
            yield item
    if not met.rows:
        raise UserError(f"{path} holds no row")
    if not found:
        raise UserError(f"{path}: none of its {met.rows:,} rows is wanted; {met.there_are()}")


class Meeting:
    """What was met on the way, to say it where nothing of it was wanted."""

    def __init__(self) -> None:
        self.rows = 0
        self._words: dict[str, Counter[str]] = {"source": Counter(), "verdict": Counter(), "reason": Counter()}
        self._with_share = 0

    def note(self, item: Item) -> None:
        self.rows += 1
        for name, counts in self._words.items():
            counts[getattr(item, name)] += 1
        self._with_share += bool(item.shares)

    def there_are(self) -> str:
        told = [
            f"{name}: " + ", ".join(f"{word} ({count:,})" for word, count in counts.most_common(8) if word)
            for name, counts in self._words.items()
            if any(counts)
        ]
        return "; ".join([*told, f"with a difficulty: {self._with_share:,}"])


def _is_wanted(item: Item, filters: Wanted) -> bool:
    for name in ("source", "verdict", "reason"):
        pattern = getattr(filters, name)
        if pattern and not fnmatchcase(getattr(item, name), pattern):
            return False
    if filters.low is None or filters.high is None:
        return True
    if len(item.shares) > 1 and not filters.model:
        raise UserError(f"{item.place} has the difficulty for {', '.join(item.shares)}; choose one with --model")
    share = item.shares.get(filters.model) if filters.model else next(iter(item.shares.values()), None)
    return share is not None and filters.low <= share <= filters.high


def _item(path: Path, where: str, row: dict[str, Any], shares: dict[str, float]) -> Item:
    place = f"{path} {where}"
    if "response" in row and "verdict" in row:
        return _response(place, row, shares)
    if {"problem", "answer", "uid"} <= row.keys():
        return _prepared(place, row)
    if "prompt" in row and "reward_model" in row:
        return _training(place, row)
    raise UserError(
        f"{place}: its fields {', '.join(row)} are not known; or1 data look shows training files (prompt, "
        "reward_model), tables of or1 prepare (uid, problem, answer) and responses (response, verdict)"
    )


def _training(place: str, row: dict[str, Any]) -> Item:
    found = row.get("extra_info")
    info: dict[str, Any] = found if isinstance(found, dict) else {}
    gold = row["reward_model"].get("ground_truth") if isinstance(row["reward_model"], dict) else row["reward_model"]
    prompt = row["prompt"]
    if isinstance(prompt, list):
        told = [(str(m.get("role")), str(m.get("content"))) for m in prompt if isinstance(m, dict)]
        parts = [("problem" if role == "user" else role, content) for role, content in told]
    else:
        parts = [("problem", str(prompt))]
    facts = (row.get("ability"), info.get("uid"), info.get("licence"), info.get("origin"))
    return Item(
        place,
        str(row.get("data_source") or ""),
        shares=_shares(info),
        facts=_said(*facts),
        parts=(*parts, ("answer", _text(gold)), *_rest(info)),
    )


def _prepared(place: str, row: dict[str, Any]) -> Item:
    try:
        info = json.loads(row.get("info") or "{}")
    except ValueError:
        info = {"info": row["info"]}
    reason, detail = str(row.get("reason") or ""), str(row.get("detail") or "")
    parts = [(f"dropped: {reason}", detail or "-")] if reason else []
    # of a row that its source could not read nothing is known but its number
    parts += [(name, str(row[name])) for name in ("problem", "answer", "solution") if row.get(name)]
    return Item(
        place,
        str(row.get("source") or str(row["uid"]).rpartition("/")[0]),
        reason=reason,
        shares=_shares(info),
        facts=_said(row["uid"], row.get("ability"), row.get("licence"), row.get("origin")),
        parts=(*parts, *_rest(info)),
    )


def _response(place: str, row: dict[str, Any], shares: dict[str, float]) -> Item:
    uid, verdict = str(row.get("uid") or ""), str(row["verdict"])
    cut = "cut at the limit" if row.get("truncated") else ""
    length = f"{row['length']:,} tokens" if isinstance(row.get("length"), int) else ""
    step = f"step {row['step']}" if row.get("step") is not None else ""
    number = f"response {row['index']}" if row.get("index") is not None else ""
    return Item(
        place,
        str(row.get("data_source") or ""),
        verdict=verdict,
        shares={"of this file": shares[uid]} if uid in shares else {},
        facts=_said(verdict, uid, step, number, length, cut),
        parts=(
            ("prompt", str(row.get("prompt") or "")),
            (f"response: {verdict}", str(row["response"])),
            ("answer", _text(row.get("ground_truth"))),
        ),
    )


def _shares_of_responses(path: Path) -> dict[str, float]:
    """uid -> share of its responses that are right; empty for a file of another kind."""
    right: Counter[str] = Counter()
    all_of: Counter[str] = Counter()
    for _, row in read_rows(path):
        if isinstance(row, BadRow) or "response" not in row or "verdict" not in row:
            return {}
        all_of[str(row.get("uid"))] += 1
        right[str(row.get("uid"))] += row["verdict"] == "correct"
    return {uid: right[uid] / count for uid, count in all_of.items()}


def _shares(info: dict[str, Any]) -> dict[str, float]:
    """Of the published failed attempts of 16; where `or1 prepare` counted them itself, of those."""
    failed, counted = info.get("model_difficulty"), info.get("model_correct")
    shares = {}
    if isinstance(failed, dict):
        shares |= {name: 1 - n / ATTEMPTS for name, n in failed.items() if isinstance(n, int | float)}
    if isinstance(counted, dict):
        shares |= {name: pair[0] / pair[1] for name, pair in counted.items() if isinstance(pair, list) and pair[1]}
    return shares


def _rest(info: dict[str, Any]) -> list[tuple[str, str]]:
    told = [f"{name}: {_text(v)}" for name, v in info.items() if name not in _NOT_TOLD and v not in (None, "", [], {})]
    return [("info", "\n".join(told))] if told else []


def _text(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _said(*facts: Any) -> tuple[str, ...]:
    return tuple(str(fact) for fact in facts if fact)


def look(path: Path, filters: Wanted, limit: int | None) -> None:
    """Shows them: by keys on a terminal, one after the other elsewhere. limit: None is 10 elsewhere, else all."""
    from or1_megatron.prepare.pager import is_terminal, page, print_all

    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: use 1 or more")
    if is_terminal():
        page(islice(items(path, filters), limit))
    else:
        print_all(islice(items(path, filters), limit or 10))
