"""Copies are verified: `verifying` becomes `transferred` or `error`.

`checksum` reacts to a copy that is ``verifying`` at this site, or at a host without a listener
where this site put it. It reads the copy once, makes its manifest, and compares that with the copy
it came from. Where that one has no manifest (cax made it), the cax-compatible checksum is compared
instead. The first copy of a run, where the data was born, is what others are compared with; any
other needs something to be compared with, and is not accepted without.

A copy that is ``transferred`` here and has no checksum yet is given one.

`recheck` reads a copy afresh for whoever asks by ``check_asked``, and answers in
``check_answered`` with the ids of the requests that stood there when it began to read. A copy that
is ``transferred`` though somebody noted a ``checksumproblem`` is read as well. `patrol`
does so by itself every ``patrol.days``. A copy that is no longer
what its entry says becomes ``error``; `caxev.handlers.judge` says who is right where copies
contradict one another.

What is read at another host goes over the link to it: in a place, in the hours and at the rate that
a transfer would have.

Safe to repeat: they only read, and their updates name the status that they found.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from attrs import frozen

from caxev import (
    ERROR,
    GONE,
    HERE,
    PASSIVE,
    TRANSFERRED,
    VERIFYING,
    Copy,
    CopyKey,
    GiveUp,
    Job,
    Manifest,
    Result,
    Retry,
    Run,
    RunUpdate,
    Skip,
    copy,
    copy_field,
    metrics,
    on,
)
from caxev.config import Site, Sites
from caxev.copies.deletion import same_bytes
from caxev.copies.quorum import DISPUTED, VOUCHED, at_odds, is_disputed, producer
from caxev.core.model import as_utc
from caxev.files import Report, confine, digest_tree, idle_disk, printable
from caxev.transfer import Route, links, methods
from caxev.transfer import manifest as remote_manifest

STALLED = 15 * 60.0
"""Seconds without a byte after which reading is broken off and tried again."""
NAMED = 5
"""How many bad files an entry's ``error`` names."""
_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


@frozen
class ReadPlan:
    """A copy to be read, and the one to compare it with (None: it is the first)."""

    copy: Copy
    reference: Copy | None

    @property
    def sha512(self) -> bool:
        """Whether the cax-compatible checksum must be computed: nobody has it to carry over."""
        known = self.reference
        return known is None or known.manifest is None or known.checksum is None


@on(
    copy(VERIFYING, host=(HERE, PASSIVE)),
    copy(TRANSFERRED, host=HERE),
    lane="checksum",
    timeout=None,
    stall=STALLED,
    aliases=("AddChecksum", "CompareChecksums"),
)
async def checksum(job: Job) -> Result:
    """Verify a copy against the one it came from; give a first copy its digests."""
    if job.copy is not None and job.copy.status == VERIFYING:
        job.on_failure(RunUpdate.change_copy(job.run, job.copy, ERROR))
    plan = plan_checksum(job.run, job.copy, job.site, job.sites)
    if isinstance(plan, Skip):
        return plan
    began = job.now()
    manifest = await read(job, plan.copy, sha512=plan.sha512)
    await job.store_manifest(manifest.digest, manifest.to_rows())
    return await verdict(job, plan, manifest, began)


@on(
    copy_field("check_asked", "checksumproblem", host=(HERE, PASSIVE)),
    lane="checksum",
    timeout=None,
    stall=STALLED,
    aliases=("AddChecksum", "CompareChecksums"),
)
async def recheck(job: Job) -> Result:
    """Read a copy afresh because somebody asks, or doubts, whether it is still good."""
    seen = plan_recheck(job.copy, job.site, job.sites)
    if isinstance(seen, Skip):
        return seen
    if not (seen.pending or seen.fields.get("checksumproblem")):
        return Skip("that was answered")
    job.on_failure(_unreadable(job, seen))
    began = job.now()
    manifest = await read(job, seen, sha512=seen.manifest is None)
    await job.store_manifest(manifest.digest, manifest.to_rows())
    return await told(job, seen, manifest, began)


