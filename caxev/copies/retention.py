"""Which data a site wants, which it keeps, and which copies may go. Pure.

`caxev.copies.deletion` has the steps of a deletion.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from attrs import field, frozen

from caxev.config import DataType, Site, Sites
from caxev.config.data_types import PROCESSED, UNTRIGGERED
from caxev.copies.holds import stays
from caxev.copies.quorum import majority
from caxev.copies.remaining import enough, good, unread
from caxev.copies.storage import same_bytes
from caxev.core.job import Skip, Unmet, Wait
from caxev.core.model import DELETING, ERROR, TRANSFERRED, TRANSFERRING, Copy, CopyKey, Event, Run
from caxev.core.moments import after
from caxev.core.paths import plain

READING: Final = timedelta(hours=1)
"""Time between two checks whether a copy is still being read."""


@frozen
class InUse(Wait):
    """The copy may go, but somebody reads it. The end of that need not be an event for it."""


@frozen
class DeletionWish:
    """A copy to be deleted: at whose wish and why, and how many good ones must remain elsewhere.

    With `by_entries` the others count by their entries, and are not read again first.
    """

    copy: Copy
    by: str
    why: str
    keep: int
    by_entries: bool = False


@frozen
class DeletionPlan(DeletionWish):
    """A copy that may be deleted; the others must have the content of `like`.

    `like` is this copy or, if it is bad, a good one.
    """

    like: Copy = field(kw_only=True)


def plan_purge(
    run: Run, copy: Copy | None, site: Site, sites: Sites, now: datetime, *, full: bool = False
) -> DeletionPlan | Skip | Wait:
    """Decide whether a primary copy at `site` is old enough; with `full` age does not matter."""
    if copy is None or copy.status not in (TRANSFERRED, ERROR):
        return _unfinished(copy)
    if copy.type not in site.types.primary:
        return Skip(f"{copy.type} data has no age: only what nothing is made from has one")
    if site.purge is None and not full:
        return Skip(f"purge is null: {copy.type} data stays")
    due = _due(run, site)
    if due is None:
        return Skip("the run has no start, and so no age")
    if not full and now < due:
        return Wait(f"it stays until {due:%Y-%m-%d %H:%M} UTC", due)
    if (wait := _withdrawn(copy, site)) is not None and now < wait.until:
        return wait
    why = "the disk is full" if full else f"purge: older than {site.purge:g} days"
    by = f"{site.name}: {'make_room' if full else 'purge'}"
    return plan(run, DeletionWish(copy, by, why, site.deletion.copies), site, sites, now)


def _unfinished(copy: Copy | None) -> Skip:
    if copy is None or copy.status == DELETING:
        return Skip("the copy is gone, or is being deleted")
    return Skip(f"it is {copy.status}")


def to_be_purged(run: Run, key: CopyKey, site: Site, now: datetime) -> str | None:
    """Return that the site would purge this data at once, so that bringing it is pointless."""
    due = _due(run, site) if days_kept(key, site) is not None else None
    if due is None or due >= now or any(tag in run.tags for tag in site.deletion.protect):
        return None
    return f"it would be purged at once at {site.name} (purge: {site.purge:g} days)"


def days_kept(key: CopyKey, site: Site) -> float | None:
    """Return for how many days from its arrival a requested copy stays; None: no rule ends it."""
    return site.purge if key.type in site.types.primary else None


def goes_at_once(key: CopyKey, site: Site) -> str | None:
    """Return the rule that would delete such a copy as soon as it has come, or None."""
    if days_kept(key, site) == 0:
        return f"purge of {site.name} is 0: it would be deleted at once"
    if (kind := _purged(key, site)) is not None:
        return f"{kind.purging} of {site.name} is {key.version}: it would be deleted at once"
    return None


def _purged(key: CopyKey, site: Site) -> DataType | None:
    """Return the type of data whose version is deleted at a site; None if that version is not."""
    gone = key.version is not None and key.version == site.purged_version(key.type)
    return site.types.by_name.get(key.type) if gone else None


def plan_processed(
    run: Run, copy: Copy | None, site: Site, sites: Sites, now: datetime
) -> DeletionPlan | Skip | Wait:
    """Decide whether a copy at `site` has the version to be purged: processed data, or the like."""
    if copy is None or copy.status == DELETING:
        return Skip("the copy is gone, or is being deleted")
    kind, version = site.types.by_name.get(copy.type), site.purged_version(copy.type)
    if kind is None:
        return Skip(f"{copy.type} is no type of data in sites.json")
    if version is None:
        return Skip(f"{kind.purging} is null: {copy.type} data stays")
    if copy.version != version:
        return Skip(f"{kind.purging} is {version}, not {copy.version}")
    if (wait := _withdrawn(copy, site)) is not None and now < wait.until:
        return wait
    by, why = f"{site.name}: purge_processed", f"{kind.purging}: {copy.version}"
    keep = site.deletion.copies if copy.type in site.types.protected else 0
    return plan(run, DeletionWish(copy, by, why, keep), site, sites, now)


def plan(
    run: Run, wish: DeletionWish, site: Site, sites: Sites, now: datetime
) -> DeletionPlan | Skip | Wait:
    """Decide whether a copy may go. Only a bad one goes `by_entries`.

    The decision is to wait if a person holds the copy until a known time.
    """
    copy = wish.copy
    if wish.by_entries and copy.status != ERROR:
        return Skip(f"it is {copy.status}: only a bad copy goes before the others are read")
    # Data that cannot be made again keep their last copy, whatever is configured.
    keep = max(wish.keep, 1) if copy.type in site.types.protected else wish.keep
    if (no := _never(run, copy, site)) is not None:
        return Skip(no)
    if (hold := stays(run, copy, now)) is not None:
        return hold
    # Bad raw data goes only if the right content is known: it might be the only good copy.
    like = _like(run, copy, site, sites)
    if like is None:
        return Unmet("no majority of its copies decides: name the right one by caxev vouch")
    if not all(one.holds(run) for one in enough(run, copy.key, keep, like, sites)):
        have = good(run, like, copy.key, sites)
        named = ", ".join(one.host for one in have) or "none"
        return Unmet(
            f"{keep} good copies must remain elsewhere, and there are {len(have)}: {named}"
        )
    # Last: a copy that stays for another reason needs no timer.
    if not unread(copy.key, sites, now).holds(run):
        return InUse("it is being read", now + READING)
    return DeletionPlan(copy, wish.by, wish.why, keep, wish.by_entries, like=like)


def _never(run: Run, copy: Copy, site: Site) -> str | None:
    if copy.type == UNTRIGGERED:
        return "the DAQ's buffer is never touched"
    if not site.readable and site.method != "rucio":
        return f"what is at {site.name} ({site.method}) is not deleted by this"
    tags = [tag for tag in site.deletion.protect if tag in run.tags]
    if tags:
        return f"the run is tagged {', '.join(tags)} (deletion.protect)"
    if copy.status not in (TRANSFERRED, ERROR):
        return f"it is {copy.status}"
    return _misplaced(run, copy, site)


def _misplaced(run: Run, copy: Copy, site: Site) -> str | None:
    """Return why the location may not be this copy's alone, or None."""
    if copy.location is None:
        return "it has no location"
    if (why := _no_place(copy.location, site.directory(copy.type, copy.version), site)) is not None:
        return why
    if _shares(run, copy):
        return f"another entry is at, above or below {copy.location}, too"
    return None


