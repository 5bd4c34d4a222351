"""History: what happened to a run or at a site, one row each, for people to read. Pure.

Rows are only ever added. A reaction that did something leaves the ledger when it is settled, and
the transaction that removes it writes its row: so there is exactly one for each, however often a
settlement is repeated. A reaction that did nothing leaves none. Alarms, requests and starts of
listeners have rows as well.

A handler gives the facts by `Job.did`; the engine adds when, where, on what and how long. Rows are
small, because there are many: no output of programs, and of many files only the first ones.

`database.history` stores and reads rows. All fields are in `HistoryRow`, with the law that a row
survives the database in tests/test_history.py.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from attrs import field, frozen
from attrs.validators import instance_of, optional

from caxev.core.ledger import Reaction
from caxev.core.model import Aspect, Event, Run, RunId

MOST_FILES: Final = 20
"""Names of files that a row has at most."""
MOST_TEXT: Final = 1000
"""Characters of a reason, or of a file's name, that are kept."""


class What(StrEnum):
    """The kinds of rows. A row may have another word, such as one of a handler of your own."""

    DONE = "done"
    """A handler ran that gave no facts."""
    TRANSFERRED = "transferred"
    VERIFIED = "verified"
    DAMAGED = "found damaged"
    REPAIRED = "repaired"
    MARKED = "marked for deletion"
    PROVEN = "deletion proven"
    """Enough others were found good, by those whose names are the proof."""
    WITHDRAWN = "deletion withdrawn"
    DELETED = "deleted"
    SET_ASIDE = "set aside"
    """Files went to quarantine, because they differ from the master's."""
    GIVEN_UP = "given up"
    PROCESSED = "processed"
    REQUESTED = "requested"
    CANCELLED = "cancelled"
    """A request that was taken back before a listener began it."""
    HELD = "held"
    RELEASED = "released"
    TAGGED = "tagged"
    COMMENTED = "commented"
    FORGOTTEN = "forgotten"
    """An entry was removed, and no data."""
    VOUCHED = "vouched for"
    """A person decided that this copy is the right one."""
    ALARM_RAISED = "alarm raised"
    ALARM_CLEARED = "alarm cleared"
    CONFIGURED = "configuration changed"
    STARTED = "listener started"


def _cut(text: str) -> str:
    # A file's name need not be valid text; the database takes only that.
    return text[:MOST_TEXT].encode(errors="backslashreplace").decode()


def _few(names: Any) -> tuple[str, ...]:
    found = tuple(map(str, names))
    more = len(found) - MOST_FILES
    shown = (*found[:MOST_FILES], f"and {more} more") if more > 1 else found
    return tuple(map(_cut, shown))


@frozen(kw_only=True)
class Deed:
    """The facts about what was done that only a handler has.

    `what` is one of `What`, or a word of the handler's own. `source` and `target` are the sites
    between which data went; `bytes` how many went or were read. `files` are the names of those that
    were concerned, as of a repair. `reason` is why it was done, `by` the person who asked for it
    (user@host), and `proof` the sites whose copies were read again before a deletion. Raises
    TypeError for a fact of another kind: the database could neither store nor show it.
    """

    what: str = field(default=What.DONE.value, validator=instance_of(str))
    source: str = field(default="", validator=instance_of(str))
    target: str = field(default="", validator=instance_of(str))
    bytes: int | None = field(default=None, validator=optional(instance_of(int)))
    files: tuple[str, ...] = field(default=(), converter=_few)
    reason: str = field(default="", converter=_cut)
    by: str = field(default="", validator=instance_of(str))
    proof: tuple[str, ...] = field(default=(), converter=_few)


@frozen(kw_only=True)
class HistoryRow:
    """One thing that happened.

    `at` is when, UTC, to the millisecond. `site` is the site that did it, `handler` the handler;
    what concerns no site, as a tag, has an empty one.
    `run` with its `number` and `name` is what it was done to, if it concerned one run; `aspect`,
    `before` and `after` are the event of the run that led to it. `deed` has the facts.

    `seconds` is how long the attempt took, `waited` how many seconds passed from the event to the
    first attempt, and `attempt` its number, from 1. `output` is what programs printed meanwhile, as
    `core.transcript` packs it, the last parts of `outputs`. `id` is unique: to add a row again with
    the same id changes nothing; an empty one stands for a new one.
    """

    at: datetime
    site: str
    deed: Deed
    handler: str = ""
    run: RunId | None = None
    number: int | None = None
    name: str = ""
    aspect: Aspect | None = None
    before: str | None = None
    after: str | None = None
    seconds: float | None = None
    waited: float | None = None
    attempt: int = 1
    output: tuple[bytes, ...] = ()
    outputs: int = 0
    id: str = ""

    @property
    def rate(self) -> float | None:
        """Bytes a second; None if bytes or seconds are unknown."""
        if self.deed.bytes is None or not self.seconds:
            return None
        return self.deed.bytes / self.seconds

    @property
    def event(self) -> Event | None:
        """The event that led to it, if one did."""
        if self.aspect is None or self.run is None:
            return None
        return Event(self.run, self.aspect, self.before, self.after)


def of_run(run: Run) -> dict[str, Any]:
    """Return the fields of a row that name its run."""
    return {"run": run.id, "number": run.number, "name": run.name}


def joined(first: Deed | None, second: Deed) -> Deed:
    """Return what was done in two steps of one attempt as one deed."""
    if first is None:
        return second
    parts = [one.bytes for one in (first, second) if one.bytes is not None]
    return Deed(
        what=second.what,
        source=_both(first.source, second.source, ", "),
        target=_both(first.target, second.target, ", "),
        bytes=sum(parts) if parts else None,
        files=tuple(dict.fromkeys((*first.files, *second.files))),
        reason=_both(first.reason, second.reason, "; "),
        by=second.by or first.by,
        proof=tuple(dict.fromkeys((*first.proof, *second.proof))),
    )


def _both(first: str, second: str, between: str) -> str:
    return between.join(dict.fromkeys(filter(None, (first, second))))


def of_attempt(
    reaction: Reaction, deed: Deed, run: Run, *, now: datetime, seconds: float, over: bool
) -> HistoryRow:
    """Return the row of an attempt that did something and took so many seconds.

    `over`: the reaction is done with it. If not, it will be tried again, and may do more.
    """
    began = reaction.started or now - timedelta(seconds=seconds)
    return HistoryRow(
        at=now,
        site=reaction.site,
        deed=deed,
        handler=reaction.handler,
        **of_run(run),
        aspect=reaction.aspect,
        before=reaction.event.before,
        after=reaction.event.after,
        seconds=round(seconds, 3),
        waited=round(max((began - reaction.at).total_seconds(), 0.0), 4),
        attempt=reaction.attempts + 1,
        # A generation is used once at a site: a settlement that is repeated finds its own row.
        id=f"{reaction.site}:{reaction.generation:x}" if over else "",
    )
