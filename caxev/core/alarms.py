"""The life cycle of an alarm, and of its deliveries.

An alarm is identified by its site and its key. While it is active, each sink (an address to which
alarms are delivered) receives it once every `DeliveryRule.repeat`. A sink that can use it also
receives one message when the alarm is over, but only after `CALM`: an alarm that flaps is one
alarm. A failed delivery is tried again with growing delays until it succeeds.

::

               raised                 delivered               repeat has passed
    (none) ─────────▶ ACTIVE, due ─────────────▶ ACTIVE, delivered ─────────────▶ (due again)
       ▲                ▲                          │
       │ forgotten      │ raised again             │ cleared
       └──────────── OVER, delivered ◀─────── OVER, due

An event that cannot end is raised with `once`: it is delivered once to each sink and forgotten.

Handlers raise alarms by ``job.alarm``; `caxev.engine` and `caxev.alarms` raise those of the
engine. `caxev.alarms.manager.AlarmManager` applies this module, `database` stores the states. Pure:
`now` (UTC) and the jitter are arguments. Property-tested in tests/test_alarms.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import Final, NamedTuple

from attrs import Factory, evolve, field, frozen

from caxev.core.escapes import escaped
from caxev.core.ledger import Reaction, delay
from caxev.core.model import RunId
from caxev.core.processes import host_of

CALM: Final = timedelta(minutes=5)
"""How long an alarm must be over before its end is delivered."""
LATER: Final = 6
"""A sink's first delay is that of a reaction's sixth failure: some minutes."""
LISTED: Final = 20
"""How many summaries a message lists beside the first, if it stands for many alarms."""
FEW: Final = 5
"""Up to this number, alarms that are due together are delivered one by one."""


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
    # It becomes a mail's subject and a line of the log: names from elsewhere must not break it.
    return escaped(" ".join(str(text).split()))[:500]


def _details(details: Mapping[str, object]) -> dict[str, str]:
    return {
        _line(name): "\n".join(map(escaped, str(value).splitlines()))[:5000]
        for name, value in details.items()
        if value not in (None, "")
    }


@frozen
class Alarm:
    """Something that needs a person.

    `key` is unique within the site. `summary` is one line, `run` the run's label if the alarm is
    about a run, and `run_id` its id; `details` are further lines by name. `once`: an event, which
    cannot be over.
    """

    site: str
    key: str
    summary: str = field(converter=_line)
    severity: Severity = field(default=Severity.ERROR, converter=Severity)
    run: str = ""
    details: Mapping[str, str] = field(factory=dict, converter=_details)
    once: bool = False
    run_id: RunId | None = None

    @property
    def id(self) -> str:
        """Eight characters that identify it for people and mail readers."""
        return sha256(f"{self.site}\n{self.key}".encode()).hexdigest()[:8]


class Alarms:
    """Receives alarms; this base class drops them. `caxev.alarms.manager` has the real one."""

    @property
    def runs(self) -> frozenset[str] | None:
        """The labels of the runs that active alarms are about; None: it may be any run."""
        return frozenset()

    def raise_(self, alarm: Alarm) -> None:
        """Raise an alarm; no change if it is active already. Neither waits nor fails."""

    def clear(self, key: str) -> None:
        """End an alarm; no change if none is active. Neither waits nor fails."""

    async def raise_and_keep(self, alarm: Alarm) -> None:
        """Raise an alarm; returns when it is in the database. Raises `DatabaseError`."""

    async def clear_and_keep(self, key: str) -> None:
        """End an alarm; returns when that is in the database. Raises `DatabaseError`."""


@frozen
class DeliveryRule:
    """The alarms that a sink receives: those of at least `severity`, each again after `repeat`.

    `resolves`: it also receives the end of an alarm, after `calm`.
    """

    sink: str
    severity: Severity = Severity.WARNING
    repeat: timedelta = timedelta(hours=24)
    resolves: bool = True
    calm: timedelta = field(factory=lambda: CALM)


@frozen
class Delivery:
    """The deliveries of one alarm to one sink.

    `raised` is when it last received the alarm; `over`: it has since received its end. After
    `tries` failures in a row the next attempt is not before `due`; `why` is the last one's reason.
    """

    raised: datetime | None = None
    over: bool = False
    tries: int = 0
    due: datetime | None = None
    why: str = ""


NO_DELIVERY: Final = Delivery()


@frozen
class AlarmState:
    """An alarm that was raised at `since` and ended at `over`; its deliveries by sink."""

    alarm: Alarm
    since: datetime
    over: datetime | None = None
    deliveries: Mapping[str, Delivery] = Factory(dict)

    @property
    def active(self) -> bool:
        return self.over is None

    @property
    def undelivered(self) -> dict[str, str]:
        """The sinks for which the last delivery failed, and why."""
        return {sink: last.why for sink, last in self.deliveries.items() if last.tries}

    def last(self, sink: str) -> Delivery:
        """Return the last delivery to a sink."""
        return self.deliveries.get(sink, NO_DELIVERY)

    def with_delivery(self, sink: str, delivery: Delivery) -> AlarmState:
        """Return this state with another last delivery to a sink."""
        return evolve(self, deliveries={**self.deliveries, sink: delivery})


class Due(NamedTuple):
    """When a sink should receive an alarm, or (`over`) its end."""

    at: datetime
    over: bool


def raised(before: AlarmState | None, alarm: Alarm, now: datetime) -> AlarmState:
    """Return the state of an alarm after it was raised."""
    if before is None:
        return AlarmState(alarm, now)
    if before.active and not alarm.once:
        return evolve(before, alarm=alarm)
    # With its deliveries: a sink that does not know of the end yet receives nothing new.
    return AlarmState(alarm, now, deliveries=before.deliveries)


def cleared(before: AlarmState, now: datetime) -> AlarmState:
    """Return the state of an alarm after its cause has ended."""
    return before if before.over or before.alarm.once else evolve(before, over=now)


def next_delivery(state: AlarmState, rule: DeliveryRule) -> Due | None:
    """Return when a sink should receive what of an alarm; None: nothing, as things are."""
    if state.alarm.severity.rank < rule.severity.rank:
        return None
    # The sink's own history decides, not the alarm's: a sink may have failed while others did not.
    last, at = state.last(rule.sink), None
    shown = None if last.over else last.raised  # since when the sink shows it as active
    if state.over:
        at = state.over + rule.calm if shown and rule.resolves else None
    elif shown is None:
        at = state.since
    elif not state.alarm.once:
        at = shown + rule.repeat
    elif state.since >= shown + rule.repeat:
        at = state.since  # the event has happened again
    return None if at is None else Due(max(at, last.due or at), over=not state.active)


def delivered(state: AlarmState, sink: str, now: datetime, *, over: bool) -> AlarmState:
    """Return the state after a sink has received the alarm, or its end."""
    last = Delivery(state.last(sink).raised, over=True) if over else Delivery(now)
    return state.with_delivery(sink, last)


def delivery_failed(
    state: AlarmState, sink: str, why: str, now: datetime, *, jitter: float
) -> AlarmState:
    """Return the state after a delivery has failed; `jitter` is in [0, 1)."""
    last = state.last(sink)
    due = now + timedelta(seconds=delay(last.tries + LATER, jitter))
    last = evolve(last, tries=last.tries + 1, due=due, why=_line(why))
    return state.with_delivery(sink, last)


def forgettable(state: AlarmState, rules: Iterable[DeliveryRule], now: datetime) -> bool:
    """Whether no sink is due, and none would receive it too early if it were raised again."""
    if state.active and not state.alarm.once:
        return False
    return not any(next_delivery(state, rule) or _is_recent(state, rule, now) for rule in rules)


def _is_recent(state: AlarmState, rule: DeliveryRule, now: datetime) -> bool:
    last = state.last(rule.sink)
    return last.raised is not None and not last.over and now < last.raised + rule.repeat


def urgency(state: AlarmState) -> tuple[int, datetime]:
    """Return a sort key: the worst first, then the oldest."""
    return -state.alarm.severity.rank, state.since


def messages(due: Iterable[AlarmState]) -> list[list[AlarmState]]:
    """Return which alarms that are due together share a message: none if few, else all."""
    ordered = sorted(due, key=urgency)
    return [[one] for one in ordered] if len(ordered) <= FEW else [ordered]


def together(batch: Sequence[AlarmState]) -> Alarm:
    """Return one alarm that stands for all of these: the first, which lists the others."""
    first, *others = [state.alarm for state in batch]
    if not others:
        return first
    listed = [other.summary for other in others[:LISTED]]
    more = len(others) - len(listed)
    return evolve(
        first,
        summary=f"{first.summary} (and {len(others)} more: caxev alarms --site {first.site})",
        details={**first.details, "also": "\n".join([*listed, *([f"{more} more"] * (more > 0))])},
    )


# -- the engine's alarms --------------------------------------------------------------------------

# How the keys of alarms begin that are about:
PARKED: Final = "failed "
"""a reaction that was parked as failed (its key follows);"""
REFUSED: Final = "refused "
"""a refusal for which reactions wait (the refusal follows);"""
UNCANCELLABLE: Final = "uncancellable "
"""an attempt that ignores its cancellation (its reaction's key follows), until its process ends."""


def parked_key(reaction: Reaction) -> str:
    """Return the key of the alarm about a failed reaction."""
    return PARKED + reaction.id


def parked(reaction: Reaction, run: str) -> Alarm:
    """Return the alarm about a reaction that has failed, and waits for a person."""
    return Alarm(
        reaction.site,
        parked_key(reaction),
        f"{reaction.handler} has failed for {run} ({reaction.event})",
        run=run,
        run_id=reaction.run,
        details={
            "why": reaction.note,
            "what to do": "see caxev explain, correct the cause, then run caxev retry",
        },
    )


UNRECORDED: Final = (
    "let the database accept it (is a validator in the way?); retried every 5 minutes"
)


def unrecorded(reaction: Reaction, run: str) -> Alarm:
    """Return the alarm about a failure that the ledger refuses to record: no retry sees it."""
    alarm = parked(reaction, run)
    summary = f"{alarm.summary}, which the ledger refuses to record"
    return evolve(alarm, summary=summary, details={**alarm.details, "what to do": UNRECORDED})


def same_cause(one: Alarm, other: Alarm) -> bool:
    """Whether both are about reactions of one handler to one run that failed for one reason.

    Several changes of a run lead to the same handler: its failure is one problem, and one alarm.
    """
    if one.run != other.run or one.details.get("why") != other.details.get("why"):
        return False
    keys = (one.key, other.key)
    return all(key.startswith(PARKED) for key in keys) and len({*map(_acting, keys)}) == 1


def _acting(key: str) -> tuple[str, str, str]:
    """Site, run and handler of the reaction that such an alarm is about."""
    try:
        site, run, *_, handler = json.loads(key.removeprefix(PARKED))
    except ValueError:  # a key that is not ours has no cause in common with another
        return key, "", ""
    return str(site), str(run), str(handler)


def uncancellable_key(reaction: Reaction) -> str:
    """Return the key of the alarm about an attempt that ignores its cancellation."""
    return UNCANCELLABLE + reaction.id


def uncancellable(reaction: Reaction, why: str, run: str) -> Alarm:
    """Return the alarm about a handler that ignores its cancellation.

    A shielded wait is as likely a cause as a disk that hangs.
    """
    todo = "restart the process to end it; a handler must not catch trio.Cancelled"
    return Alarm(
        reaction.site,
        uncancellable_key(reaction),
        f"{reaction.handler} does not stop for {run} ({reaction.event})",
        run=run,
        run_id=reaction.run,
        details={"why it should": why, "what to do": todo},
    )


def refused_key(reaction: Reaction) -> str:
    """Return the key of the alarm about the refusal for which a reaction waits."""
    return REFUSED + reaction.note[:200]


def refused(reaction: Reaction) -> Alarm:
    """Return the alarm about a refusal: one, however many reactions wait for its end."""
    todo = "grant what is refused; the reactions continue within an hour"
    summary = f"{reaction.site}: reactions wait, because they were refused something"
    details = {"why": reaction.note, "what to do": todo}
    return Alarm(reaction.site, refused_key(reaction), summary, details=details)


def crowded(site: str, number: int) -> Alarm:
    """Return the alarm that stands for all beyond `number`: nobody reads so many one by one."""
    return Alarm(
        site,
        "crowded",
        f"more than {number} alarms at {site}: further ones are not reported individually",
        Severity.CRITICAL,
        details={"what to do": "caxev reactions --failed lists what has failed"},
    )


def missing_key(handler: str) -> str:
    """Return the key of the alarm about a handler that is not installed."""
    return f"missing {handler}"


def missing(site: str, handler: str) -> Alarm:
    """Return the alarm about reactions whose handler this listener was started without."""
    todo = "start the listener with the handlers file that it had before (--handlers)"
    summary = f"{site}: reactions wait for the handler {handler}, which is not installed"
    return Alarm(site, missing_key(handler), summary, details={"what to do": todo})


HELPER: Final = "helper "
"""How the keys of alarms about one helper begin; its name follows."""


def of_helper(alarm: Alarm, owner: str) -> Alarm:
    """Return the alarm as one about the helper `owner`: it ends with that helper."""
    host = host_of(owner)
    summary = f"{alarm.summary} (helper on {host})"
    return evolve(alarm, key=helper_key(owner, alarm.key), summary=summary)


def helper_key(owner: str, key: str = "") -> str:
    """Return the key of an alarm about the helper `owner`; how all of these begin."""
    return f"{HELPER}{owner} {key}"


def gone_key(host: str) -> str:
    """Return the key of the alarm that there is no helper on a host any more."""
    return f"no helper on {host}"


def helper_gone(site: str, host: str, lanes: Iterable[str]) -> Alarm:
    """Return the alarm about a helper that vanished, and has not come back."""
    todo = (
        f"start caxev work on {host} again; if it is not to come back, run caxev alarms clear, "
        "and next time stop it by SIGTERM (systemctl stop)"
    )
    return Alarm(
        site,
        gone_key(host),
        f"{site}: the helper on {host} is gone; the others do its work",
        Severity.WARNING,
        details={"lanes": ", ".join(lanes), "what to do": todo},
    )


MALFORMED: Final = "malformed "
"""How the keys of alarms about malformed documents begin; the document's key follows."""


def malformed(site: str, what: str, why: str, run: str) -> Alarm:
    """Return the alarm about a malformed document of caxev's own; `run` is its run, if known."""
    todo = (
        "it was set aside, and its reactions are made again; find out who wrote it, then run "
        "caxev alarms clear; it is removed after a week"
    )
    return Alarm(
        site,
        MALFORMED + what,
        f"a document of caxev's own{run and f' about {run}'} is malformed: {why}",
        run=run,
        details={"document": what, "what to do": todo},
    )


def gap(site: str, why: str) -> Alarm:
    """Return the alarm about lost history of the change stream, for which a scan makes up."""
    return Alarm(
        site,
        "gap of history",
        f"{site}: the change stream has a gap; all runs are scanned instead",
        Severity.WARNING,
        details={"why": why},
        once=True,
    )
