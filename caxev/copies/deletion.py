"""Which copies may go, and what proves it.

`caxev.handlers.deletion` and, for datasets of a catalogue, `caxev.handlers.rucio` act on these
decisions, ``caxev rm`` and ``caxev rucio`` show them. A copy goes in four steps,
each by a conditional write: the *intent* (it is ``deleting``, and nobody counts on it from then
on), the *proof* (so many others were read afresh), the point of no return (``erasing``), and, the
bytes gone, the entry's end, which leaves a tombstone. Until the third step all can be taken back.
Pure.
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
from caxev.core.job import Skip
from caxev.core.model import (
    DELETING,
    ERROR,
    TRANSFERRED,
    CopiesAtLeast,
    Copy,
    CopyIs,
    CopyKey,
    Expectation,
    Fresh,
    NobodyReads,
    Run,
    RunUpdate,
    TagAbsent,
    as_utc,
    new_id,
)
from caxev.core.paths import UNKNOWN, plain

RAW: Final = "raw"
NEVER: Final = "untriggered"
"""The DAQ's buffer: never touched."""
MARKS: Final = ("mark", "moved_mark")
"""Fields of an entry: which very files go, at its location and at its ``moved_from``."""
EVER: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""Since then: at any time at all, if only it was."""
READING: Final = timedelta(hours=1)
"""When a copy that is being read is looked at again."""


@frozen
class DeletionPlan:
    """A copy that may go: who wants it and why, and how many others must remain.

    `like` is what those others must be: this copy itself or, where it is bad, a good one. With
    `by_entries` they count by what their entries say, and are not read afresh first.
    """

    copy: Copy
    by: str
    why: str
    keep: int
    like: Copy
    by_entries: bool = False


@frozen
class NotYet:
    """It may go, but not before `at` (UTC)."""

    why: str
    at: datetime


def plan_purge(
    run: Run, copy: Copy | None, site: Site, sites: Sites, now: datetime, *, full: bool = False
) -> DeletionPlan | Skip | NotYet:
    """Decide whether a raw copy at `site` has come to its age; `full`: its age does not count."""
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
    again = _withdrawn(copy, site)
    if again is not None and now < again:
        return NotYet(f"its deletion was withdrawn: {copy.fields['withdrawn'].get('why')}", again)
    if not unread(copy.key, sites, now).holds(run):
        return NotYet("it is being read", now + READING)
    why = "the disk is full" if full else f"purge: older than {site.purge:g} days"
    by = f"{site.name}: {'make_room' if full else 'purge'}"
    return plan(run, copy, site, sites, now=now, by=by, why=why, keep=site.deletion.copies)


def to_be_purged(run: Run, key: CopyKey, site: Site, now: datetime) -> bool:
    """Whether such data goes at the site for its age, so that fetching it is of no use."""
    due = _due(run, site) if key.type == RAW and site.purge is not None else None
    return due is not None and due < now and not any(t in run.tags for t in site.deletion.protect)


def plan_processed(
    run: Run, copy: Copy | None, site: Site, sites: Sites, now: datetime
) -> DeletionPlan | Skip | NotYet:
    """Decide whether a processed copy at `site` is of the version that is to go."""
    if copy is None or copy.status == DELETING:
        return Skip("the copy is gone, or about to go")
    if copy.type != "processed" or site.pax_version_purge is None:
        return Skip("pax_version_purge is null: processed data stays")
    if copy.version != site.pax_version_purge:
        return Skip(f"pax_version_purge is {site.pax_version_purge}, not {copy.version}")
    again = _withdrawn(copy, site)
    if again is not None and now < again:
        return NotYet(f"its deletion was withdrawn: {copy.fields['withdrawn'].get('why')}", again)
    if not unread(copy.key, sites, now).holds(run):
        return NotYet("it is being read", now + READING)
    by, why = f"{site.name}: purge_processed", f"pax_version_purge: {copy.version}"
    return plan(run, copy, site, sites, now=now, by=by, why=why, keep=0)


def unread(key: CopyKey, sites: Sites, now: datetime) -> NobodyReads:
    """Return the expectation that nobody reads this copy, nor an old program that does not say.

    Such an entry counts for as long as it may live: until it is given up as stalled.
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

    Of raw data at least one does, whatever `keep` says. Only a bad copy goes `by_entries`.
    """
    if by_entries and copy.status != ERROR:
        return Skip(f"it is {copy.status}: only a bad copy goes before the others are read")
    if copy.type == RAW:
        keep = max(keep, 1)
    if (no := _never(run, copy, site)) is not None:
        return Skip(no)
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
    """Why its place cannot be this copy's alone."""
    if copy.location is None:
        return "it has no location"
    if (why := _no_place(copy.location, site.directory(copy.type, copy.version), site)) is not None:
        return why
    if _shares(run, copy):
        return f"another entry is at, above or below {copy.location}, too"
    return None