def _no_place(location: str, base: str | None, site: Site) -> str | None:
    """Return why a location is not strictly inside `base`, or in a catalogue is no dataset."""
    # The location comes from the database: a wrong one must not delete other data.
    if not site.readable:
        scope, colon, name = location.partition(":")
        is_name = bool(scope and colon and name) and ":" not in name
        return None if is_name else f"{location} is not scope:dataset"
    if plain(location) == plain(base or "/"):
        return f"{location} is no place of its own"
    if base is None or not plain(location).startswith(f"{plain(base).rstrip('/')}/"):
        where = base or "a directory for such data"
        return f"{location} is not inside {where}"
    return None


def _overlap(one: str, other: str) -> bool:
    mine, theirs = (f"{plain(place).rstrip('/')}/" for place in (one, other))
    return mine.startswith(theirs) or theirs.startswith(mine)


def _shares(run: Run, copy: Copy) -> bool:
    """Return whether another copy at this host has its files at, below or above this one's."""
    others = [one for one in run.at([copy.host]) if one.fields is not copy.fields]
    return any(
        _overlap(one.location, copy.location) for one in others if one.location and copy.location
    )


def _like(run: Run, copy: Copy, site: Site, sites: Sites) -> Copy | None:
    if copy.status == TRANSFERRED and (copy.manifest or copy.checksum):
        return copy
    most = majority(run, copy.key, same=same_bytes(sites))
    return next(iter(most), None) or (None if copy.type in site.types.protected else copy)


def _due(run: Run, site: Site) -> datetime | None:
    if run.start is None:
        return None
    return after(run.start, timedelta(days=site.purge or 0.0))


def _withdrawn(copy: Copy, site: Site) -> Wait | None:
    """Return when a withdrawn deletion may be tried again, or None if none was withdrawn."""
    if (row := copy.withdrawn) is None or row.at is None:
        return None
    again = after(row.at, timedelta(days=site.deletion.patience))
    return Wait(f"its deletion was withdrawn: {row.why}", again)


def unwanted(run: Run, key: CopyKey, site: Site, now: datetime) -> str | None:
    """Return why a site does not want this data unless a person asks for it, or None."""
    return _other_version(key, site) or was_deleted(run, key) or to_be_purged(run, key, site, now)


def _other_version(key: CopyKey, site: Site) -> str | None:
    """Return why a site wants no such data of that version, or None if it does."""
    if (kind := _purged(key, site)) is not None:
        return f"{key.version} is deleted at {site.name} ({kind.purging})"
    wanted = site.pax_processing_versions if key.type == PROCESSED else ()
    if wanted and key.version is not None and key.version not in wanted:
        return f"{site.name} wants {', '.join(wanted)}, not {key.version} (pax_processing_versions)"
    return None


def is_left_over(run: Run, key: CopyKey, location: str) -> bool:
    """Return whether an old program left an unfinished copy at that location."""
    here = (one for one in run.given_up(key) if one.trigger is None and one.location == location)
    left = max(filter(None, (one.at for one in here)), default=None)
    # A deletion since then erased it.
    erased = max(filter(None, (one.at for one in run.deleted(key))), default=None)
    return left is not None and (erased is None or left > erased)


def stays_gone(event: Event, run: Run) -> Skip | None:
    """Return why an entry that has vanished is no reason to make its data; None if it is one."""
    if not isinstance(event.aspect, CopyKey) or event.status is not None:
        return None
    # One that was never finished: a program that died had begun it.
    if (event.before or "").partition("@")[0] != TRANSFERRING:
        return Skip("a removed entry is not made again by itself")
    why = was_deleted(run, event.aspect)
    return None if why is None else Skip(why)


def was_deleted(run: Run, key: CopyKey) -> str | None:
    """Return who deleted such a copy on purpose, or None."""
    for one in run.deleted(key)[-1:]:
        return f"{one.by or 'somebody'} deleted it ({one.why or 'no reason'})"
    return None
