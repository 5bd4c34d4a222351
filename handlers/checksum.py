"""Verification of copies: `verifying` becomes `transferred` or `error`.

`checksum` reacts to a copy that is ``verifying`` at this site, or that this site put at a host
without a listener. It reads the copy once, makes its manifest, and compares it with the copy it
came from; if that one has no manifest (cax made it), by the cax-compatible checksum. The first
copy of a run is the reference for the others; any other copy is accepted only after a comparison.
A ``transferred`` copy without a checksum gets one.

`recheck` reads a copy again when ``check_asked`` requests it, and answers in ``check_answered``
with the ids of the requests that were there when it began to read. It also reads a
``transferred`` copy that has a ``checksumproblem``. `patrol` reads every copy again every
``patrol.days``. A copy that no longer matches its entry becomes ``error``, and so does one that
cannot be read, until a retry of that reaction can;
`caxev.handlers.judge` decides between copies that contradict one another.

Reading at another host uses the link to it like a transfer: its slots, hours and rate.

Safe to repeat: the reactions only read, and their updates expect the status that they found.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from attrs import evolve, frozen

from caxev import (
    ERROR,
    GONE,
    HERE,
    PASSIVE,
    TRANSFERRED,
    VERIFYING,
    Copy,
    CopyKey,
    Decision,
    GiveUp,
    Job,
    Manifest,
    Result,
    Retry,
    Run,
    RunUpdate,
    Skip,
    Wait,
    What,
    copy,
    copy_field,
    metrics,
    on,
    skip_of,
)
from caxev.config import Site, Sites
from caxev.config.data_types import RAW, UNTRIGGERED
from caxev.copies.lifecycle import broken_off, found_bad, found_good, manifest_of, written
from caxev.copies.quorum import at_odds, is_disputed, producer, same_data
from caxev.copies.storage import same_bytes
from caxev.files import printable
from caxev.files.digest import digest_copy
from caxev.transfer import Route, links, methods
from caxev.transfer import manifest as remote_manifest
from caxev.transfer.carrying import STALLED

NAMED = 5
"""Maximum number of bad files that an entry's ``error`` names."""
LASTING = timedelta(days=30)
"""Time for which a repaired copy must be good, so that its former repairs do not count any more."""
_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


@frozen
class ReadPlan:
    """A copy to read, and the reference for it (None: this is the first copy)."""

    copy: Copy
    reference: Copy | None

    @property
    def sha512(self) -> bool:
        """Whether the cax-compatible checksum must be computed: no reference has it."""
        known = self.reference
        return known is None or known.manifest is None or known.checksum is None


@on(
    copy(VERIFYING, host=(HERE, PASSIVE)),
    # Only here: the SHA-512 of a copy at another host cannot be computed over the link.
    copy(TRANSFERRED, host=HERE),
    lane="checksum",
    stall=STALLED,
    aliases=("AddChecksum", "CompareChecksums"),
    decide=lambda job: skip_of(_checksum_plan(job)),
)
async def checksum(job: Job) -> Result:
    """Verify a copy against the one it came from; give a first copy its digests."""
    if job.copy is not None and job.copy.status == VERIFYING:
        job.on_failure(broken_off(job.run, job.copy))
    plan = _checksum_plan(job)
    if isinstance(plan, Skip):
        return plan
    if plan.copy.host != job.site.name:
        plan = await _with_manifest(job, plan)
    # The time before the first byte: a change during the reading must count as later than it.
    began = job.now()
    manifest = await read(job, plan.copy, sha512=plan.sha512)
    # Stored before the entry names it: a crash in between leaves an unused manifest, never an
    # entry whose manifest is missing.
    await job.store_manifest(manifest.digest, manifest.to_rows())
    return await verdict(job, plan, manifest, began)


async def _with_manifest(job: Job, plan: ReadPlan) -> ReadPlan:
    """Return the plan with a manifest of the reference: at another host no SHA-512 is taken.

    If it has none, it is read here. Raises `GiveUp` if it is not here, `Retry` if it is bad.
    """
    known = plan.reference
    if known is None or known.manifest is not None:
        return plan
    here = job.run.copy(known.key) if known.host == job.site.name else None
    if here is None:
        raise GiveUp(f"{known.key} has no manifest, with which {plan.copy.key} could be compared")
    began = job.now()
    manifest = await read(job, here, sha512=True)
    await job.store_manifest(manifest.digest, manifest.to_rows())
    update = await compare_with_entry(job, here, manifest, began)
    read_now = await written(job, update, here.key)
    if read_now.status != TRANSFERRED:
        raise Retry(f"{here.key} is no longer what it was")
    return evolve(plan, reference=read_now)


def _checksum_plan(job: Job) -> ReadPlan | Skip:
    # Given up, this reaction has made the copy an error; a person may have it run again.
    again = job.event.status == VERIFYING
    return plan_checksum(job.run, job.copy, job.site, job.sites, again=again)


