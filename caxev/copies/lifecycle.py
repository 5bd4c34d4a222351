"""Claim, continue, withdraw and finish the entry of a copy: the life cycle of every copy.

A handler that makes a copy claims an entry for it first, so that no other site makes the same copy.
The entry names the reaction that made it (`trigger`). An attempt that follows a failure, a restart
or another process finds its own entry by that name and continues it.

::

    (none), requested ──claim──▶ transferring ──arrived──▶ verifying ──(checksum)──▶ transferred
                                   │  ▲  │
                    withdrawal ────┘  │  └── parked ──▶ error
                    (no entry)        └───── claim ──────┘

Every step is a conditional update: of two sites that race for one copy one wins, and the other is
`Superseded`. Handlers of transfers, tape, catalogues and processing share these functions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from math import inf
from shlex import quote
from typing import Any, Final, Protocol

from attrs import frozen

from caxev.config import Site
from caxev.copies.quorum import DISPUTED, coming_from, same_data
from caxev.core.errors import GiveUp, Retry, Superseded
from caxev.core.job import Job, Skip
from caxev.core.ledger import trigger_named
from caxev.core.model import (
    ERROR,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    Copy,
    CopyField,
    CopyIs,
    CopyKey,
    Run,
)
from caxev.core.selection import which
from caxev.core.update import Expectation, RunUpdate
from caxev.files import Manifest, safe_name

SOON: Final = 1.0
"""Seconds until a step that lost a race is tried again."""

# -- deciding: pure ------------------------------------------------------------------------------


def trigger_of(handler: str, job: Job) -> str:
    """Return the trigger that a reaction writes into the entries that it claims."""
    return trigger_named(job.site.name, handler, job.event.aspect)


def key_of(job: Job) -> CopyKey:
    """Return the key of the copy that the event is about, which must be about one."""
    aspect = job.event.aspect
    if isinstance(aspect, CopyField):
        aspect = aspect.key
    assert isinstance(aspect, CopyKey)
    return aspect


def in_commands(run: Run, copy: Copy) -> tuple[str, str]:
    """Return the options that name a run in commands, and those that name this copy's data."""
    named = which(run)
    version = f" --version {quote(copy.version)}" if copy.version else ""
    return named, f"{named} --type {quote(copy.type)}{version}"


def unfit(source: Copy | None, key: CopyKey | None = None) -> str | None:
    """Return why a copy cannot be the source of another one, or None if it can.

    `key` names the copy in the reason if there is no `source`.
    """
    if source is None:
        return f"there is no copy: {key}"
    if source.status != TRANSFERRED:
        return f"{source.key} is {source.status}"
    if source.location is None:
        return f"{source.key} has no location"
    if source.manifest is None and source.checksum is None:
        return f"{source.key} has no digest yet to compare a copy with"
    return None


@frozen
class CopyPlan:
    """A copy to make of `source` as `key`, at `location` (in a catalogue the dataset's name).

    `trigger` names the reaction that makes it; `resume` is its entry if there is one.
    """

    source: Copy
    key: CopyKey
    location: str
    trigger: str
    resume: Copy | None


def targets(job: Job) -> Collection[str]:
    """Return the sites to push a copy to: the one of a request, or those in ``upload_options``.

    Sites without a listener are added if a person has requested this site's copy for them.
    """
    key = key_of(job)
    if key.host != job.site.name:
        return (key.host,)
    # Our copy may not have been good at the time of the request, for example during a move.
    asked = (one.host for one in job.run.copies if _is_asked_of(job, one, key))
    return tuple(dict.fromkeys((*job.site.upload_options, *asked)))


def _is_asked_of(job: Job, one: Copy, key: CopyKey) -> bool:
    there = job.sites.find(one.host)
    passive = there is not None and not there.listener
    begun = one.is_requested and one.status != TRANSFERRED
    return begun and passive and one.source == job.site.name and same_data(one, key)


def taken(entry: Copy | None, trigger: str, statuses: Collection[str] = ()) -> str | None:
    """Return why this reaction must not make a copy; None if it is requested, or claimed by it."""
    if entry is None or entry.status == REQUESTED or is_ours(entry, trigger, statuses):
        return None
    return f"{entry.key} is {entry.status} already"


