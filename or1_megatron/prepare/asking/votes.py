"""Quality votes of judge models (6.3), and dropping by them: a problem stays when enough say that it is well posed.

A judge is a model behind OpenAI's protocol, or one that the project's own engines run. `quality_votes` stores in `info`

    quality  {model: [votes to keep, votes to drop, replies that were no vote]}

Votes are kept as they come, so that an interrupted step asks only for those that are missing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from or1_megatron.errors import UserError
from or1_megatron.prepare.asking.endpoint import check_address, key_from
from or1_megatron.prepare.asking.judge import Judge, VotesOptions, judges_of, question
from or1_megatron.prepare.asking.polling import Tally, ask_endpoints, ask_engines
from or1_megatron.prepare.ledger import Ledger
from or1_megatron.prepare.step import (
    Context,
    Drop,
    Finished,
    JudgeRow,
    Row,
    RowStep,
    Step,
    Table,
    TableStep,
    check_positive,
    information,
    option,
    with_information,
)
from or1_megatron.prepare.weights import weights_sum

_CHARACTERS_PER_TOKEN = 4


def collect_votes(table: Table, options: VotesOptions, context: Context) -> Iterator[Row]:
    """Every row, judged ones with their votes.

    Raises Finished after an estimate that is all that is wanted; UserError: options, an endpoint that cannot be used or
    is silent for too long. Votes that had come by then are not asked for again.
    """
    judges = judges_of(options)
    keys = _keys(judges)
    with Ledger(context.scratch / "votes.jsonl", _made_with(judges, options, context), context.message) as ledger:
        tally = Tally(ledger, options.votes * len(judges), context.progress)
        for line in estimate_lines(table, judges, options, tally):
            context.message(line)
        if options.estimate_only:
            raise Finished("quality_votes: no vote was asked for and nothing is written; estimate_only=false votes")
        ask_endpoints(table, keys, options, context, tally)
        for judge in judges:
            if not judge.endpoint:
                ask_engines(table, judge, options, context, tally)
        context.progress(table.num_rows - tally.complete)
        by_judge = {judge: [0, 0, 0] for judge in judges}
        for rows in table.batches():
            for row in rows:
                if not options.judges(row):
                    yield row
                    continue
                votes = {judge.name: tally.of(row, judge) for judge in judges}
                for judge in judges:
                    by_judge[judge] = [a + b for a, b in zip(by_judge[judge], votes[judge.name], strict=True)]
                yield with_information(row, quality={**votes_of(row), **votes})
        for judge, (keep, drop, none) in by_judge.items():
            context.message(f"quality_votes: {judge.name}: {keep} to keep, {drop} to drop, {none} no vote")


def votes_of(row: Row) -> dict[str, list[int]]:
    """Judge -> [to keep, to drop, no vote], as the row has them. Raises UserError for another kind of `quality`."""
    found = information(row).get("quality", {})
    if not isinstance(found, dict) or not all(isinstance(votes, list) for votes in found.values()):
        raise UserError(f"{row['uid']}: info.quality is {found!r}, not the votes of judges; rename it or drop it")
    return found


def _made_with(judges: list[Judge], options: VotesOptions, context: Context) -> dict[str, Any]:
    asked = hashlib.sha256(question("").encode()).hexdigest()[:16]
    local = {name: [total, *options.settings] for name, total in _weights(options).items()}
    kept = {name: getattr(options, name) for name in ("votes", "temperature", "max_tokens")}
    return {**kept, "asked": asked, "seed": context.seed, "engines": local}


def estimate_lines(table: Table, judges: list[Judge], options: VotesOptions, tally: Tally) -> list[str]:
    """Requests, tokens and price of the votes that are missing, as far as they can be known before."""
    problems = missing = 0
    requests, tokens_in, replies = Counter[str](), Counter[str](), Counter[str]()
    for rows in table.batches():
        for row in rows:
            if not options.judges(row):
                continue
            problems += 1
            tokens = len(question(row["problem"])) / _CHARACTERS_PER_TOKEN
            for judge in judges:
                left = max(0, options.votes - sum(tally.of(row, judge)))
                asked = -(-left // options.per_request)
                missing += left
                requests[judge.name] += asked
                replies[judge.name] += left
                tokens_in[judge.name] += round(asked * tokens)
    total = problems * len(judges) * options.votes
    lines = [
        f"quality_votes: {problems} problems x {len(judges)} judges x {options.votes} votes; {total - missing} of "
        f"{total} votes are there"
    ]
    costs = []
    for judge in judges:
        tokens_out = replies[judge.name] * options.expected_reply
        where = f"{requests[judge.name]} requests" if judge.endpoint else "own engines"
        line = f"  {judge.name}: {where}, about {tokens_in[judge.name] / 1e6:.3f} M tokens in, "
        line += f"{tokens_out / 1e6:.3f} M out"
        if judge.endpoint:
            costs.append((tokens_in[judge.name] * judge.price_in + tokens_out * judge.price_out) / 1e6)
            line += f"; at {judge.price_in:g} in and {judge.price_out:g} out a million: {costs[-1]:.2f}"
        lines.append(line)
    if costs:
        lines.append(
            f"  in all about {sum(costs):.2f} (tokens: {_CHARACTERS_PER_TOKEN} characters, replies: "
            f"{options.expected_reply} each)"
        )
    return lines


def ready(options: VotesOptions) -> None:
    """Raises UserError for a judge that is nowhere, an endpoint that is no address, a key that is not in the
    environment."""
    for judge in _keys(judges_of(options)):
        check_address(judge.endpoint)


def _keys(judges: list[Judge]) -> dict[Judge, str]:
    return {judge: key_from(judge.key_env) for judge in judges if judge.endpoint}


def _weights(options: VotesOptions) -> dict[str, int]:
    """Of the judges that the project's engines run."""
    local = [judge for judge in judges_of(options) if not judge.endpoint]
    return {judge.name: weights_sum(judge.model, options.settings) for judge in local}


@dataclass(frozen=True)
class KeepOptions:
    keep: int = option(9, "votes to keep that a problem needs, of all judges together")
    models: tuple[str, ...] = option((), "names in info.quality of the judges that count; empty: all")
    ability: str = option("math", "problems that must have votes, others pass; empty: all")

    def __post_init__(self) -> None:
        check_positive(self, "keep")


def open_keep(options: KeepOptions) -> JudgeRow:
    """The judge raises UserError at a row without votes, and where more votes are wanted than there are."""

    def judge(row: Row) -> Row | Drop:
        if options.ability and row["ability"] != options.ability:
            return row
        quality = votes_of(row)
        if not quality or not quality.keys() >= set(options.models):
            raise UserError(
                f"keep_quality: {row['uid']} has votes of {', '.join(quality) or 'nobody'}, not of "
                f"{', '.join(options.models) or 'any judge'}; run quality_votes before, or give other models"
            )
        votes = [quality[name] for name in options.models or quality]
        wanted, number = sum(mine[0] for mine in votes), sum(map(sum, votes))
        if options.keep > number:
            raise UserError(f"keep={options.keep} of {number} votes drops everything ({row['uid']}); use fewer")
        if wanted >= options.keep:
            return row
        return Drop("too_few_quality_votes", f"{wanted} of {number}, needs {options.keep}")

    return judge


STEPS: tuple[Step, ...] = (
    TableStep("quality_votes", VotesOptions, collect_votes, ready=ready, depends_on=lambda it: _weights(it) or None),
    RowStep("keep_quality", KeepOptions, open_keep),
)
