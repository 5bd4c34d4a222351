"""Decide about a requested copy: its source, how long it stays, and why it is refused. Pure.

`CopyRequest.plan` is for one run. It asks the decisions of the handlers that would carry the
request out, so that it is refused here for the very reason for which no site would make the copy.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from datetime import datetime
from math import inf
from typing import Any

import click
from attrs import field, frozen

from caxev.cli.copy_progress import GONE
from caxev.cli.errors import NothingToDo
from caxev.cli.hold import Keep
from caxev.cli.options import options
from caxev.cli.requests import asked
from caxev.cli.selection import DataChoice
from caxev.config import ConfigError, Site, Sites, link_between
from caxev.copies.holds import rows, terms, words
from caxev.copies.lifecycle import unfit
from caxev.copies.retention import goes_at_once
from caxev.core.entry import Hold
from caxev.core.history import HistoryRow, What
from caxev.core.job import Job, Skip
from caxev.core.model import ERROR, REQUESTED, TRANSFERRED, Copy, CopyKey, Event, Run
from caxev.core.recording import decision_of
from caxev.core.registry import Registry
from caxev.core.update import RunUpdate


@frozen
class CopyPath:
    """From which copy to which."""

    source: CopyKey
    target: CopyKey


@frozen
class PlannedCopy:
    """A request that can be made: its path, the site that serves it, the hold that it sets."""

    path: CopyPath
    doer: Site
    hold: Hold | None


@frozen
class CopyRequest:
    """The data that is wanted, its source (None: the best), its target, and how long it is kept."""

    data: DataChoice
    source: Site | None
    target: Site
    sites: Sites
    keep: Keep = field(factory=Keep)

    def plan(self, run: Run, active: Container[str], now: datetime) -> PlannedCopy:
        """Decide about the request for one run. `active`: the sites that a listener acts for.

        Raises `NothingToDo` if the run has no such copy, has the wanted one already, or a rule is
        against it; `ConfigError` if the sites cannot serve it.
        """
        refused: NothingToDo | ConfigError | None = None
        for source in self._sources(run, active, now):
            try:
                return self._from(run, source, now)
            except (NothingToDo, ConfigError) as why:
                # Of several sources the best has the reason that matters.
                refused = refused or why
        missing = f"{self.data.kind} {self.data.version or ''}".rstrip()
        raise refused or NothingToDo(f"{run} has no good copy of {missing} data elsewhere", GONE)

    def _sources(self, run: Run, active: Container[str], now: datetime) -> list[Copy]:
        if self.source is not None:
            doer_of(self.source, self.target)
            found = self.data.copy(run, self.source.name)
            if found is None:
                missing = CopyKey(self.data.kind, self.source.name, self.data.version)
                raise NothingToDo(f"{run} has no copy: {missing}", GONE)
            return [found]
        wanted = [one for one in run.copies if self.data.means(one.type, one.version)]
        good = best_sources(wanted, self.target, self.sites, active, now)
        versions = sorted({one.version or "none" for one in good})
        if len(versions) > 1:
            raise click.UsageError(
                f"{run} has several versions ({', '.join(versions)}): choose one by --version"
            )
        return good

    def _from(self, run: Run, source: Copy, now: datetime) -> PlannedCopy:
        there, target = self.sites.get(source.host), self.target
        key = source.key.at(target.name)
        doer = doer_of(there, target)
        if target.listener and target.directory(key.type, key.version) is None:
            raise ConfigError(f"{target.name} has no directory for {key.type} data in sites.json")
        path = CopyPath(source.key, key)
        why = why_not(run, path) or self._declined(run, path, doer, now)
        if why is not None:
            known = run.copy(key)
            raise NothingToDo(why, GONE if known is None else known.status)
        return PlannedCopy(path, doer, self._hold(key, now))

    def _declined(self, run: Run, path: CopyPath, doer: Site, now: datetime) -> str | None:
        try:
            registry = options().registry(doer.name)
        except ConfigError:
            return None  # the site has handlers that this machine lacks: only it can decide
        return declined(run, path, registry, self.sites, now)

    def _hold(self, target: CopyKey, now: datetime) -> Hold | None:
        rule = None if self.keep.is_given else goes_at_once(target, self.target)
        if rule is not None:
            raise NothingToDo(f"{rule}; --keep-for or --keep-until keeps it")
        return self.keep.of_request(target, self.target, now)


def doer_of(source: Site, target: Site) -> Site:
    """Return the site whose listener makes the copy. Raises `ConfigError` if there is none."""
    # The target's listener pulls, which is preferred; a site without one is pushed to.
    for site in (target, source):
        if site.listener:
            return site
    names = f"{source.name} nor {target.name}"
    raise ConfigError(f"neither {names} has a listener of its own, according to sites.json")


def best_sources(
    copies: Iterable[Copy], target: Site, sites: Sites, active: Container[str], now: datetime
) -> list[Copy]:
    """Return the good ones of these copies that the target can be given, the best first.

    Those whose files can be read come before archives, then those that were read and found right,
    whose site listens, and whose link is open; then by ``download_options`` of the target and by
    the rate of the link.
    """
    known = [one for one in copies if one.host in sites and one.host != target.name]

    def rank(one: Copy) -> tuple[Any, ...]:
        there = sites.get(one.host)
        link, wanted = link_between(target, there), target.download_options
        return (
            not there.readable,
            one.checksumproblem,
            one.read_at is None,
            there.listener and there.name not in active,
            link.opens_in(now) > 0,
            wanted.index(one.host) if one.host in wanted else len(wanted),
            -(inf if link.max_rate is None else link.max_rate),
            one.host,
        )

    return sorted((one for one in known if unfit(one) is None), key=rank)


# -- what stands against it -----------------------------------------------------------------------


def why_not(run: Run, path: CopyPath) -> str | None:
    """Return why that copy cannot be requested; None if it can."""
    source, target = run.copy(path.source), run.copy(path.target)
    if target is not None and not _has_failed(target):
        return f"{run} already has this copy: {target.key} is {status_of(target)}"
    if source is None:
        return f"{run} has no copy: {path.source}"
    if source.status != TRANSFERRED:
        return f"{source.key} is {status_of(source)}, and only a transferred copy can be copied"
    return None


def _has_failed(copy: Copy) -> bool:
    """Return whether an attempt to make the copy was given up, by us or by an old program."""
    # With a checksum problem the copy is bad, not unfinished: it is repaired, not requested again.
    given_up = copy.status == ERROR and copy.trigger is not None
    return (given_up and not copy.checksumproblem) or copy.is_abandoned


def status_of(copy: Copy) -> str:
    """Return a copy's status, with what a second person who wants something of it must know."""
    known = [f"({copy.error})"] if copy.error else []
    if copy.status == REQUESTED:
        known = [f"by {copy.creation_place or 'somebody'} from {copy.source}"]
    kept = "".join(f", {words(copy, one)}" for one in copy.holds)
    return " ".join((copy.status, *known)) + kept