def requested_from(entry: Copy | None, trigger: str, statuses: Collection[str] = ()) -> str | None:
    """Return the source that a person named for a copy that this reaction may make, or None."""
    if entry is None or taken(entry, trigger, statuses):
        return None
    return entry.source if entry.is_requested else None


def asked_by(entry: Copy | None) -> str:
    """Return who requested a copy (user@host); an empty text if nobody did."""
    return entry.creation_place or "" if entry is not None and entry.is_requested else ""


def not_brought(asked: str | None, site: Site, name: str) -> str | None:
    """Return why `site` brings no copy to the site `name`; None if it does.

    `asked` is what `requested_from` returns: a person's request overrides ``upload_options``.
    """
    if asked is None:
        return None if name in site.upload_options else f"upload_options does not name {name}"
    return None if asked == site.name else f"it was requested from {asked}"


def place_for(key: CopyKey, like: str, site: Site) -> str | Skip:
    """Return the location of a copy in the directories of its site, by the last name of `like`.

    Raises `GiveUp` if no copy may have that name: it comes from the database.
    """
    base = site.directory(key.type, key.version)
    if base is None:
        of = f" of {key.version}" if key.version else ""
        return Skip(f"{site.name} has no directory for {key.type} data{of}")
    return f"{base.rstrip('/')}/{safe_name(like)}"


def is_ours(entry: Copy | None, trigger: str, statuses: Collection[str] = ()) -> bool:
    """Return whether this very reaction claimed the entry and has not finished it.

    `statuses`: those of an unfinished entry. By default it is ``transferring``, or an ``error``
    that is not about its bytes: a copy that a checksum found to be bad was finished, and is
    repaired.
    """
    # By the status first: most are good.
    if entry is None or entry.status not in (statuses or (TRANSFERRING, ERROR)):
        return False
    if entry.trigger != trigger:
        return False
    return bool(statuses) or entry.status != ERROR or not entry.checksumproblem


def withdrawal(
    run: Run, key: CopyKey, trigger: str, statuses: Collection[str] = (TRANSFERRING,)
) -> RunUpdate | None:
    """Return the update that removes an entry which this reaction claimed and cannot finish.

    The removal is an event: any other site that can make the copy starts then.
    """
    entry = run.copy(key)
    if entry is None or not is_ours(entry, trigger, statuses):
        return None
    return RunUpdate.remove_copy(run, entry)


def claiming(
    job: Job,
    plan: CopyPlan,
    fields: Mapping[str, object],
    *expect: Expectation,
    new: Mapping[str, object] | None = None,
) -> RunUpdate:
    """Return the update that claims the planned entry: the one to resume, or a new one.

    It applies only while the source is good and at the same place. `new` are fields of a new entry
    alone.
    """
    # The location, too: a source that `caxev mv` moved meanwhile must be looked up again.
    here = {"status": TRANSFERRED, "location": plan.source.location}
    expect = (CopyIs(plan.source.key, here), *expect)
    fields = {"owner": job.owner, "trigger": plan.trigger, **fields}
    if plan.resume is not None:
        return RunUpdate.change_copy(job.run, plan.resume, TRANSFERRING, *expect, **fields)
    made = {"creation_time": job.now(), "creation_place": job.site.name}
    # As cax writes it: `checksum` is there from the start, null until it is known.
    fields = {"checksum": None, **made, **(new or {}), **fields}
    return RunUpdate.add_copy(job.run, plan.key, TRANSFERRING, *expect, **fields)


def retried(run: Run, mine: Copy, why: str, **fields: object) -> RunUpdate:
    """Return the update that has a copy made once more; `fields` count the attempts."""
    return RunUpdate.change_copy(run, mine, TRANSFERRING, error=why, **fields)


def arrived(run: Run, mine: Copy, **fields: object) -> RunUpdate:
    """Return the update that has a copy verified whose bytes have arrived."""
    return RunUpdate.change_copy(run, mine, VERIFYING, **{"owner": None, **fields})


def broken_off(run: Run, mine: Copy, **fields: object) -> RunUpdate:
    """Return the update that makes an abandoned copy an ``error``.

    Its content may be right: see `found_bad` if it is not.
    """
    return RunUpdate.change_copy(run, mine, ERROR, **{"owner": None, **fields})


