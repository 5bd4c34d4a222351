"""The life of an alarm: something that a person should know of, and who has been told.

Theory
------
An alarm is known by its site and its key. While it stands, a sink (an address to which alarms go)
is told of it once every `Rule.repeat`; it is told once that it is over, where the sink can make use
of that, and not before it has been over for a while: what comes and goes is one alarm. A sink that
cannot be told keeps its reaction: it is tried again, later each time, for as long as it takes.

::

               raised                    told               repeat has passed
    (none) ─────────▶ STANDS, untold ──────────▶ STANDS, told ────────────────▶ (told again)
       ▲                ▲                          │
       │ forgotten      │ raised again             │ cleared
       └──────────── OVER, told ◀── told ── OVER, untold

What only happened, and is no state that could end, is raised with `once`: each sink is told, and
that is all.

Callers: handlers raise alarms by ``job.alarm``, `dispatcher` and `caxev.alarms` those of the
engine; `caxev.alarms.Desk` asks what to tell whom, `database` stores it. Pure: `now` (UTC) and the
jitter are arguments. Property-tested in tests/test_alarms.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import Final, NamedTuple, Protocol

from attrs import Factory, evolve, field, frozen

from caxev.core.escapes import escaped
from caxev.core.ledger import Reaction, delay

CALM: Final = timedelta(minutes=5)
"""How long an alarm must be over before people are told that it is."""
LATER: Final = 6
"""A sink's first delay is that of a reaction's sixth failure: some minutes."""
LISTED: Final = 20
"""How many others a message names that stands for many."""
FEW: Final = 5
"""Up to so many alarms that are due together are told one by one."""


class Severity(StrEnum):
    """How bad it is."""

    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """The worse, the higher."""
        return list(Severity).index(self)


def _line(text: object) -> str:
    return escaped(" ".join(str(text).split()))[:500]


def _details(details: Mapping[str, object]) -> dict[str, str]:
    return {
        _line(name): "\n".join(map(escaped, str(value).splitlines()))[:5000]
        for name, value in details.items()
        if value not in (None, "")
    }


@frozen
class Alarm:
    """What a person should know.

    `key` tells this alarm from all others of the site. `summary` is one line, `run` the run's label
    where it is about one, `details` are further lines by name. `once`: it happened, and cannot
    be over.
    """

    site: str
    key: str
    summary: str = field(converter=_line)
    severity: Severity = field(default=Severity.ERROR, converter=Severity)
    run: str = ""
    details: Mapping[str, str] = field(factory=dict, converter=_details)
    once: bool = False

    @property
    def id(self) -> str:
        """Eight characters by which people, and mail readers, know it again."""
        return sha256(f"{self.site}\n{self.key}".encode()).hexdigest()[:8]


class Alarms(Protocol):
    """Where alarms are raised: `caxev.alarms.Desk`."""

    def sound(self, alarm: Alarm) -> None:
        """Raise an alarm; nothing new where it stands. Neither waits nor fails."""
        ...

    def clear(self, key: str) -> None:
        """Say that an alarm is over; nothing where none stands. Neither waits nor fails."""
        ...

    async def raise_and_keep(self, alarm: Alarm) -> None:
        """Raise an alarm; returns when it is kept in the database. Raises what that raises."""
        ...

    async def clear_and_keep(self, key: str) -> None:
        """Say that an alarm is over; returns when that is kept. Raises what that raises."""
        ...


class Silent:
    """No alarms are raised: `Alarms` for those who have nobody to tell."""

    def sound(self, alarm: Alarm) -> None:
        """Do nothing."""

    def clear(self, key: str) -> None:
        """Do nothing."""

    async def raise_and_keep(self, alarm: Alarm) -> None:
        """Do nothing."""

    async def clear_and_keep(self, key: str) -> None:
        """Do nothing."""


@frozen
class Rule:
    """What a sink is told: alarms that are at least so bad, each again after `repeat`.

    `resolves`: it can make use of word that an alarm is over. That is told after `calm`.
    """

    sink: str
    severity: Severity = Severity.WARNING
    repeat: timedelta = timedelta(hours=24)
    resolves: bool = True
    calm: timedelta = field(factory=lambda: CALM)


@frozen
class Told:
    """What one sink knows of an alarm.

    `raised`: when it was last told that it stands; `over`: it was told since that it is over.
    After `tries` failures in a row the next is not before `due`; `why` is the last one's reason.
    """

    raised: datetime | None = None
    over: bool = False
    tries: int = 0
    due: datetime | None = None
    why: str = ""


UNTOLD: Final = Told()


@frozen
class Standing:
    """An alarm that stands `since` then, or is `over` since then; what each sink was told."""

    alarm: Alarm
    since: datetime
    over: datetime | None = None
    told: Mapping[str, Told] = Factory(dict)

    @property
    def stands(self) -> bool:
        return self.over is None

    @property
    def untold(self) -> dict[str, str]:
        """The sinks that could not be told what they should know, and why."""
        return {sink: told.why for sink, told in self.told.items() if told.tries}


class News(NamedTuple):
    """What a sink should hear of an alarm, and when."""

    at: datetime
    over: bool


def raised(before: Standing | None, alarm: Alarm, now: datetime) -> Standing:
    """Return how an alarm stands once it is raised."""
    if before is None:
        return Standing(alarm, now)
    if before.stands and not alarm.once:
        return evolve(before, alarm=alarm)
    return Standing(alarm, now, told=before.told)


def cleared(before: Standing, now: datetime) -> Standing:
    """Return how an alarm stands once what it was about has ended."""
    return before if before.over or before.alarm.once else evolve(before, over=now)


def news(standing: Standing, rule: Rule) -> News | None:
    """What that sink is to be told next; None: nothing, as things are."""
    if standing.alarm.severity.rank < rule.severity.rank:
        return None
    told = standing.told.get(rule.sink, UNTOLD)
    found = _ended(standing, told, rule) if standing.over else _begun(standing, told, rule)
    if found is None or told.due is None or told.due <= found.at:
        return found
    return found._replace(at=told.due)


def _begun(standing: Standing, told: Told, rule: Rule) -> News | None:
    if told.raised is None or told.over:
        return News(standing.since, over=False)
    again = told.raised + rule.repeat
    if not standing.alarm.once:
        return News(again, over=False)
    return News(standing.since, over=False) if standing.since >= again else None


def _ended(standing: Standing, told: Told, rule: Rule) -> News | None:
    if told.raised is None or told.over or not rule.resolves or standing.over is None:
        return None
    return News(standing.over + rule.calm, over=True)


def delivered(standing: Standing, sink: str, now: datetime, *, over: bool) -> Standing:
    """Return how an alarm stands once a sink has been told of it, or that it is over."""
    before = standing.told.get(sink, UNTOLD)
    told = Told(before.raised, over=True) if over else Told(now)
    return evolve(standing, told={**standing.told, sink: told})


def undelivered(
    standing: Standing, sink: str, why: str, now: datetime, *, jitter: float
) -> Standing:
    """Return how an alarm stands once a sink could not be told; `jitter` is in [0, 1)."""
    before = standing.told.get(sink, UNTOLD)
    due = now + timedelta(seconds=delay(before.tries + LATER, jitter))
    told = evolve(before, tries=before.tries + 1, due=due, why=_line(why))
    return evolve(standing, told={**standing.told, sink: told})


def forgettable(standing: Standing, rules: Iterable[Rule], now: datetime) -> bool:
    """Whether nobody needs to hear of it any more, nor to be spared hearing of it again."""
    if standing.stands and not standing.alarm.once:
        return False
    return all(_settled(standing, rule, now) for rule in rules)


def _settled(standing: Standing, rule: Rule, now: datetime) -> bool:
    told = standing.told.get(rule.sink, UNTOLD)
    if news(standing, rule) is not None:
        return False
    return told.raised is None or told.over or now >= told.raised + rule.repeat


def urgency(standing: Standing) -> tuple[int, datetime]:
    """The order in which alarms are told and listed: the worst first, then the oldest."""
    return -standing.alarm.severity.rank, standing.since


def messages(due: Iterable[Standing]) -> list[list[Standing]]:
    """Which alarms that are due together go into one message: each its own, unless it is many."""
    ordered = sorted(due, key=urgency)
    return [[one] for one in ordered] if len(ordered) <= FEW else [ordered]


def together(batch: Sequence[Standing]) -> Alarm:
    """One alarm that stands for all of these: the first of them, and what the others say."""
    first, *others = [standing.alarm for standing in batch]
    if not others:
        return first
    listed = [other.summary for other in others[:LISTED]]
    more = len(others) - len(listed)
    return evolve(
        first,
        summary=f"{first.summary} (and {len(others)} more: caxev alarms --site {first.site})",
        details={**first.details, "also": "\n".join([*listed, *([f"{more} more"] * (more > 0))])},
    )


# -- what the engine raises -----------------------------------------------------------------------

PARKED: Final = "failed "
"""The keys of alarms about reactions begin with this; the reaction's key follows."""


