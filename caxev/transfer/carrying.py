"""Carrying a copy from one site to another: claim its entry, then move its bytes.

Handlers decide what is carried, and call `fetch` or `bring`. Nothing is claimed before the link is
open and has a free slot. The bytes go to a temporary name and get the final one when they are
complete and on the disk. An interrupted transfer is continued by the same reaction, which
recognizes its entry by the ``trigger``: site, handler and what it reacted to (``chicago: pull: raw
at lngs``).
"""

from __future__ import annotations

from attrs import evolve, frozen

from caxev import ERROR, TRANSFERRING, Copy, GiveUp, Job, Retry, RootAway, RunUpdate, What
from caxev.config import Site
from caxev.copies.lifecycle import CopyPlan, asked_by, claim, manifest_of, worst
from caxev.copies.readings import suspecting
from caxev.copies.sharing import sharing, sharing_there
from caxev.files import printable
from caxev.transfer import Route, links
from caxev.transfer import pull as pull_bytes
from caxev.transfer import push as push_bytes

STALLED = 15 * 60.0
"""Seconds without a byte after which a transfer is stopped and retried."""


@frozen
class TransferPlan(CopyPlan):
    """A copy to transfer. `others` are further good sources.

    With `again` there is a bad copy at the location, or one that an old program left unfinished:
    its right parts are reused.
    """

    others: tuple[Copy, ...] = ()
    again: bool = False


async def fetch(job: Job, plan: TransferPlan, others: tuple[RunUpdate, ...] = ()) -> Copy:
    """Bring the copy here from the first source that works; returns its entry.

    Data from one source is reused with the next; a source whose link is closed is skipped. Raises
    the error of the last one, or `Retry` if any source may work later. If only closed links are
    left, the retry is due when the first one opens. `others` are as in `bring`.
    """
    sources = {source.host: source for source in (plan.source, *plan.others)}
    failed: list[Retry | GiveUp] = []
    closed: list[Retry | GiveUp] = []
    for name in links.traffic.order([*sources]):
        try:
            return await bring(job, evolve(plan, source=sources[name]), others)
        except links.Closed as error:
            closed.append(error)
        except (Retry, GiveUp) as error:
            if isinstance(error, RootAway) and not error.host and error.root in job.site.roots:
                raise  # our own disk is missing: no other source helps
            failed.append(error)
            job.log.warning(f"{plan.key} could not be fetched from {name}: {error}")
        # The failed attempt may have claimed the entry: the next source continues that.
        plan = evolve(plan, resume=job.run.copy(plan.key))
    # A closed link decides when to retry only if nothing else does: its opening may be hours away.
    hopeful = any(isinstance(error, Retry) for error in failed)
    raise worst(failed if hopeful else [*failed, *closed])


async def bring(job: Job, plan: TransferPlan, others: tuple[RunUpdate, ...] = ()) -> Copy:
    """Claim the copy and move its bytes once the link has a free slot; returns its entry.

    Waiting for a slot leaves the run unchanged. If the link closes meanwhile, the transfer stops,
    and continues when it opens again. `others` are written as well if this reaction is parked.
    Raises `Retry` if the link is closed.
    """
    pulling = plan.key.host == job.site.name
    name = plan.source.host if pulling else plan.key.host
    # The claim comes after the slot: a site that waits in a queue must not block the others, which
    # may be able to make the same copy at once.
    async with links.place(job, name) as rate:
        mine = await _claim(job, plan, others)
        route = await _route(job, plan, job.sites.get(name), rate)
        async with suspecting(job, plan.source):
            move = pull_bytes if pulling else push_bytes
            moved = await links.while_open(job, name, move, route)
    links.traffic.note(name, moved.bytes_sent, moved.seconds)
    job.log.info(f"moved {moved.bytes_sent} of {moved.bytes_total} bytes in {moved.seconds:.1f} s")
    is_bad = plan.resume is not None and plan.resume.checksumproblem
    job.did(
        What.REPAIRED if is_bad else What.TRANSFERRED,
        source=plan.source.host,
        target=plan.key.host,
        bytes=moved.bytes_sent,
        files=_wrong(route) if is_bad else (),
        by=asked_by(mine),
    )
    return mine


async def _route(job: Job, plan: TransferPlan, there: Site, rate: float | None) -> Route:
    here, source, bad = job.site, plan.source, plan.resume if plan.again else None
    assert source.location is not None
    pulling = plan.key.host == here.name
    return Route(
        here,
        there,
        local_path=plan.location if pulling else source.location,
        remote_path=source.location if pulling else plan.location,
        expected=await manifest_of(job, source.manifest),
        max_rate=rate,
        min_free=(here if pulling else there).min_free,
        again=plan.again,
        found=await manifest_of(job, None if bad is None else bad.manifest),
        checksum=source.checksum,
    )


def _wrong(route: Route) -> list[str]:
    """Return the names of the files that a repair has brought, as far as manifests show them."""
    if route.expected is None or route.found is None:
        return []
    return [printable(one.path) for one in route.expected.differences(route.found)]


async def with_care(job: Job, plan: TransferPlan) -> TransferPlan:
    """Drop `again` from the plan if another entry has its files at the same location."""
    if not plan.again:
        return plan
    wanted = Copy(plan.key, TRANSFERRING, {"location": plan.location})
    if plan.key.host == job.site.name:
        return evolve(plan, again=not await sharing(job, wanted))
    return evolve(plan, again=not await sharing_there(job, wanted))


async def _claim(job: Job, plan: TransferPlan, others: tuple[RunUpdate, ...]) -> Copy:
    """Claim the planned copy, and count the repairs of a bad one; returns its entry."""
    # Only a repair that starts from `error` counts: continued after a crash, it is the same one.
    fields: dict[str, object] = {"location": plan.location}
    if plan.resume is not None and plan.resume.status == ERROR and plan.again:
        fields["repairs"] = (plan.resume.repairs or 0) + 1
    return await claim(job, plan, fields, others=others)