def declined(
    run: Run, path: CopyPath, registry: Registry, sites: Sites, now: datetime
) -> str | None:
    """Return why the handlers of a site would not make that copy; None if one would."""
    here, key = sites.get(registry.here.name), path.target
    if not here.wants_run(run.name):
        return f"dataset_list of {here.name} leaves {run} out"
    wanted = _with_request(run, path.target, {"source": path.source.host})
    event = Event(run.id, key, None, REQUESTED)
    job = Job(wanted, event, here, sites, at=now)
    answers = [decision_of(handler, job) for handler in registry.wanting(event)]
    if not answers:
        return f"no handler that {here.name} enables makes such a copy (task_list)"
    reasons = [answer.why for answer in answers if isinstance(answer, Skip)]
    # One that would run is enough: the others decline what is for it to do.
    return "; ".join(dict.fromkeys(reasons)) if len(reasons) == len(answers) else None


def _with_request(run: Run, key: CopyKey, fields: Mapping[str, Any]) -> Run:
    """Return the run as it would be with a requested copy that has these fields."""
    version = {} if key.version is None else {"pax_version": key.version}
    entry = {"type": key.type, "host": key.host, **version, "status": REQUESTED, **fields}
    others = [copy.fields for copy in run.copies if copy.key != key]
    return Run.from_document({**run.document, "data": [*others, entry]})


# -- what is written ------------------------------------------------------------------------------


def new_request(
    run: Run,
    path: CopyPath,
    who: str,
    now: datetime,
    hold: Hold | None = None,
    *,
    bulk: str | None = None,
    **extra: Any,
) -> RunUpdate:
    """Return the request: an entry that is added if the source is unchanged.

    A failed copy is requested again, and data that an old program left there is reused.
    `bulk` is the id of the request for many copies that this is one of, `extra` are further fields
    of a new entry.
    """
    source, target = run.copy(path.source), run.copy(path.target)
    assert source is not None
    new: dict[str, Any] = {"location": None, "checksum": None, "source": source.host}
    if bulk is not None or (target is not None and target.bulk is not None):
        new["bulk"] = bulk
    if hold is not None:
        others = [] if target is None else [one for one in target.holds if one.by != hold.by]
        new["holds"] = rows([*others, hold])
    if target is None:
        born = {"creation_time": now, "creation_place": who}
        return RunUpdate.add_copy(
            run, path.target, REQUESTED, source.as_seen, **new, **born, **extra
        )
    # Without the fields of the failed attempt: they would be taken for this one's.
    update = RunUpdate.change_copy(
        run, target, REQUESTED, source.as_seen, **new, error=None, trigger=None
    )
    return update.remembered(target) if target.is_abandoned else update


def history_row(run: Run, plan: PlannedCopy) -> HistoryRow:
    """Return the row of history about a request that was written."""
    key, source = plan.path.target, plan.path.source.host
    kept = "" if plan.hold is None else f"held {terms(Copy(key, REQUESTED), plan.hold)}"
    return asked(run, key, What.REQUESTED, reason=kept, source=source)
