"""Requests for copies: from where, how long they are held, and why one is refused. Pure.

A request is an entry with the status ``requested``, to which the listener of the target site reacts
as to any other change; if that site has no listener, the source's does. `CopyData.plan` asks the
decisions of the handlers that would carry it out, so a request that no site would fulfil is refused
here, with the same reason.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from datetime import datetime
from math import inf
from typing import Any, ClassVar, Final

from attrs import field, frozen

from caxev.asking.base import DONE, FAILED, ActContext, DataChoice, RequestedAct, Step
from caxev.asking.holding import Keep
from caxev.config import Site, Sites, link_between
from caxev.copies.holds import rows, terms, words
from caxev.copies.lifecycle import unfit
from caxev.copies.retention import goes_at_once
from caxev.core.clock import utcnow
from caxev.core.entry import Hold
from caxev.core.errors import Ambiguous, ConfigError, NothingToDo
from caxev.core.history import HistoryRow, What
from caxev.core.job import Job, Skip
from caxev.core.model import ERROR, REQUESTED, TRANSFERRED, Copy, CopyKey, Event, Run
from caxev.core.recording import decision_of
from caxev.core.registry import Registry
from caxev.core.update import RunUpdate

GONE: Final = "gone"
"""The status of a copy that there is not."""


@frozen
class CopyPath:
    """The copy to read, and the copy to make."""

    source: CopyKey
    target: CopyKey


@frozen
class PlannedCopy:
    """A request that can be made: its path, the site that serves it, the hold that it sets."""

    path: CopyPath
    doer: Site
    hold: Hold | None


class CopyRequests(RequestedAct):
    """The base of requests for copies: the entry of a copy names its request."""

    def state_of(self, run: Run, request: str) -> str | None:
        """Return how far the run's copy is."""
        copy = _of(run, request)
        if copy is None:
            return None
        return {TRANSFERRED: DONE, ERROR: FAILED}.get(copy.status, copy.status)

    def withdrawals(self, run: Run, context: ActContext) -> Iterable[Step]:
        """Return the step that takes out an entry which no listener has claimed."""
        copy = _of(run, context.request or "")
        if copy is None or copy.status != REQUESTED:
            return []
        return [withdrawn(run, copy, context)]

    def size_of(self, run: Run, request: str) -> int:
        """Return the copy's bytes."""
        copy = _of(run, request)
        return 0 if copy is None else run.size_of(copy) or 0


def _of(run: Run, request: str) -> Copy | None:
    return next((one for one in run.copies if one.bulk == request), None)


def withdrawn(run: Run, copy: Copy, context: ActContext) -> Step:
    """Return the step that takes back the request for a copy, unless a listener claims it first."""
    # A listener that claims it changes its status: then this write does not fit.
    row = context.row(run, copy.key, What.CANCELLED, "the request for it")
    return Step(run, str(copy.key), "withdrawn", RunUpdate.remove_copy(run, copy), row=row)


@frozen
class CopyData(CopyRequests):
    """Copy data to a site, from another (None: the best), and keep it there."""

    kind: ClassVar[str] = "copy"
    data: DataChoice
    source: str | None
    target: str
    keep: Keep = field(factory=Keep)

    @property
    def what(self) -> str:
        return f"{self.data} to {self.target}"

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run. Raises as `plan`."""
        plan = self.plan(run, context)
        source = run.copy(plan.path.source)
        return Step(
            run,
            f"{plan.path.source} to {self.target}",
            REQUESTED,
            new_request(run, plan.path, context.by, utcnow(), plan.hold, bulk=context.request),
            size=None if source is None else run.size_of(source),
            row=request_row(run, plan.path, context, plan.hold),
        )

    def plan(self, run: Run, context: ActContext) -> PlannedCopy:
        """Decide about the request for one run.

        Raises `NothingToDo` if the run has no such copy, has the wanted one already, or a rule is
        against it; `ConfigError` if the sites cannot serve it.
        """
        refused: NothingToDo | ConfigError | None = None
        for source in self._sources(run, context):
            try:
                return self._from(run, source, context)
            except (NothingToDo, ConfigError) as why:
                # If there are several sources, the reason of the best one matters.
                refused = refused or why
        raise refused or NothingToDo(f"{run} has no good copy of {self.data} data elsewhere", GONE)

    def _sources(self, run: Run, context: ActContext) -> list[Copy]:
        target = context.sites.get(self.target)
        if self.source is not None:
            doer_of(context.sites.get(self.source), target)
            found = self.data.copy(run, self.source)
            if found is None:
                missing = CopyKey(self.data.kind, self.source, self.data.version)
                raise NothingToDo(f"{run} has no copy: {missing}", GONE)
            return [found]
        wanted = [one for one in run.copies if self.data.means(one.type, one.version)]
        good = best_sources(wanted, target, context.sites, context.active, utcnow())
        versions = sorted({one.version or "none" for one in good})
        if len(versions) > 1:
            raise Ambiguous(
                f"{run} has several versions ({', '.join(versions)}): choose one by --version"
            )
        return good

    def _from(self, run: Run, source: Copy, context: ActContext) -> PlannedCopy:
        there, target = context.sites.get(source.host), context.sites.get(self.target)
        key = source.key.at(target.name)
        doer = doer_of(there, target)
        if target.listener and target.directory(key.type, key.version) is None:
            raise ConfigError(f"{target.name} has no directory for {key.type} data in sites.json")
        path = CopyPath(source.key, key)
        why = why_not(run, path) or _declined(run, path, doer, context)
        if why is not None:
            known = run.copy(key)
            raise NothingToDo(why, GONE if known is None else known.status)
        return PlannedCopy(path, doer, self._hold(key, target, context.by))

    def _hold(self, key: CopyKey, target: Site, by: str) -> Hold | None:
        rule = None if self.keep.is_given else goes_at_once(key, target)
        if rule is not None:
            raise NothingToDo(f"{rule}; --keep-for or --keep-until keeps it")
        return self.keep.of_request(key, target, by)


def _declined(run: Run, path: CopyPath, doer: Site, context: ActContext) -> str | None:
    try:
        registry = context.registry(doer.name)
    except ConfigError:
        return None  # the site has handlers that this machine lacks: only it can decide
    return declined(run, path, registry, context.sites, utcnow())


@frozen
class WithdrawCopies(CopyData):
    """Withdraw requests for copies that no listener has begun."""

    kind: ClassVar[str] = ""

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run. Raises `NothingToDo` if it is too late, or nothing is requested."""
        there = self.data.copy(run, self.target)
        if there is None:
            why = f"no {self.data.kind} copy at {self.target} is requested for {run}"
            raise NothingToDo(why, GONE)
        if there.status != REQUESTED:
            raise NothingToDo(f"{there.key} is {status_of(there)}: too late", there.status)
        if self.source not in (None, there.source):
            why = f"{there.key} was requested from {there.source}, not {self.source}"
            raise NothingToDo(why, there.status)
        return withdrawn(run, there, context)


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


# -- reasons to refuse it -------------------------------------------------------------------------


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


def request_row(run: Run, path: CopyPath, context: ActContext, hold: Hold | None) -> HistoryRow:
    """Return the row of history about a request for a copy."""
    key = path.target
    kept = "" if hold is None else f"held {terms(Copy(key, REQUESTED), hold)}"
    return context.row(run, key, What.REQUESTED, kept, source=path.source.host)