@on(
    copy_field("check_asked", "checksumproblem", host=(HERE, PASSIVE)),
    copy(TRANSFERRED, host=(HERE, PASSIVE)),  # requested while it was moved, or about to go
    lane="checksum",
    stall=STALLED,
    aliases=("AddChecksum", "CompareChecksums"),
    decide=lambda job: skip_of(_answer_plan(job)),
)
async def recheck(job: Job) -> Result:
    """Read a copy again when a fresh reading is requested or the copy is in doubt."""
    seen = plan_answer(job.copy, job.site, job.sites)
    if isinstance(seen, Skip):
        return seen
    job.on_failure(_unreadable(job, seen))
    began = job.now()
    manifest = await read(job, seen, sha512=seen.manifest is None)
    await job.store_manifest(manifest.digest, manifest.to_rows())
    return await compare_with_entry(job, seen, manifest, began)


def _answer_plan(job: Job) -> Copy | Skip:
    if isinstance(job.event.aspect, CopyKey) and job.event.before is None:
        return Skip("a request for a reading is an event of its own")
    return plan_answer(job.copy, job.site, job.sites)


@on(
    copy((TRANSFERRED, GONE), host=(HERE, PASSIVE)),  # the last ends a waiting
    lane="patrol",
    stall=STALLED,
    decide=lambda job: plan_patrol(job.run, job.copy, job.site, job.sites, job.now()),
)
async def patrol(job: Job) -> Result:
    """Read every copy again every few days, at low priority, to find corruption early."""
    now, seen = job.now(), job.copy
    plan = plan_patrol(job.run, seen, job.site, job.sites, now)
    if isinstance(plan, Wait):
        raise plan.retry(now)
    if seen is None or plan is not None:
        return plan
    rules = job.sites.get(seen.host).patrol
    job.on_failure(_unreadable(job, seen))
    began = job.now()
    # The label is created before the reading, so that the metric exists at 0 and can be alerted on.
    failures = metrics.rotten.labels(job.site.name)
    try:
        manifest = await read(
            job, seen, sha512=seen.manifest is None, gently=True, max_rate=rules.max_rate
        )
    except links.Closed:  # the link's hours are over: no sign of a bad copy, so not counted
        raise
    except (Retry, GiveUp):
        failures.inc()
        raise
    metrics.patrolled.labels(job.site.name).inc(manifest.total_bytes)
    await job.store_manifest(manifest.digest, manifest.to_rows())
    update = await compare_with_entry(job, seen, manifest, began)
    if _is_same(seen, manifest):
        # Written here, since `Retry` (which keeps this reaction for the next reading) returns
        # no update.
        await job.update(update)
        raise Retry(f"good; to be read again in {rules.days:g} days", after=rules.days * 86400)
    failures.inc()
    return update


async def read(
    job: Job, seen: Copy, *, sha512: bool, gently: bool = False, max_rate: float | None = None
) -> Manifest:
    """Make the copy's manifest from its files: here, or over the link to its host, in its slot."""
    name, location = seen.host, seen.location
    if location is None:
        raise GiveUp(f"{seen.key} has no location")
    if name == job.site.name:
        return await job.work(digest_copy, location, job.site.roots, sha512, gently, max_rate)
    async with links.place(job, name) as rate:
        slower = min((one for one in (rate, max_rate) if one is not None), default=None)
        route = Route(job.site, job.sites.get(name), "", location, max_rate=slower)
        return await links.while_open(job, name, remote_manifest, route)


async def verdict(job: Job, plan: ReadPlan, manifest: Manifest, began: datetime) -> RunUpdate:
    """Return the update for a copy whose manifest was read from `began` on."""
    seen, known, ours = plan.copy, plan.reference, manifest.cax_checksum()
    if known is None or known.manifest == manifest.digest:
        value = ours if known is None or ours is not None else known.checksum
        return _good(job, seen, manifest, began, value)
    if known.manifest is None and known.checksum == ours:
        return _good(job, seen, manifest, began, ours)
    why = await difference(job, known, manifest)
    job.log.error(f"{seen.key} is not what {known.key} is: {why}")
    job.did(What.DAMAGED, bytes=manifest.total_bytes, reason=f"not what {known.key} is: {why}")
    if (source := job.run.copy(known.key)) is not None and source.status == TRANSFERRED:
        # Some movers do not check what they read: the source itself may be bad.
        await job.suspect(source)
    # It contradicts its own digests, so it has certainly changed: no other copy need be judged.
    if not keeps_its_word(seen, manifest):
        return _bad(job, seen, why, manifest, began)
    # Its own digests held, so either copy may be wrong. The answer makes every site judge its own.
    return _bad(job, seen, why, manifest, began, disputed=True).answering(seen)


