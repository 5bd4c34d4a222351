"""Run ``caxev explain``: show what each handler of a site did with a run, and why."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
from attrs import define, evolve, field

from caxev.cli import timeline
from caxev.cli.command import command, excludes
from caxev.cli.handlers import in_words
from caxev.cli.history_rows import facts
from caxev.cli.options import options
from caxev.cli.output import columns, event_parts, print_line, show, time
from caxev.cli.selection import RunChoice, selects_run
from caxev.cli.values import SITE
from caxev.copies.holds import standing, words
from caxev.core.amounts import ReportedProgress
from caxev.core.clock import utcnow
from caxev.core.history import HistoryRow
from caxev.core.job import Job, Skip, Unmet
from caxev.core.ledger import Reaction
from caxev.core.model import (
    REQUESTED,
    Aspect,
    Copy,
    CopyField,
    CopyKey,
    Event,
    Existence,
    Field,
    Run,
    Tag,
)
from caxev.core.recording import Maker, Outlook, decision_of, outlook
from caxev.core.registry import (
    CopyFieldTrigger,
    CopyTrigger,
    FieldTrigger,
    Handler,
    Registry,
    TagTrigger,
    Trigger,
)
from caxev.core.selection import which

if TYPE_CHECKING:
    from caxev.database import Database

    Owed = tuple[Reaction, Mapping[str, Any]]


@command(
    "caxev explain --run 123 --site lngs",
    "caxev explain --name 161111_1434 --detector tpc --site chicago --json",
    "caxev explain --run 123 --timeline",
)
@excludes("--timeline", "--all")
@selects_run()
@click.option("--site", type=SITE, help="The site whose handlers are explained.")
@click.option(
    "--all", "everything", is_flag=True, help="Show every handler, also what has nothing to do."
)
@click.option(
    "--timeline", "as_timeline", is_flag=True, help="Show what happened, in order of time."
)
def explain(*, run: RunChoice, site: str | None, everything: bool, as_timeline: bool) -> None:
    """Show what a run waits for at a site, until when, and which conditions are not met.

    The first place to look when nothing happens to a run. With --all, what each handler did, or why
    it did nothing. With --timeline, what has happened to the run, in order of time, at one site or
    at all.
    """
    if site is None and not as_timeline:
        raise click.UsageError("name the site whose handlers to explain: --site (or --timeline)")
    registry = None if site is None else options().registry(site)
    found, reactions, listening, known, history = options().with_database(_read, run, site)
    if not options().as_json:
        print_line(f"{found}{f' at {site}' if site else ''}")
    if as_timeline or registry is None:
        rows = timeline.rows(found, history, reactions, site)
        show(timeline.COLUMNS, rows, empty="nothing")
        return
    if not options().as_json:
        _print_preface(registry, found)
    explanation = Explanation(registry, found, reactions, listening, known, history)
    if everything:
        show(_COLUMNS, list(explanation.rows()), empty="no handlers")
        return
    nothing = "it waits for nothing, and no condition is unmet; --all shows each handler"
    show(_COLUMNS, list(explanation.blocking()), empty=nothing)


async def _read(
    database: Database, choice: RunChoice, site: str | None
) -> tuple[Run, list[Owed], bool, Container[str], list[HistoryRow]]:
    """Return the run, and the reactions to it at the sites.

    Then, of the site, whether a listener acts for it, and which handlers know the run; and what
    happened to the run there, or at all sites, the newest first.
    """
    from caxev.database import HistorySearch

    found = await choice.find_one(database)
    run = (await database.runs([found.id])).get(found.id, found)  # with all its fields
    # A site that is no longer in sites.json may have reactions, too: ask for its record.
    records = await database.site_records()
    sites = [site] if site is not None else [one.site for one in records]
    reactions: list[Owed] = [
        reaction for one in sites for reaction in await database.reactions(one, run=run.id)
    ]
    known: Container[str] = ()
    if site is not None:
        known = (await database.known_to(site, [run.id])).get(run.id, ())
    history = await database.history(HistorySearch(site=site, runs=[run.id]), limit=_LATEST)
    active = any(one.active and one.site == site for one in records)
    return run, reactions, active, known, history


def _print_preface(registry: Registry, run: Run) -> None:
    """Print what concerns all handlers of a site."""
    here = registry.here.name
    if not options().sites().get(here).wants_run(run.name):
        print_line(f"the run is not in dataset_list of {here}: its handlers skip it")
    for copy in run.copies:
        print_line(_request_of(copy))
        for one in standing(copy, utcnow()):
            print_line(f"{copy.key}: {words(copy, one)}")


def _request_of(copy: Copy) -> str:
    """Return who requested a copy that does not exist yet; an empty text for any other."""
    if copy.status != REQUESTED:
        return ""
    who, since = copy.creation_place or "an unknown user", time(copy.since)
    return f"{copy.key}: requested by {who}, from {copy.source}, {since or 'at an unknown time'}"


_COLUMNS = columns("handler", "event", "state", "why")
_ALL_ONLY = frozenset({"done", "nothing to do", "not triggered", "off"})
"""States that block nothing."""
_LATEST = 1000
"""Rows of history of one run that are read, the newest."""


@define
class Explanation:
    """The work of a site's handlers on a run, given the run and the site's reactions for it.

    `listening`: whether a listener acts for the site now. `history`: what the handlers did, the
    newest first.
    """

    registry: Registry
    run: Run
    reactions: Sequence[Owed]
    listening: bool
    known: Container[str] = ()
    history: Sequence[HistoryRow] = ()
    snapshot: Mapping[Aspect, str] = field(init=False)
    outlook: Sequence[Outlook] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.snapshot = self.run.snapshot(self.registry.watched)
        maker = Maker(self.registry, options().sites())
        standing = {reaction.id: reaction for reaction, _ in self.reactions}
        now = utcnow()
        self.outlook = list(
            outlook(maker, self.run, self.snapshot, standing, now, known=self.known)
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Return a row for each reaction, and at least one for each handler."""
        # Reactions of handlers that no longer exist are listed, too: the ledger keeps them.
        known = self.registry.handlers
        for handler in known.values():
            yield from self._of(handler)
        for reaction, document in self.reactions:
            if reaction.handler not in known:
                yield self._reaction_document(reaction, document)

    def blocking(self) -> Iterator[dict[str, Any]]:
        """Return the rows about what is waited for, and about what could be met and is not."""
        for row in self.rows():
            is_missed = row["state"] == "off" and self._is_missed(row["handler"])
            if is_missed or row["state"] not in _ALL_ONLY:
                yield row

    def _is_missed(self, name: str) -> bool:
        """Return whether a handler that ``task_list`` leaves out would have something to do."""
        handler, sites = self.registry.handlers[name], options().sites()
        here = sites.get(self.registry.here.name)
        if evolve(here, task_list=()).unmet(handler) is not None:
            return False
        for aspect, value in self.snapshot.items():
            if handler.unmet(aspect, value.partition("@")[0], self.registry.here) is None:
                job = Job(self.run, Event(self.run.id, aspect, None, value), here, sites)
                if handler.decide is not None and decision_of(handler, job) is None:
                    return True
        return False

    def _of(self, handler: Handler) -> Iterator[dict[str, Any]]:
        snapshot = self.snapshot
        owed = [pair for pair in self.reactions if pair[0].handler == handler.name]
        for reaction, document in owed:
            yield self._reaction_document(reaction, document)
        standing = {reaction.aspect for reaction, _ in owed}
        mine = [row for row in self.history if row.handler == handler.name]
        done = {row.aspect: row for row in reversed(mine) if row.aspect is not None}
        for aspect, row in done.items():
            if aspect not in standing:
                yield _done(row)
        if handler not in self.registry.enabled:
            why = options().sites().get(self.registry.here.name).unmet(handler)
            yield _row(handler.name, None, "off", f"not enabled: {why}")
            return
        standing |= {aspect for aspect, row in done.items() if row.after == snapshot.get(aspect)}
        ahead = [
            one
            for one in self.outlook
            if one.reaction.handler == handler.name and one.reaction.aspect not in standing
        ]
        for one in ahead:
            yield _row(handler.name, one.reaction.event, *self._ahead(one))
        # No reaction, and none is due: only the triggers' conditions explain that.
        if not owed and not ahead and not done:
            yield _row(handler.name, None, "not triggered", "; ".join(self._unmet(handler)))

    def _ahead(self, one: Outlook) -> tuple[str, str]:
        """Return the state, and why, of what has no reaction."""
        if isinstance(one.decision, Skip):
            unmet = isinstance(one.decision, Unmet)
            return "not met" if unmet else "nothing to do", one.decision.why
        where = f"{which(self.run)} --site {self.registry.here.name}"
        return "missing", f"would run, as {one.why}: caxev replay {where}"

    def _reaction_document(self, reaction: Reaction, document: Mapping[str, Any]) -> dict[str, Any]:
        why = self._reason(reaction, document)
        row = _row(reaction.handler, reaction.event, str(reaction.state), why)
        return {
            **row,
            "due": reaction.due,
            "settled": document.get("settled"),
            "note": reaction.note,
        }

    def _reason(self, reaction: Reaction, document: Mapping[str, Any]) -> str:
        match str(reaction.state):
            case "running" if self.listening:
                return _joined("running", str(ReportedProgress.of(document.get("progress")) or ""))
            case "running":  # its listener has died; the next one takes it up again
                return f"interrupted: no listener is active for {reaction.site}"
            case "failed":
                again = f"caxev retry {which(self.run)} --site {reaction.site}"
                return f"{reaction.note}; to retry: {again}"
            case _:
                return _joined(self._waits(reaction, utcnow()), reaction.note)

    def _waits(self, reaction: Reaction, now: datetime) -> str:
        if reaction.due > now:
            return f"waits until {time(reaction.due)}"
        if not self.listening:
            return f"waits: no listener is active for {reaction.site}"
        return "due now, as soon as a worker is free"

    def _unmet(self, handler: Handler) -> Iterator[str]:
        """Return, for each trigger, the condition that is not met."""
        for trigger in handler.triggers:
            reasons = list(dict.fromkeys(self._reasons(trigger)))
            shown = ", ".join(reasons[:_SHOWN]) + (", ..." if len(reasons) > _SHOWN else "")
            yield f"needs: {in_words(trigger)}; but {shown}"

    def _reasons(self, trigger: Trigger) -> Iterator[str]:
        # Only aspects of the trigger's kind: a tag is no reason why a copy's trigger did not fire.
        about = _ABOUT.get(type(trigger), Existence)
        aspects = [aspect for aspect in self.snapshot if isinstance(aspect, about)]
        for aspect in aspects:
            status = self.snapshot[aspect].partition("@")[0]
            yield f"{aspect}: {trigger.unmet(aspect, status, self.registry.here)}"
        if not aspects:
            yield "the run has none"


_SHOWN = 4
_ABOUT: Mapping[type, type] = {
    CopyTrigger: CopyKey,
    TagTrigger: Tag,
    FieldTrigger: Field,
    CopyFieldTrigger: CopyField,
}
"""The kind of aspect to which a kind of trigger reacts."""


def _done(row: HistoryRow) -> dict[str, Any]:
    """Return the row of what a handler did."""
    why = _joined(time(row.at) or "", ", ".join(filter(None, (str(row.deed.what), facts(row)))))
    shown = _row(row.handler, row.event, "done", why)
    return {**shown, "settled": row.at, "note": row.deed.reason}


def _row(handler: str, event: Event | None, what: str, why: str) -> dict[str, Any]:
    shown = None if event is None else event_parts(event)
    return {"handler": handler, "event": shown, "state": what, "why": why}


def _joined(*parts: str) -> str:
    return ": ".join(part for part in parts if part)