@on(
    copy((TRANSFERRED, GONE), host=(HERE, PASSIVE)),  # the last ends a waiting
    lane="patrol",
    timeout=None,
    stall=STALLED,
)
async def patrol(job: Job) -> Result:
    """Read every copy again after so many days, gently, so that rot is found in time."""
    seen = plan_recheck(job.copy, job.site, job.sites)
    if isinstance(seen, Skip):
        return seen
    rules = job.sites.get(seen.host).patrol
    if rules is None:
        return Skip("patrol is null: it is not read again by itself")
    due = _last_read(job.run, seen, job.now()) + timedelta(days=rules.days)
    if seen.status == TRANSFERRED and due > job.now():
        raise Retry(f"to be read again on {due:%Y-%m-%d}", after=(due - job.now()).total_seconds())
    job.on_failure(_unreadable(job, seen))
    began = job.now()
    failures = metrics.rotten.labels(job.site.name)
    try:
        manifest = await _read_gently(job, seen, rules.max_rate)
    except links.Closed:
        raise
    except (Retry, GiveUp):
        failures.inc()
        raise
    metrics.patrolled.labels(job.site.name).inc(manifest.total_bytes)
    await job.store_manifest(manifest.digest, manifest.to_rows())
    update = await told(job, seen, manifest, began)
    if _is_same(seen, manifest):
        await job.update(update)
        raise Retry(f"good; to be read again in {rules.days:g} days", after=rules.days * 86400)
    failures.inc()
    return update


async def read(job: Job, seen: Copy, *, sha512: bool) -> Manifest:
    """Make the copy's manifest, here or over SSH, from what is on its disk."""
    if seen.host != job.site.name:
        return await _read_back(job, seen)
    return await job.work(digest_copy, _location(seen), job.site.roots, sha512)


async def _read_gently(job: Job, seen: Copy, max_rate: float | None) -> Manifest:
    if seen.host != job.site.name:
        return await _read_back(job, seen, max_rate)
    location, roots = _location(seen), job.site.roots
    return await job.work(digest_gently, location, roots, seen.manifest is None, max_rate)


async def _read_back(job: Job, seen: Copy, max_rate: float | None = None) -> Manifest:
    """Read a copy over the link to its host, as one of the transfers that this carries."""
    name, location = seen.host, _location(seen)
    async with links.place(job, name) as rate:
        slower = min((one for one in (rate, max_rate) if one is not None), default=None)
        route = Route(job.site, job.sites.get(name), "", location, max_rate=slower)
        return await links.while_open(job, name, remote_manifest, route)


def _location(seen: Copy) -> str:
    if seen.location is None:
        raise GiveUp(f"{seen.key} has no location")
    return seen.location


def digest_copy(location: str, roots: tuple[str, ...], sha512: bool, *, report: Report) -> Manifest:
    """Make the manifest of a copy that the database says is at `location`, if that is ours."""
    return digest_tree(confine(location, roots), sha512=sha512, report=report)


def digest_gently(
    location: str, roots: tuple[str, ...], sha512: bool, max_rate: float | None, *, report: Report
) -> Manifest:
    """As `digest_copy`, by one thread that gives way to every other use of the disk."""
    path = confine(location, roots)
    with idle_disk():
        return digest_tree(path, sha512=sha512, threads=1, max_rate=max_rate, report=report)