def _no_place(location: str, base: str | None, site: Site) -> str | None:
    """Why that is nowhere below a directory of the site or, at a catalogue, no dataset."""
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
    """Whether another copy at this host has its files at, below or above those of this one."""
    others = [one for one in run.copies if one.host == copy.host and one is not copy]
    return any(
        _overlap(one.location, copy.location) for one in others if one.location and copy.location
    )


def sites_sharing_storage(site: Site, sites: Sites) -> frozenset[str]:
    """The sites that may have the same directories, this one among them; see `are_near`."""
    return frozenset({site.name, *(one.name for one in sites.values() if are_near(one, site))})


def can_be_read(one: Copy, sites: Sites, mute: Collection[str] = ()) -> bool:
    """Whether anybody answers a request for a fresh reading; at `mute` hosts no caxev listens."""
    site = sites.find(one.host)
    if site is None or not site.readable:
        return False
    if site.listener:
        return one.host not in mute
    return one.manifest is not None and one.source in sites


def same_bytes(sites: Sites) -> Same:
    """Return whether two entries of the same data are of the same bytes, as far as sites know.

    Such are at one host, or at the same place of two sites that may have the same directories, or
    in the same place below one marker, whatever each site calls that directory.
    """

    def same(one: Copy, other: Copy) -> bool:
        here, there = sites.find(one.host), sites.find(other.host)
        if at_one_host(one, other) or here is None or there is None:
            return at_one_host(one, other)
        places = [place and plain(place) for place in (one.location, other.location)]
        is_one_place = places[0] == places[1] and are_near(here, there)
        return is_one_place or not _on_disk(one, here).isdisjoint(_on_disk(other, there))

    return same


def _on_disk(copy: Copy, site: Site) -> set[tuple[str, str]]:
    """Where a copy stands below the markers of its site: the id of each, and the path from it."""
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


def _withdrawn(copy: Copy, site: Site) -> datetime | None:
    """When it may be tried again, where it was tried and withdrawn."""
    withdrawn = copy.fields.get("withdrawn")
    at = as_utc(withdrawn.get("at")) if isinstance(withdrawn, Mapping) else None
    return None if at is None else at + timedelta(days=site.deletion.patience)


# -- counting the others --------------------------------------------------------------------------