REFUSED: Final = "refused "
"""So do those about refusals that reactions wait for; the refusal follows."""
DEAF: Final = "deaf "
"""So do those about attempts that do not stop; they end with their process."""


def parked_key(reaction: Reaction) -> str:
    """Return the key of the alarm about a reaction that has failed."""
    return PARKED + reaction.id


def parked(reaction: Reaction, run: str) -> Alarm:
    """A reaction was parked as failed: nothing happens until a person says so."""
    return Alarm(
        reaction.site,
        parked_key(reaction),
        f"{reaction.handler} has failed for {run} ({reaction.event})",
        run=run,
        details={"why": reaction.note, "what to do": "caxev explain shows more; then: caxev retry"},
    )


UNRECORDED: Final = "have the database take it (a validator, say); it is tried every 5 minutes"


def unrecorded(reaction: Reaction, run: str) -> Alarm:
    """A reaction is not tried any more, and the ledger refuses to record that: no retry sees it."""
    alarm = parked(reaction, run)
    return evolve(
        alarm,
        summary=f"{alarm.summary}, which the ledger refuses to record",
        details={**alarm.details, "what to do": UNRECORDED},
    )


def same_cause(one: Alarm, other: Alarm) -> bool:
    """Whether both are about reactions of one handler to one run that failed for one reason.

    Several changes of a run lead to the same handler: what it cannot do is one trouble.
    """
    if one.run != other.run or one.details.get("why") != other.details.get("why"):
        return False
    keys = (one.key, other.key)
    return all(key.startswith(PARKED) for key in keys) and len({*map(_acting, keys)}) == 1