async def compare_with_entry(
    job: Job, seen: Copy, manifest: Manifest, began: datetime
) -> RunUpdate:
    """Return the update for a copy that was good: still good, or bad by its own entry."""
    if _is_same(seen, manifest):
        fields: dict[str, object] = {"manifest": manifest.digest, "verified_at": began}
        job.did(What.VERIFIED, bytes=manifest.total_bytes)
        if _is_unverified(seen):  # an earlier attempt could not read it
            return _answered(job, seen, found_good(job.run, seen, **fields))
        if seen.checksumproblem and seen.status == TRANSFERRED:
            fields |= {"checksumproblem": False, "error": None}
        return _answered(job, seen, RunUpdate.note(job.run, seen, **fields))
    why = await difference(job, seen, manifest)
    job.log.error(f"{seen.key} of {job.run} is no longer what it was: {why}")
    job.did(What.DAMAGED, bytes=manifest.total_bytes, reason=f"no longer what it was: {why}")
    return _bad(job, seen, why, manifest, began, vouched=None)


def _is_same(seen: Copy, manifest: Manifest) -> bool:
    """Return whether a copy's entry matches its fresh manifest."""
    if seen.manifest is not None:
        return seen.manifest == manifest.digest
    return seen.checksum == manifest.cax_checksum()


def keeps_its_word(seen: Copy, manifest: Manifest) -> bool:
    """Return whether no digest in the entry contradicts the fresh manifest."""
    manifests = (seen.manifest, seen.source_manifest)
    recorded = [one for one in manifests if one]
    if recorded:
        return all(one == manifest.digest for one in recorded)
    checksums = (seen.checksum, seen.source_checksum)
    ours = manifest.cax_checksum()
    return ours is None or all(one == ours for one in checksums if one)


def _unreadable(job: Job, seen: Copy) -> RunUpdate:
    """Return the update for an unreadable copy: no deletion may count on it any more."""
    why = (
        "it cannot be read (caxev reactions --failed shows why); once it can: caxev retry; if it "
        "never will, as on a bad disk: caxev rm --by-entries, then caxev copy"
    )
    return broken_off(job.run, seen, error=why)


def _last_read(run: Run, seen: Copy, now: datetime) -> datetime:
    """Return when the copy was last read, else (cax made it) created; times ahead of us are wrong.

    Without any usable time it is long ago, so that the copy is read at once.
    """
    known = (seen.read_at, seen.creation_time, run.start)
    return next((time for time in known if time is not None and time <= now), _LONG_AGO)


async def difference(job: Job, known: Copy, manifest: Manifest) -> str:
    """Describe which files differ, as far as the manifests show."""
    wanted = await manifest_of(job, known.manifest)
    if wanted is None:
        return f"its checksum differs from that of {known.key}"
    found = wanted.differences(manifest)
    job.did(What.DAMAGED, files=[printable(one.path) for one in found])
    names = ", ".join(f"{printable(one.path)} ({one.why})" for one in found[:NAMED])
    return f"{len(found)} files: {names}{', ...' if len(found) > NAMED else ''}"


def _good(
    job: Job, seen: Copy, manifest: Manifest, began: datetime, checksum: str | None
) -> RunUpdate:
    job.did(What.VERIFIED, bytes=manifest.total_bytes)
    fields: dict[str, object] = {
        "manifest": manifest.digest,
        "checksum": checksum,
        "verified_at": began,
    }
    if seen.size is None and seen.type in job.site.types.primary - {RAW}:
        fields["size"] = manifest.total_bytes  # a run has no field for it, as for raw data
    if seen.status == VERIFYING and seen.arrived_at is None:
        fields["arrived_at"] = job.now()
    return _answered(job, seen, found_good(job.run, seen, **fields))


def _bad(
    job: Job, seen: Copy, why: str, manifest: Manifest, began: datetime, **fields: object
) -> RunUpdate:
    ours = manifest.cax_checksum()
    fields |= {"manifest": manifest.digest, "checksum": ours, "verified_at": began}
    # Its repairs are counted against a disk that spoils them at once, not against one fault a year.
    if seen.status == TRANSFERRED and seen.since is not None and began - seen.since > LASTING:
        fields["repairs"] = None
    return _answered(job, seen, found_bad(job.run, seen, why, **fields))


def _answered(job: Job, seen: Copy, update: RunUpdate) -> RunUpdate:
    """Return the update with an answer if a reading was requested, or may settle a dispute."""
    awaited = seen.pending or at_odds(job.run, seen.key, same_bytes(job.sites))
    return update.answering(seen) if awaited else update