def found_good(run: Run, mine: Copy, **fields: object) -> RunUpdate:
    """Return the update that makes a copy ``transferred`` after it was found right."""
    if mine.checksumproblem or mine.status == ERROR:
        fields |= {"checksumproblem": False, DISPUTED: None, "error": None}
    return RunUpdate.change_copy(run, mine, TRANSFERRED, **fields)


def found_bad(run: Run, mine: Copy, why: str | None, **fields: object) -> RunUpdate:
    """Return the update that makes a copy an ``error`` whose bytes are wrong."""
    bad = {"checksumproblem": True, DISPUTED: None, "error": why, **fields}
    return RunUpdate.change_copy(run, mine, ERROR, **bad)


def worst(failed: Sequence[Retry | GiveUp]) -> Retry | GiveUp:
    """Return which of several errors, at least one, to raise: the `Retry` that is due soonest.

    A `Retry` without a time is later than any with one. Without a `Retry`, the last `GiveUp`.
    """
    retries = [error for error in failed if isinstance(error, Retry)]
    return min(
        retries, key=lambda error: inf if error.after is None else error.after, default=failed[-1]
    )


# -- doing ---------------------------------------------------------------------------------------


async def claim(
    job: Job,
    plan: CopyPlan,
    fields: Mapping[str, object],
    *,
    others: Iterable[RunUpdate] = (),
    new: Mapping[str, object] | None = None,
) -> Copy:
    """Claim the entry of the planned copy and return it, as `claiming`.

    The digests of the source go into the entry, so that what arrives can be compared with what was
    meant even if the source is gone by then. If the reaction is parked, `others` are written and
    the entry becomes ``error``.

    Raises `Retry` if the run is no longer as it was seen. The next attempt reads it again, and
    finds out whether another site was first or the source is no longer good.
    """
    fields = {**fields, **coming_from(plan.source)}
    if plan.resume is not None and plan.resume.status == REQUESTED:
        fields["requested"] = True  # kept, as the claim overwrites the status that showed it
    mine = await written(job, claiming(job, plan, fields, new=new), plan.key)
    job.on_failure(*others, RunUpdate.give_up(job.run, mine))
    return mine


async def write(job: Job, update: RunUpdate) -> Run:
    """Write an update and return the run after it. Raises `Retry` if the run has changed."""
    try:
        return await job.update(update)
    except Superseded as lost:
        raise Retry(str(lost), after=SOON) from lost


async def written(job: Job, update: RunUpdate, key: CopyKey) -> Copy:
    """As `write`; returns the entry `key` after it."""
    found = (await write(job, update)).copy(key)
    if found is None:
        raise Retry(f"the entry of {key} vanished while it was written")
    return found


async def serve_each(
    job: Job,
    names: Collection[str],
    serve: Callable[[Job, str, tuple[RunUpdate, ...]], Awaitable[str | None]],
) -> Skip | None:
    """Serve each of several sites; a failure at one does not affect the others.

    `serve` gets the job, the site's name and the further updates to write if this reaction is
    parked; it returns why there is nothing to do, or None. Raises the `worst` error of all.
    Without `names` there is nothing to do.
    """
    skipped: list[str] = []
    failed: list[Retry | GiveUp] = []
    for name in names:
        others = job.if_parked
        try:
            why = await serve(job, name, others)
        except Superseded as lost:
            skipped.append(str(lost))
        except (Retry, GiveUp) as error:
            failed.append(error)
        else:
            if why is None:
                # This copy is finished: a later failure must not write what was set for it.
                job.on_failure(*others)
            else:
                skipped.append(why)
    if failed:
        raise worst(failed)
    if len(skipped) < len(names):
        return None  # at least one was served
    return Skip("; ".join(skipped) or "it concerns no copy of ours, and no site")


class HasManifests(Protocol):
    """A job, or the database."""

    async def load_manifest(self, digest: str) -> Sequence[Mapping[str, Any]] | None:
        """Return a manifest's items, or None if they are not there."""


async def manifest_of(source: HasManifests, digest: str | None) -> Manifest | None:
    """Return the manifest of that digest, or None if the database does not have it."""
    rows = None if digest is None else await source.load_manifest(digest)
    return None if rows is None else Manifest.from_rows(rows)