async def verdict(
    job: Job, plan: ReadPlan, manifest: Manifest, began: datetime | None = None
) -> RunUpdate:
    """Say what the copy is, given its manifest, which was read from `began` on."""
    known, ours = plan.reference, manifest.cax_checksum()
    seen, began = plan.copy, began or job.now()
    if known is None or known.manifest == manifest.digest:
        value = ours if known is None or ours is not None else known.checksum
        return _update(job, seen, TRANSFERRED, manifest, began, checksum=value)
    if known.manifest is None and known.checksum == ours:
        return _update(job, seen, TRANSFERRED, manifest, began, checksum=ours)
    why = await difference(job, known, manifest)
    job.log.error(f"{seen.key} is not what {known.key} is: {why}")
    if (source := job.run.copy(known.key)) is not None and source.status == TRANSFERRED:
        await job.suspect(source)  # not every way of moving sees what passes
    bad: dict[str, object] = {"checksumproblem": True, "error": why}
    if not keeps_its_word(seen, manifest):
        return _update(job, seen, ERROR, manifest, began, checksum=ours, **bad)
    bad[DISPUTED] = True  # and an answer, so that all judge their copies
    return _update(job, seen, ERROR, manifest, began, checksum=ours, **bad).answering(seen)


async def told(job: Job, seen: Copy, manifest: Manifest, began: datetime) -> RunUpdate:
    """Say what a copy is that was good: as it was, or bad, by its own entry."""
    if _is_same(seen, manifest):
        fields: dict[str, object] = {"manifest": manifest.digest, "verified_at": began}
        if seen.fields.get("checksumproblem") and seen.status == TRANSFERRED:
            fields |= {"checksumproblem": False, "error": None}
        read = RunUpdate.note(job.run, seen, **fields)
        return read.answering(seen) if _is_awaited(job, seen) else read
    why = await difference(job, seen, manifest)
    job.log.error(f"{seen.key} of {job.run} is no longer what it was: {why}")
    ours = manifest.cax_checksum()
    bad = {"checksumproblem": True, DISPUTED: None, VOUCHED: None, "error": why}
    return _update(job, seen, ERROR, manifest, began, checksum=ours, **bad)


def _is_same(seen: Copy, manifest: Manifest) -> bool:
    """Whether a copy's entry says the same as what was read of it."""
    if seen.manifest is not None:
        return seen.manifest == manifest.digest
    return seen.checksum == manifest.cax_checksum()


def keeps_its_word(seen: Copy, manifest: Manifest) -> bool:
    """Whether nothing that the entry said of this copy before contradicts what was read of it."""
    manifests = (seen.manifest, seen.fields.get("source_manifest"))
    said = [one for one in manifests if one]
    if said:
        return all(one == manifest.digest for one in said)
    checksums = (seen.checksum, seen.fields.get("source_checksum"))
    ours = manifest.cax_checksum()
    return ours is None or all(one == ours for one in checksums if one)


def _unreadable(job: Job, seen: Copy) -> RunUpdate:
    """What to write where a copy cannot be read: nobody may count on it, and a person must look."""
    why = "it cannot be read (caxev reactions --failed); once it can, make its status verifying"
    return RunUpdate.change_copy(job.run, seen, ERROR, error=why)


def _last_read(run: Run, seen: Copy, now: datetime) -> datetime:
    """When it was read last or, of one that cax made, came to be; in the future it was not."""
    known = (seen.read_at, as_utc(seen.fields.get("creation_time")), run.start)
    return next((time for time in known if time is not None and time <= now), _LONG_AGO)


async def difference(job: Job, known: Copy, manifest: Manifest) -> str:
    """Say which files are bad, as far as that can be known."""
    rows = None if known.manifest is None else await job.load_manifest(known.manifest)
    if rows is None:
        return f"its checksum differs from that of {known.key}"
    found = Manifest.from_rows(rows).differences(manifest)
    names = ", ".join(f"{printable(one.path)} ({one.why})" for one in found[:NAMED])
    return f"{len(found)} files: {names}{', ...' if len(found) > NAMED else ''}"


def _update(
    job: Job, seen: Copy, status: str, manifest: Manifest, began: datetime, **fields: object
) -> RunUpdate:
    if status == TRANSFERRED and seen.fields.get("checksumproblem"):
        fields |= {"checksumproblem": False, DISPUTED: None, "error": None}
    update = RunUpdate.change_copy(
        job.run, seen, status, manifest=manifest.digest, verified_at=began, **fields
    )
    return update.answering(seen) if _is_awaited(job, seen) else update


