"""Copies are verified: `verifying` becomes `transferred` or `error`.

`checksum` reacts to a copy that is ``verifying`` at this site, or at a host without a listener
where this site put it. It reads the copy once, makes its manifest, and compares that with the copy
it came from. Where that one has no manifest (cax made it), the cax-compatible checksum is compared
instead. The first copy of a run, where the data was born, is what others are compared with; any
other needs something to be compared with, and is not accepted without.

A copy that is ``transferred`` here and has no checksum yet is given one.

Safe to repeat: it only reads, and its update names the status that it found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

from caxev import (
    ERROR,
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
    Run,
    RunUpdate,
    Skip,
    copy,
    on,
)
from caxev.config import Site, Sites
from caxev.files import confine, digest_tree, printable
from caxev.movers import Route
from caxev.movers import manifest as remote_manifest

STALLED = 15 * 60.0
"""Seconds without a byte after which reading is broken off and tried again."""
NAMED = 5
"""How many bad files an entry's ``error`` names."""


@frozen
class Plan:
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
        job.park_with(RunUpdate.change_copy(job.run, job.copy, ERROR))
    plan = plan_checksum(job.run, job.copy, job.site, job.sites)
    if isinstance(plan, Skip):
        return plan
    manifest = await read(job, plan)
    await job.store_manifest(manifest.digest, manifest.to_rows())
    return await verdict(job, plan, manifest)


async def read(job: Job, plan: Plan) -> Manifest:
    """Make the copy's manifest, here or over SSH, from what is on its disk."""
    location = plan.copy.location
    if location is None:
        raise GiveUp(f"{plan.copy.key} has no location")
    if plan.copy.host == job.site.name:
        return await job.work(digest_copy, location, job.site.roots, plan.sha512)
    there = job.sites.get(plan.copy.host)
    return await job.work(remote_manifest, Route(job.site, there, "", location))


def digest_copy(location: str, roots: tuple[str, ...], sha512: bool, *, report: object) -> Manifest:
    """Make the manifest of a copy that the database says is at `location`, if that is ours."""
    return digest_tree(confine(location, roots), sha512=sha512, report=report)  # type: ignore[arg-type]


async def verdict(job: Job, plan: Plan, manifest: Manifest) -> RunUpdate:
    """Say what the copy is, given its manifest."""
    known, ours = plan.reference, manifest.cax_checksum()
    if known is None or known.manifest == manifest.digest:
        value = ours if known is None or ours is not None else known.checksum
        return _update(job, plan, TRANSFERRED, manifest, checksum=value)
    if known.manifest is None and known.checksum == ours:
        return _update(job, plan, TRANSFERRED, manifest, checksum=ours)
    why = await difference(job, known, manifest)
    job.log.error(f"{plan.copy.key} is not what {known.key} is: {why}")
    return _update(job, plan, ERROR, manifest, checksum=ours, checksumproblem=True, error=why)


async def difference(job: Job, known: Copy, manifest: Manifest) -> str:
    """Say which files are bad, as far as that can be known."""
    rows = None if known.manifest is None else await job.load_manifest(known.manifest)
    if rows is None:
        return f"its checksum differs from that of {known.key}"
    found = Manifest.from_rows(rows).differences(manifest)
    names = ", ".join(f"{printable(one.path)} ({one.why})" for one in found[:NAMED])
    return f"{len(found)} files: {names}{', ...' if len(found) > NAMED else ''}"


def _update(job: Job, plan: Plan, status: str, manifest: Manifest, **fields: object) -> RunUpdate:
    now = job.now()
    if status == TRANSFERRED and plan.copy.fields.get("checksumproblem"):
        fields |= {"checksumproblem": False, "error": None}
    return RunUpdate.change_copy(
        job.run, plan.copy, status, manifest=manifest.digest, verified_at=now, **fields
    )


def plan_checksum(run: Run, seen: Copy | None, site: Site, sites: Sites) -> Plan | Skip:
    """Decide whether this site verifies that copy, and against which one. Pure."""
    if seen is None:
        return Skip("the copy is gone")
    if seen.status == TRANSFERRED and seen.checksum is not None:
        return Skip("it has a checksum")
    if seen.status not in (VERIFYING, TRANSFERRED):
        return Skip(f"it is {seen.status} now")
    if seen.type == "untriggered":
        return Skip("the DAQ's buffer is never touched")
    if site.name not in (seen.host, seen.source):
        return Skip(f"{seen.source or 'the site that pushed it'} verifies it")
    known = None if is_made_here(seen) else reference(run, seen, sites)
    if known is None and not is_first(run, seen, sites):
        raise GiveUp(f"there is no good copy to compare {seen.key} with")
    return Plan(seen, known)


def is_first(run: Run, seen: Copy, sites: Sites) -> bool:
    """Whether this copy is where the data was born, so that others are compared with it."""
    if seen.source is not None:
        return False
    if is_made_here(seen):
        return True
    alone = not any(_same_data(one, seen) for one in run.copies)
    return alone or seen.host in masters(seen.type, sites)


def is_made_here(seen: Copy) -> bool:
    """Whether a job at its own site has made this copy: such data differ from site to site."""
    return seen.source is None and isinstance(seen.fields.get("job"), Mapping)


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
    return bool(good) and _same_data(one, seen)


def _same_data(one: Copy, seen: Copy) -> bool:
    return (one.type, one.version) == (seen.type, seen.version) and one.host != seen.host


def _remembered(seen: Copy) -> Copy | None:
    fields = {name: seen.fields.get(f"source_{name}") for name in ("manifest", "checksum")}
    if seen.source is None or not any(fields.values()):
        return None
    return Copy(CopyKey(seen.type, seen.source, seen.version), TRANSFERRED, fields)