def others(
    run: Run, key: CopyKey, sites: Sites, fresh: Fresh | None = None
) -> dict[str, Fresh | None]:
    """The other hosts whose copies count, each with how it must have been read.

    With `fresh` a copy that can be read again must have been read so, and one at a catalogue must
    have been compared there at some time; what is on tape was restored and compared before it was
    good, and counts by its entry. Of copies at the very same place, as if two sites share
    a directory, one counts, and none at the place of this one.
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
    """The good copies elsewhere, archives among them."""
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
    """What must hold so that `keep` good copies remain, read as `others` says.

    One of them at least can be read again: archives never count alone.
    """
    if keep == 0:
        return ()
    hosts = others(run, key, sites, fresh)
    readable = {name: at for name, at in hosts.items() if sites.get(name).readable}
    digests = (like.manifest, like.checksum)
    return CopiesAtLeast(keep, key, *digests, hosts), CopiesAtLeast(1, key, *digests, readable)


# -- whose it is ----------------------------------------------------------------------------------


def custodian(copy: Copy, sites: Sites) -> str | None:
    """Which site looks after a copy, and deletes it: the one that has it, if it has a listener.

    At a catalogue it is the site that brought it there; of an entry that does not say so (cax's),
    the first that brings data to that catalogue.
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
    """The first step: from now on nobody counts on this copy, and nobody begins to read it."""
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
        *(CopyIs(copy.key, {name: copy.fields.get(name)}) for name in ("location", "manifest")),
        deletion=deletion,
        proof=None,
        erasing=None,
        withdrawn=None,
    )