def _is_awaited(job: Job, seen: Copy) -> bool:
    """Whether somebody waits for a reading of this copy, or could do something with one.

    A new voice may decide between copies that contradict one another.
    """
    return bool(seen.pending) or at_odds(job.run, seen.key, same_bytes(job.sites))


def plan_recheck(seen: Copy | None, site: Site, sites: Sites) -> Copy | Skip:
    """Decide whether this site reads that copy again. Pure."""
    if seen is None:
        return Skip("the copy is gone")
    if seen.type == "untriggered":
        return Skip("the DAQ's buffer is never touched")
    if seen.status != TRANSFERRED and not is_disputed(seen):
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


def plan_checksum(run: Run, seen: Copy | None, site: Site, sites: Sites) -> ReadPlan | Skip:
    """Decide whether this site verifies that copy, and against which one. Pure."""
    if seen is None:
        return Skip("the copy is gone")
    if seen.status == TRANSFERRED and seen.checksum is not None:
        return Skip("it has a checksum")
    if seen.status not in (VERIFYING, TRANSFERRED):
        return Skip(f"it is {seen.status} now")
    if seen.type == "untriggered":
        return Skip("the DAQ's buffer is never touched")
    there = sites.find(seen.host)
    if there is not None and there.method == "rucio" and seen.host != site.name:
        return Skip("what is in a catalogue is verified by who brings it there")
    if site.name not in (seen.host, seen.source):
        return Skip(f"{seen.source or 'the site that pushed it'} verifies it")
    there = sites.find(seen.host)
    if seen.host != site.name and there is not None and there.method not in methods():
        return Skip(f"{seen.host} is reached by {there.method}, which this reaction does not serve")
    known = None if producer(seen) == seen.host else reference(run, seen, sites)
    if known is None and not is_first(run, seen, sites):
        raise GiveUp(f"there is no good copy to compare {seen.key} with")
    return ReadPlan(seen, known)


def is_first(run: Run, seen: Copy, sites: Sites) -> bool:
    """Whether this copy is where the data was born, so that others are compared with it."""
    if seen.source is not None:
        return False
    if producer(seen) == seen.host:
        return True
    alone = not any(_same_data(one, seen) for one in run.copies)
    return alone or seen.host in masters(seen.type, sites)


def reference(run: Run, seen: Copy, sites: Sites) -> Copy | None:
    """Find the copy to compare with: the one it came from, else the master, else any good one.

    Where none is left, what the entry remembers of the one it came from.
    """
    others = [one for one in run.copies if _comparable(one, seen)]
    first = [seen.source, *masters(seen.type, sites)]
    return min(others, key=lambda one: _rank(one.host, first), default=_remembered(seen))


def _rank(host: str, first: Sequence[str | None]) -> int:
    return first.index(host) if host in first else len(first)


def masters(kind: str, sites: Sites) -> list[str]:
    """Return the names of the sites that hold the master copies of such data."""
    return [site.name for site in sites.values() if kind in site.master]


def _comparable(one: Copy, seen: Copy) -> bool:
    good = one.status == TRANSFERRED and (one.manifest or one.checksum)
    return bool(good) and _same_data(one, seen) and producer(one) == producer(seen)


def _same_data(one: Copy, seen: Copy) -> bool:
    return (one.type, one.version) == (seen.type, seen.version) and one.host != seen.host


def _remembered(seen: Copy) -> Copy | None:
    fields = {name: seen.fields.get(f"source_{name}") for name in ("manifest", "checksum")}
    if seen.source is None or not any(fields.values()):
        return None
    return Copy(CopyKey(seen.type, seen.source, seen.version), TRANSFERRED, fields)
