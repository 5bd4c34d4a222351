"""Decisions about deletions: which copies may go, and what proves it. Pure.

`caxev.handlers.deletion` and, for datasets of a catalogue, `caxev.handlers.rucio` act on these
decisions, ``caxev rm`` and ``caxev rucio`` show them. A deletion has four steps, each a conditional
write: the *intent* (the copy is ``deleting`` and counts for no other deletion any more), the
*proof* (enough other copies were read again), the point of no return (``erasing``), and, after the
bytes, the removal of the entry, which leaves a tombstone. Before the third step a deletion can be
withdrawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from attrs import evolve, frozen

from caxev.config import Site, Sites
from caxev.config.directories import are_near
from caxev.copies.quorum import Same, at_one_host, majority, same_data
from caxev.core.clock import Clocks
from caxev.core.entry import as_utc
from caxev.core.job import Skip
from caxev.core.model import DELETING, ERROR, TRANSFERRED, Copy, CopyIs, CopyKey, Run, new_id
from caxev.core.paths import UNKNOWN, plain
from caxev.core.update import (
    CopiesAtLeast,
    Expectation,
    Fresh,
    NobodyReads,
    RunUpdate,
    TagAbsent,
)

RAW: Final = "raw"
NEVER: Final = "untriggered"
"""The type of the DAQ's buffer, which is never touched."""
MARKS: Final = ("mark", "moved_mark")
"""Fields of an entry that identify the files to erase, at its location and its ``moved_from``."""
EVER: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""A reading since then may have been at any time."""
READING: Final = timedelta(hours=1)
"""Time between two checks whether a copy is still being read."""


@frozen
class DeletionPlan:
    """A copy that may be deleted: by whom and why, and how many others must remain.

    The others must have the content of `like`: this copy or, if it is bad, a good one. With
    `by_entries` they count by their entries, and are not read again first.
    """

    copy: Copy
    by: str
    why: str
    keep: int
    like: Copy
    by_entries: bool = False


@frozen
class NotYet:
    """The copy may go, but not before `at` (UTC)."""

    why: str
    at: datetime


def plan_purge(
    run: Run, copy: Copy | None, site: Site, sites: Sites, now: datetime, *, full: bool = False
) -> DeletionPlan | Skip | NotYet:
    """Decide whether a raw copy at `site` is old enough to go; with `full` age does not matter."""
    if copy is None or copy.status == DELETING:
        return Skip("the copy is gone, or about to go")
    if copy.type != RAW:
        return Skip("only raw data has an age")
    if site.purge is None and not full:
        return Skip("purge is null: raw data stays")
    due = _due(run, site)
    if due is None:
        return Skip("the run has no start, and so no age")
    if not full and now < due:
        return NotYet(f"it stays until {due:%Y-%m-%d %H:%M} UTC", due)
    if (wait := _withdrawn(copy, site)) is not None and now < wait.at:
        return wait
    if not unread(copy.key, sites, now).holds(run):
        return NotYet("it is being read", now + READING)
    why = "the disk is full" if full else f"purge: older than {site.purge:g} days"
    by = f"{site.name}: {'make_room' if full else 'purge'}"
    return plan(run, copy, site, sites, now=now, by=by, why=why, keep=site.deletion.copies)


def to_be_purged(run: Run, key: CopyKey, site: Site, now: datetime) -> bool:
    """Return whether the site would purge this data at once, so that fetching is pointless."""
    due = _due(run, site) if key.type == RAW and site.purge is not None else None
    return due is not None and due < now and not any(t in run.tags for t in site.deletion.protect)


def plan_processed(
    run: Run, copy: Copy | None, site: Site, sites: Sites, now: datetime
) -> DeletionPlan | Skip | NotYet:
    """Decide whether a processed copy at `site` has the version to be purged."""
    if copy is None or copy.status == DELETING:
        return Skip("the copy is gone, or about to go")
    if copy.type != "processed" or site.pax_version_purge is None:
        return Skip("pax_version_purge is null: processed data stays")
    if copy.version != site.pax_version_purge:
        return Skip(f"pax_version_purge is {site.pax_version_purge}, not {copy.version}")
    if (wait := _withdrawn(copy, site)) is not None and now < wait.at:
        return wait
    if not unread(copy.key, sites, now).holds(run):
        return NotYet("it is being read", now + READING)
    by, why = f"{site.name}: purge_processed", f"pax_version_purge: {copy.version}"
    return plan(run, copy, site, sites, now=now, by=by, why=why, keep=0)


def unread(key: CopyKey, sites: Sites, now: datetime) -> NobodyReads:
    """Return the expectation that nobody reads this copy.

    Old programs do not record their source, so every unfinished entry of theirs counts as a
    reader, until it is old enough to be given up as stalled.
    """
    longest = max((site.stalled.retry for site in sites.values()), default=0.0)
    return NobodyReads(key, now - timedelta(hours=longest))


def plan(
    run: Run,
    copy: Copy,
    site: Site,
    sites: Sites,
    *,
    now: datetime,
    by: str,
    why: str,
    keep: int,
    by_entries: bool = False,
) -> DeletionPlan | Skip:
    """Decide whether a copy may go while `keep` good ones remain elsewhere.

    For raw data `keep` is at least one. Only a bad copy goes `by_entries`.
    """
    if by_entries and copy.status != ERROR:
        return Skip(f"it is {copy.status}: only a bad copy goes before the others are read")
    # Raw data cannot be made again: no configuration deletes its last copy.
    if copy.type == RAW:
        keep = max(keep, 1)
    if (no := _never(run, copy, site)) is not None:
        return Skip(no)
    # Bad raw data goes only if the right content is known: it might be the only good copy.
    like = _like(run, copy, sites)
    if like is None:
        return Skip("no majority of its copies says what is right: caxev vouch names a right one")
    wanted = DeletionPlan(copy, by, why, keep, like, by_entries)
    if not all(one.holds(run) for one in enough(run, copy.key, keep, like, sites)):
        have = good(run, like, copy.key, sites)
        named = ", ".join(one.host for one in have) or "none"
        return Skip(f"{keep} good copies must remain elsewhere, and there are {len(have)}: {named}")
    if not unread(copy.key, sites, now).holds(run):
        return Skip("it is being read: something is made from it")
    return wanted


def _never(run: Run, copy: Copy, site: Site) -> str | None:
    if copy.type == NEVER:
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
    others = [one for one in run.copies if one.host == copy.host and one is not copy]
    return any(
        _overlap(one.location, copy.location) for one in others if one.location and copy.location
    )


def sites_sharing_storage(site: Site, sites: Sites) -> frozenset[str]:
    """Return the sites that may have the same directories, including this one; see `are_near`."""
    return frozenset({site.name, *(one.name for one in sites.values() if are_near(one, site))})


def can_be_read(one: Copy, sites: Sites, mute: Collection[str] = ()) -> bool:
    """Return whether any site answers a request for a reading; at `mute` hosts none listens."""
    site = sites.find(one.host)
    if site is None or not site.readable:
        return False
    if site.listener:
        return one.host not in mute
    # Without a listener its source reads it over the link, by the manifest alone.
    return one.manifest is not None and one.source in sites


def same_bytes(sites: Sites) -> Same:
    """Return the test whether two entries of the same data share their bytes.

    They do at one host, at the same location of two sites that may have the same directories, and
    at the same path below one marker, whatever path each site has for that directory.
    """
    # In doubt they share: a deletion then counts one copy too few, never one too many.

    def same(one: Copy, other: Copy) -> bool:
        here, there = sites.find(one.host), sites.find(other.host)
        if at_one_host(one, other) or here is None or there is None:
            return at_one_host(one, other)
        places = [place and plain(place) for place in (one.location, other.location)]
        is_one_place = places[0] == places[1] and are_near(here, there)
        return is_one_place or not _on_disk(one, here).isdisjoint(_on_disk(other, there))

    return same


def _on_disk(copy: Copy, site: Site) -> set[tuple[str, str]]:
    """Return the copy's location relative to its site's markers: (marker's id, path below)."""
    place = plain(copy.location or "")
    return {
        (root.marker, place.removeprefix(top))
        for root in site.roots
        if root.marker not in {None, UNKNOWN}
        and place.startswith(top := plain(root).rstrip("/") + "/")
    }


def _like(run: Run, copy: Copy, sites: Sites) -> Copy | None:
    if copy.status == TRANSFERRED and (copy.manifest or copy.checksum):
        return copy
    most = majority(run, copy.key, same=same_bytes(sites))
    return next(iter(most), None) or (None if copy.type == RAW else copy)


def _due(run: Run, site: Site) -> datetime | None:
    if run.start is None:
        return None
    return run.start + timedelta(days=site.purge or 0.0)


def _withdrawn(copy: Copy, site: Site) -> NotYet | None:
    """Return when a withdrawn deletion may be tried again, or None if none was withdrawn."""
    if (row := copy.withdrawn) is None or row.at is None:
        return None
    again = row.at + timedelta(days=site.deletion.patience)
    return NotYet(f"its deletion was withdrawn: {row.why}", again)


# -- counting the others --------------------------------------------------------------------------


def others(
    run: Run, key: CopyKey, sites: Sites, fresh: Fresh | None = None
) -> dict[str, Fresh | None]:
    """Return the other hosts whose copies count, each with the reading that it needs.

    With `fresh` a copy that can be read again must have such a reading, and one in a catalogue must
    have been compared at any time. A copy on tape was compared before it became good, and counts by
    its entry. Of copies that share their bytes one counts, and none that shares this copy's.
    """
    mine, same = run.copy(key), same_bytes(sites)
    found = [] if mine is None else [mine]
    for one in run.copies:
        known = same_data(one, key) and one.host != key.host and one.host in sites
        if known and not any(same(one, other) for other in found):
            found.append(one)
    return {
        one.host: None if fresh is None else _reading(sites.get(one.host), fresh)
        for one in found
        if one.host != key.host
    }


def _reading(site: Site, fresh: Fresh) -> Fresh | None:
    if site.readable:
        return fresh
    return evolve(fresh, since=EVER) if site.method == "rucio" else None


def good(run: Run, like: Copy, key: CopyKey, sites: Sites) -> list[Copy]:
    """Return the good copies elsewhere, including archives."""
    test = CopiesAtLeast(1, key, like.manifest, like.checksum, others(run, key, sites))
    found = {one.host: one for one in reversed(run.copies) if test.counts(one)}
    return [one for one in run.copies if found.get(one.host) is one]


def enough(
    run: Run,
    key: CopyKey,
    keep: int,
    like: Copy,
    sites: Sites,
    *,
    fresh: Fresh | None = None,
) -> tuple[CopiesAtLeast, ...]:
    """Return the expectations that `keep` good copies remain, with the readings of `others`.

    At least one of them must be readable: archives never count alone.
    """
    # As expectations of the write, not only checked before it: two sites that delete at the same
    # time cannot both count on each other's copy.
    if keep == 0:
        return ()
    hosts = others(run, key, sites, fresh)
    readable = {name: at for name, at in hosts.items() if sites.get(name).readable}
    digests = (like.manifest, like.checksum)
    return CopiesAtLeast(keep, key, *digests, hosts), CopiesAtLeast(1, key, *digests, readable)


# -- responsibility -------------------------------------------------------------------------------


def custodian(copy: Copy, sites: Sites) -> str | None:
    """Return the site that looks after a copy and deletes it: its own, if that has a listener.

    In a catalogue it is the site that uploaded the copy or, for an entry without that (cax's), the
    first that uploads to this catalogue.
    """
    there = sites.find(copy.host)
    if there is None or there.listener:
        return copy.host
    if there.method != "rucio":
        return None
    bringing = [one.name for one in sites.values() if copy.host in one.upload_options]
    source = sites.find(copy.source or "")
    if source is not None and source.listener and (source.name in bringing or not bringing):
        return source.name
    return next((name for name in bringing if sites.get(name).listener), None)


# -- the steps ------------------------------------------------------------------------------------


def intent(run: Run, wanted: DeletionPlan, sites: Sites, now: datetime) -> RunUpdate:
    """Return the first step: this copy does not count any more, and nobody begins to read it."""
    copy = wanted.copy
    deletion = {
        "by": wanted.by,
        "why": wanted.why,
        "keep": wanted.keep,
        "at": now,
        "request": new_id(),
        "was": copy.status,
        "by_entries": wanted.by_entries,
        "manifest": wanted.like.manifest,
        "checksum": wanted.like.checksum,
    }
    return RunUpdate.change_copy(
        run,
        copy,
        DELETING,
        *enough(run, copy.key, wanted.keep, wanted.like, sites),
        unread(copy.key, sites, now),
        copy.having("location", "manifest"),
        deletion=deletion,
        proof=None,
        erasing=None,
        withdrawn=None,
    )


@frozen
class Intent:
    """The intent in the entry of a copy that is ``deleting``.

    `request` is the id of its requests to read the other copies again.
    """

    by: str
    why: str
    keep: int
    at: datetime
    request: str
    was: str
    like: Copy
    by_entries: bool = False

    @classmethod
    def of(cls, copy: Copy) -> Intent | None:
        """Read the intent of an entry; None if there is none, or it is invalid."""
        row = copy.deletion
        if copy.status != DELETING or row is None:
            return None
        keep, at, was = row.get("keep"), as_utc(row.get("at")), row.get("was")
        if not isinstance(keep, int) or at is None or was not in (TRANSFERRED, ERROR):
            return None
        # Again, as someone may have edited the entry since.
        if copy.type == RAW:
            keep = max(keep, 1)
        digests = {name: row.get(name) for name in ("manifest", "checksum")}
        like = Copy(copy.key, TRANSFERRED, digests)
        request = str(row.get("request") or f"{copy.key} {at}")
        by_entries = row.get("by_entries") is True and was == ERROR
        by, why = str(row.get("by")), str(row.get("why"))
        return cls(by, why, keep, at, request, was, like, by_entries)

    def fresh(self, site: Site, clocks: Clocks) -> Fresh | None:
        """Return which readings of other copies count: those for this request, or recent ones.

        None means that their entries are enough.
        """
        if self.by_entries:
            return None
        rules = site.deletion
        if rules.proof_days <= 0:
            return Fresh(self.request, until=clocks.earliest)
        # The clock that wrote `at` may have been behind, which would accept older readings.
        begun = max(self.at, clocks.latest - timedelta(days=rules.patience))
        return Fresh(self.request, begun - timedelta(days=rules.proof_days), clocks.earliest)

    def enough(
        self, run: Run, copy: Copy, site: Site, sites: Sites, clocks: Clocks
    ) -> tuple[CopiesAtLeast, ...]:
        """Return the expectations on the other copies, with their readings."""
        fresh = self.fresh(site, clocks)
        return enough(run, copy.key, self.keep, self.like, sites, fresh=fresh)


@frozen
class Proven:
    """Enough others are good: the copy may go."""

    proof: list[dict[str, Any]]


@frozen
class Ask:
    """These copies must be read again first, by a request with this id."""

    copies: tuple[Copy, ...]
    request: str


@frozen
class Wait:
    """Others are being read again; the deletion is withdrawn at `until` (UTC)."""

    why: str
    until: datetime


@frozen
class Withdraw:
    """The copy is needed, or it cannot be proven that it is not."""

    why: str


def weigh(
    run: Run, copy: Copy, site: Site, sites: Sites, clocks: Clocks
) -> Proven | Ask | Wait | Withdraw | Skip:
    """Decide the next step for a copy that is to go."""
    wanted = Intent.of(copy)
    if wanted is None:
        return Skip(f"it is {copy.status}, and does not say by whose wish")
    if copy.is_erasing:
        return Skip("its bytes are going")
    # A tag protects until the third step, even if a proof exists.
    tags = [tag for tag in site.deletion.protect if tag in run.tags]
    if tags:
        return Withdraw(f"the run was tagged {', '.join(tags)} meanwhile")
    needed = wanted.enough(run, copy, site, sites, clocks)
    if all(one.holds(run) for one in needed):
        return Proven(_proof(run, needed))
    by_entry = enough(run, copy.key, wanted.keep, wanted.like, sites)
    if not all(one.holds(run) for one in by_entry):
        return Withdraw(f"fewer than {wanted.keep} good copies are left elsewhere")
    until = wanted.at + timedelta(days=site.deletion.patience)
    stale = [one for one in run.copies if by_entry[0].counts(one) and not needed[0].counts(one)]
    # By the earliest possible time, so that a clock which is ahead withdraws nothing.
    if until <= clocks.earliest:
        names = ", ".join(sorted(one.host for one in stale))
        return Withdraw(f"no answer from {names} for {site.deletion.patience:g} days")
    unasked = tuple(one for one in stale if not _was_asked(one, wanted.request))
    if unasked:
        return Ask(unasked, wanted.request)
    return Wait(f"waits for a fresh reading at {', '.join(one.host for one in stale)}", until)


def _was_asked(copy: Copy, request: str) -> bool:
    return any(one.id == request for one in copy.asked)


def _proof(run: Run, needed: tuple[CopiesAtLeast, ...]) -> list[dict[str, Any]]:
    return [
        {
            "host": copy.host,
            "manifest": copy.manifest,
            "checksum": copy.checksum,
            "verified_at": copy.verified_at,
        }
        for copy in run.copies
        if any(one.counts(copy) for one in needed)
    ]


def _untagged(site: Site) -> list[Expectation]:
    """Return the expectations that the run has none of the site's protecting tags."""
    return [TagAbsent(tag) for tag in site.deletion.protect]


def still(copy: Copy) -> CopyIs:
    """Return the expectation that this intent stands and nothing has been erased."""
    # The whole intent is compared: a process that was stopped for long may find a later one.
    return CopyIs(copy.key, {"erasing": None, "status": DELETING, **copy.having("deletion").fields})


def prove(
    run: Run, copy: Copy, wanted: Intent, site: Site, sites: Sites, *, proof: Any, clocks: Clocks
) -> RunUpdate:
    """Return the second step: record the proof, if it still holds."""
    expect = [still(copy), *wanted.enough(run, copy, site, sites, clocks), *_untagged(site)]
    return RunUpdate.note(run, copy, *expect, proof=proof)


def begin(
    run: Run,
    copy: Copy,
    wanted: Intent,
    site: Site,
    sites: Sites,
    *,
    proof: Any,
    clocks: Clocks,
    marks: Mapping[str, str] | None = None,
) -> RunUpdate:
    """Return the third step: its bytes are erased, if the proof still holds and nobody reads it.

    `marks` identify the files to erase, by the fields `MARKS`.
    """
    # Marks are recorded here, once: a successor could not know whether the files that it finds at
    # the location are still this copy.
    expect = [still(copy), *wanted.enough(run, copy, site, sites, clocks), *_untagged(site)]
    expect += [copy.having("location"), unread(copy.key, sites, clocks.earliest)]
    return RunUpdate.note(run, copy, *expect, erasing=clocks.now, proof=proof, **(marks or {}))


def go_on(run: Run, copy: Copy) -> RunUpdate:
    """Return the third step again, for a successor; it checks and changes nothing."""
    return RunUpdate.note(run, copy, begun(copy), **copy.having("erasing").fields)


def begun(copy: Copy) -> CopyIs:
    """Return the expectation that this copy is being erased, and not a later one."""
    seen = copy.having("deletion", "erasing", "location", *MARKS)
    return CopyIs(copy.key, {"status": DELETING, **seen.fields})


def tombstone(copy: Copy, wanted: Intent, owner: str) -> dict[str, Any]:
    """Return the tombstone of the last step: who asked and why, who deleted it, the proof."""
    return {
        "by": wanted.by,
        "why": wanted.why,
        "asked": wanted.at,
        "by_entries": wanted.by_entries,
        "site": owner,
        "proof": copy.proof,
    }


def withdraw(run: Run, copy: Copy, wanted: Intent, why: str, now: datetime) -> RunUpdate:
    """Withdraw the intent: the copy gets its old status back, and its entry the reason."""
    return RunUpdate.change_copy(
        run,
        copy,
        wanted.was,
        still(copy),
        deletion=None,
        proof=None,
        withdrawn={"at": now, "why": why},
    )


def unwanted(key: CopyKey, site: Site) -> str | None:
    """Return why a site wants no processed data of that version, or None if it does."""
    if key.type != "processed" or key.version is None:
        return None
    if key.version == site.pax_version_purge:
        return f"{key.version} is to be purged at {site.name} (pax_version_purge)"
    wanted = site.pax_processing_versions
    if wanted and key.version not in wanted:
        return f"{site.name} wants {', '.join(wanted)}, not {key.version} (pax_processing_versions)"
    return None


def is_left_over(run: Run, key: CopyKey, location: str) -> bool:
    """Return whether an old program left an unfinished copy at that location."""
    here = (one for one in run.given_up(key) if one.trigger is None and one.location == location)
    left = max(filter(None, (one.at for one in here)), default=None)
    # A deletion since then erased it.
    erased = max(filter(None, (one.at for one in run.deleted(key))), default=None)
    return left is not None and (erased is None or left > erased)


def was_deleted(run: Run, key: CopyKey) -> str | None:
    """Return who deleted such a copy on purpose, or None."""
    for one in run.deleted(key)[-1:]:
        return f"{one.by or 'somebody'} deleted it ({one.why or 'no reason'})"
    return None