def _acting(key: str) -> tuple[str, str, str]:
    """Site, run and handler of the reaction that such an alarm is about."""
    try:
        site, run, *_, handler = json.loads(key.removeprefix(PARKED))
    except ValueError:  # what somebody wrote into the database is about itself alone
        return key, "", ""
    return str(site), str(run), str(handler)


def deaf_key(reaction: Reaction) -> str:
    """Return the key of the alarm about a reaction that does not stop."""
    return DEAF + reaction.id


def deaf(reaction: Reaction, why: str, run: str) -> Alarm:
    """A handler goes on after it was cancelled; a shielded wait or a disk that hangs does too."""
    return Alarm(
        reaction.site,
        deaf_key(reaction),
        f"{reaction.handler} does not stop for {run} ({reaction.event})",
        run=run,
        details={
            "why it should": why,
            "what to do": "a handler must let trio.Cancelled pass; to be rid of it, restart the "
            "listener",
        },
    )


def refused_key(reaction: Reaction) -> str:
    """Return the key of the alarm about what a reaction that is hindered waits for."""
    return REFUSED + reaction.note[:200]


def refused(reaction: Reaction) -> Alarm:
    """Somebody must lift something before reactions go on: one alarm, however many wait for it."""
    return Alarm(
        reaction.site,
        refused_key(reaction),
        f"{reaction.site}: reactions wait until somebody lifts a refusal",
        details={
            "why": reaction.note,
            "what to do": "lift it; they go on by themselves within an hour",
        },
    )


def crowded(site: str, number: int) -> Alarm:
    """More alarms stand than anybody reads one by one."""
    return Alarm(
        site,
        "crowded",
        f"more than {number} alarms at {site}: further ones are not told one by one",
        Severity.CRITICAL,
        details={"what to do": "caxev reactions --failed lists what has failed"},
    )


def missing_key(handler: str) -> str:
    """Return the key of the alarm about a handler that is not installed."""
    return f"missing {handler}"


def missing(site: str, handler: str) -> Alarm:
    """Reactions wait for a handler that this listener was started without."""
    return Alarm(
        site,
        missing_key(handler),
        f"{site}: reactions wait for the handler {handler}, which is not installed",
        details={
            "what to do": "start the listener with the file of handlers that it had (--handlers)"
        },
    )


MALFORMED: Final = "malformed "
"""The keys of alarms about malformed documents begin with this; which document it is follows."""


def malformed(site: str, what: str, why: str, run: str) -> Alarm:
    """A document of caxev's own is malformed; `run` is what it was about, if known."""
    return Alarm(
        site,
        MALFORMED + what,
        f"a document of caxev's own{run and f' about {run}'} is malformed: {why}",
        run=run,
        details={
            "document": what,
            "what to do": "it is set aside in the ledger, and what it was about fires again; find "
            "out who wrote it, then: caxev alarms clear; after a week it is removed",
        },
    )


def gap(site: str, why: str) -> Alarm:
    """A stretch of history was lost; a scan makes up for it."""
    return Alarm(
        site,
        "gap of history",
        f"a gap of history at {site}: all runs are scanned to make up for it",
        Severity.WARNING,
        details={"why": why},
        once=True,
    )