@frozen
class Intent:
    """What the entry of a copy that is ``deleting`` says of it.

    `request` is the id under which it has the other copies read afresh.
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
        """Read it; None where it is not there, or cannot be understood."""
        row = copy.fields.get("deletion")
        if copy.status != DELETING or not isinstance(row, Mapping):
            return None
        keep, at, was = row.get("keep"), as_utc(row.get("at")), row.get("was")
        if not isinstance(keep, int) or at is None or was not in (TRANSFERRED, ERROR):
            return None
        if copy.type == RAW:
            keep = max(keep, 1)
        digests = {name: row.get(name) for name in ("manifest", "checksum")}
        like = Copy(copy.key, TRANSFERRED, digests)
        request = str(row.get("request") or f"{copy.key} {at}")
        by_entries = row.get("by_entries") is True and was == ERROR
        by, why = str(row.get("by")), str(row.get("why"))
        return cls(by, why, keep, at, request, was, like, by_entries)

    def fresh(self, site: Site, clocks: Clocks) -> Fresh | None:
        """Which readings of other copies prove something: this deletion's, or lately made ones.

        None: what their entries say is enough.
        """
        if self.by_entries:
            return None
        rules = site.deletion
        if rules.proof_days <= 0:
            return Fresh(self.request, until=clocks.earliest)
        # The clock by which `at` was written may have been behind.
        begun = max(self.at, clocks.latest - timedelta(days=rules.patience))
        return Fresh(self.request, begun - timedelta(days=rules.proof_days), clocks.earliest)

    def enough(
        self, run: Run, copy: Copy, site: Site, sites: Sites, clocks: Clocks
    ) -> tuple[CopiesAtLeast, ...]:
        """What must hold of the others, freshly read, for this copy to go."""
        fresh = self.fresh(site, clocks)
        return enough(run, copy.key, self.keep, self.like, sites, fresh=fresh)


@frozen
class Proven:
    """The others are good: the copy may go."""

    proof: list[dict[str, Any]]


@frozen
class Ask:
    """These must be read afresh first, by a request with this id."""

    copies: tuple[Copy, ...]
    request: str


@frozen
class Wait:
    """Others are being read afresh; at `until` (UTC) it is given up."""

    why: str
    until: datetime


@frozen
class Withdraw:
    """The copy is needed, or nobody can say that it is not."""

    why: str


def weigh(
    run: Run, copy: Copy, site: Site, sites: Sites, clocks: Clocks
) -> Proven | Ask | Wait | Withdraw | Skip:
    """Decide what is next for a copy that is to go."""
    wanted = Intent.of(copy)
    if wanted is None:
        return Skip(f"it is {copy.status}, and does not say by whose wish")
    if copy.fields.get("erasing"):
        return Skip("its bytes are going")
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
    """That the run has none of the tags by which the site keeps data."""
    return [TagAbsent(tag) for tag in site.deletion.protect]


def still(copy: Copy) -> CopyIs:
    """The expectation that nothing of this copy has been erased, and all can be taken back.

    It is the very intent that was seen: a process that was stopped may meet another one's.
    """
    return CopyIs(copy.key, {"erasing": None, **_intended(copy)})


def _intended(copy: Copy) -> dict[str, Any]:
    return {"status": DELETING, "deletion": copy.fields.get("deletion")}


def prove(
    run: Run, copy: Copy, wanted: Intent, site: Site, sites: Sites, *, proof: Any, clocks: Clocks
) -> RunUpdate:
    """The second step: write down what proves that the copy may go, if it still does."""
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
    """The third step: from now on its bytes go, if `proof` still holds and nobody reads it.

    `marks` are the very files that go, by the fields `MARKS`, and noted once: whoever takes over
    later cannot know whether what stands there by then is the copy.
    """
    where = CopyIs(copy.key, {"location": copy.fields.get("location")})
    expect = [still(copy), where, *wanted.enough(run, copy, site, sites, clocks), *_untagged(site)]
    expect.append(unread(copy.key, sites, clocks.earliest))
    return RunUpdate.note(run, copy, *expect, erasing=clocks.now, proof=proof, **(marks or {}))


def go_on(run: Run, copy: Copy) -> RunUpdate:
    """Return the third step again, for whoever takes over; it changes nothing."""
    return RunUpdate.note(run, copy, begun(copy), erasing=copy.fields.get("erasing"))


def begun(copy: Copy) -> CopyIs:
    """Return the expectation that this very copy is being erased, and no later one."""
    fields = {name: copy.fields.get(name) for name in ("erasing", "location", *MARKS)}
    return CopyIs(copy.key, {**fields, **_intended(copy)})


def tombstone(copy: Copy, wanted: Intent, owner: str) -> dict[str, Any]:
    """What the last step leaves behind: who wanted it gone and why, who did it, on what proof."""
    return {
        "by": wanted.by,
        "why": wanted.why,
        "asked": wanted.at,
        "by_entries": wanted.by_entries,
        "site": owner,
        "proof": copy.fields.get("proof"),
    }


def withdraw(run: Run, copy: Copy, wanted: Intent, why: str, now: datetime) -> RunUpdate:
    """Take the intent back: the copy is what it was, and its entry says why."""
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
    """Say why a site wants no processed data of that version; None if it does."""
    if key.type != "processed" or key.version is None:
        return None
    if key.version == site.pax_version_purge:
        return f"{key.version} is to be purged at {site.name} (pax_version_purge)"
    wanted = site.pax_processing_versions
    if wanted and key.version not in wanted:
        return f"{site.name} wants {', '.join(wanted)}, not {key.version} (pax_processing_versions)"
    return None


def is_left_over(run: Run, key: CopyKey, location: str) -> bool:
    """Whether what stands at that place is an unfinished copy that an old program left there."""
    left = [one.at for one in run.given_up(key) if one.trigger is None and one.location == location]
    rows = run.document.get("deleted_data")
    stones = [
        at
        for row in (rows if isinstance(rows, list) else ())
        if _key_of(row) == key and (at := as_utc(row.get("date"))) is not None
    ]
    # What was deleted since then was whole: nothing unfinished is left.
    return bool(left) and (not stones or max(left) > max(stones))


def _key_of(row: object) -> tuple[object, object, object] | None:
    if not isinstance(row, Mapping):
        return None
    return row.get("type"), row.get("host"), row.get("pax_version")


def was_deleted(run: Run, key: CopyKey) -> str | None:
    """Say who deleted such a copy on purpose; None where nobody did."""
    rows = run.document.get("deleted_data")
    for row in reversed(rows) if isinstance(rows, list) else ():
        if _key_of(row) == key:
            return f"{row.get('by') or 'somebody'} deleted it ({row.get('why') or 'no reason'})"
    return None