def plan_recheck(seen: Copy | None, site: Site, sites: Sites) -> Copy | Skip:
    """Decide whether this site reads that copy again. Pure."""
    if seen is None:
        return Skip("the copy is gone")
    if seen.type == UNTRIGGERED:
        return Skip("the DAQ's buffer is never touched")
    if seen.status != TRANSFERRED and not is_disputed(seen) and not _is_unverified(seen):
        return Skip(f"it is {seen.status}")
    if seen.manifest is None and seen.checksum is None:
        return Skip("nothing is known of it to compare it with")
    there = sites.find(seen.host)
    if there is None or not there.readable:
        return Skip(f"the files at {seen.host} cannot be read")
    if site.name not in (seen.host, seen.source):
        return Skip(f"{seen.source or 'the site that pushed it'} reads it")
    if seen.host != site.name and seen.manifest is None:
        return Skip("it has no manifest, and its SHA-512 cannot be taken from here")
    return seen


def plan_answer(seen: Copy | None, site: Site, sites: Sites) -> Copy | Skip:
    """Decide whether this site reads that copy because somebody asks for it. Pure."""
    plan = plan_recheck(seen, site, sites)
    if isinstance(plan, Skip) or plan.pending or plan.checksumproblem:
        return plan
    return Skip("that was answered")


def plan_patrol(run: Run, seen: Copy | None, site: Site, sites: Sites, now: datetime) -> Decision:
    """Decide when this site reads that copy again by itself. Pure."""
    plan = plan_recheck(seen, site, sites)
    if isinstance(plan, Skip):
        return plan
    rules = sites.get(plan.host).patrol
    if rules is None:
        return Skip("patrol is null: it is not read again by itself")
    due = _last_read(run, plan, now) + timedelta(days=rules.days)
    if plan.status == TRANSFERRED and due > now:
        return Wait(f"to be read again on {due:%Y-%m-%d}", due)
    return None


def plan_checksum(
    run: Run, seen: Copy | None, site: Site, sites: Sites, *, again: bool = False
) -> ReadPlan | Skip:
    """Decide whether this site verifies that copy, and against which one. Pure.

    With `again` also one that is an error because its verification was given up.
    """
    if seen is None:
        return Skip("the copy is gone")
    if seen.status == TRANSFERRED and seen.checksum is not None:
        return Skip("it has a checksum")
    given_up = again and _is_unverified(seen)
    if seen.status not in (VERIFYING, TRANSFERRED) and not given_up:
        return Skip(f"it is {seen.status} now")
    if seen.type == UNTRIGGERED:
        return Skip("the DAQ's buffer is never touched")
    there = sites.find(seen.host)
    if there is not None and there.method == "rucio" and seen.host != site.name:
        return Skip("a copy in a catalogue is verified by the site that uploads it")
    if site.name not in (seen.host, seen.source):
        return Skip(f"{seen.source or 'the site that pushed it'} verifies it")
    if seen.host != site.name and there is not None and there.method not in methods():
        return Skip(f"{seen.host} is reached by {there.method}, which this reaction does not serve")
    known = None if producer(seen) == seen.host else reference(run, seen, sites)
    if known is None and not is_first(run, seen, sites):
        raise GiveUp(f"there is no good copy to compare {seen.key} with")
    return ReadPlan(seen, known)


def _is_unverified(seen: Copy) -> bool:
    """Return whether one of us made it an error, and not for what is in it."""
    return seen.status == ERROR and not seen.checksumproblem and seen.since is not None


def is_first(run: Run, seen: Copy, sites: Sites) -> bool:
    """Return whether this is the original, the reference for the others."""
    if seen.source is not None:
        return False
    if producer(seen) == seen.host:
        return True
    alone = all(one.host == seen.host for one in run.copies if same_data(one, seen.key))
    return alone or seen.host in masters(seen.type, sites)


def reference(run: Run, seen: Copy, sites: Sites) -> Copy | None:
    """Find the copy to compare with: the source, else the master, else any good one.

    If none is left, the digests of the source that the entry keeps.
    """
    others = [one for one in run.copies if _comparable(one, seen)]
    first = [seen.source, *masters(seen.type, sites)]
    return min(others, key=lambda one: _rank(one.host, first), default=_remembered(seen))


def _rank(host: str, first: Sequence[str | None]) -> int:
    return first.index(host) if host in first else len(first)


def masters(kind: str, sites: Sites) -> list[str]:
    """Return the names of the sites that hold the master copies of this type of data."""
    return [site.name for site in sites.values() if kind in site.master]


def _comparable(one: Copy, seen: Copy) -> bool:
    good = one.status == TRANSFERRED and one.host != seen.host and (one.manifest or one.checksum)
    return bool(good) and same_data(one, seen.key) and producer(one) == producer(seen)


def _remembered(seen: Copy) -> Copy | None:
    fields = {"manifest": seen.source_manifest, "checksum": seen.source_checksum}
    if seen.source is None or not any(fields.values()):
        return None
    return Copy(CopyKey(seen.type, seen.source, seen.version), TRANSFERRED, fields)
