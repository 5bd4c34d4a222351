"""Transfer and repair of copies between sites.

- `pull` reacts to a copy that became good elsewhere, and fetches it if ``download_options`` names
  that site and this site wants such data. It also reacts to a copy that a person requested here.
- `push` reacts to a copy that became good here, and brings it to the sites in ``upload_options``
  that have none. It also reacts to a copy requested at a site without a listener.
- `repair` reacts to a copy that was found bad, or that an old program failed to make: the wrong
  parts are transferred again from a copy of the majority. If there is none, it is repaired when one
  becomes good.

Data that was deleted on purpose (it has a tombstone in ``deleted_data``) is copied again only if a
person requests it.

All leave the copy ``verifying``; `caxev.handlers.checksum` then verifies it, at its own host.

Safe to repeat: the claim adds an entry only if the run has no such copy, so of two sites one wins.
Nothing is claimed before the link is open and has a free slot. The bytes go to a temporary name and
get the final one when they are complete and on the disk. An interrupted transfer is continued by
the same reaction, which recognizes its entry by the ``trigger``: site, handler and what it reacted
to (``chicago: pull: raw at lngs``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from attrs import evolve, frozen

from caxev import (
    ELSEWHERE,
    ERROR,
    GONE,
    HERE,
    PASSIVE,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    Copy,
    CopyKey,
    GiveUp,
    Job,
    Result,
    Retry,
    RootAway,
    Run,
    RunUpdate,
    Skip,
    Unmet,
    What,
    copy,
    on,
    skip_of,
)
from caxev.config import Site, Sites
from caxev.copies.lifecycle import (
    CopyPlan,
    arrived,
    asked_by,
    broken_off,
    claim,
    is_ours,
    key_of,
    manifest_of,
    not_brought,
    place_for,
    requested_from,
    serve_each,
    taken,
    targets,
    trigger_of,
    unfit,
    withdrawal,
    worst,
)
from caxev.copies.quorum import is_disputed, majority, same_data, voters
from caxev.copies.readings import suspecting
from caxev.copies.retention import is_left_over, unwanted
from caxev.copies.sharing import sharing, sharing_there
from caxev.copies.storage import same_bytes
from caxev.files import Moved, printable, safe_name
from caxev.transfer import Route, links, methods, unserved
from caxev.transfer import pull as pull_bytes
from caxev.transfer import push as push_bytes

STALLED = 15 * 60.0
"""Seconds without a byte after which a transfer is stopped and retried."""
REPAIRS = 3
"""Number of repairs of a copy before a person must look at it."""

ACQUITTED = 5.0
"""Seconds to wait for copies of the majority to become ``transferred`` again."""
JUDGED = 600.0
"""Seconds between two checks whether other copies still contradict one another."""


@frozen
class TransferPlan(CopyPlan):
    """A copy to transfer. `others` are further good sources.

    With `again` there is a bad copy at the location, or one that an old program left unfinished:
    its right parts are reused.
    """

    others: tuple[Copy, ...] = ()
    again: bool = False


@on(
    copy(TRANSFERRED, host=ELSEWHERE),
    copy(GONE, host=HERE),
    copy(REQUESTED, host=HERE),
    lane="transfer",
    timeout=None,
    stall=STALLED,
    aliases=("CopyPull",),
    decide=lambda job: skip_of(_pull_plan(job)),
)
async def pull(job: Job) -> Result:
    """Fetch a copy of data that is good at another site.

    The new copy becomes ``transferring``, then ``verifying``; ``error`` if it fails.
    """
    plan = _pull_plan(job)
    if isinstance(plan, Skip | RunUpdate):
        return plan
    mine = await fetch(job, await _with_care(job, plan))
    return arrived(job.run, mine)


@on(
    copy(TRANSFERRED, host=HERE),
    copy(GONE, host=ELSEWHERE),
    copy(REQUESTED, host=PASSIVE),
    lane="transfer",
    timeout=None,
    stall=STALLED,
    aliases=("CopyPush",),
    decide=lambda job: skip_of(*(_push_plan(job, name) for name in targets(job))),
)
async def push(job: Job) -> Result:
    """Bring data that is good here to the sites that want it and have none.

    Each new copy becomes ``transferring``, then ``verifying``; ``error`` if it fails.
    """
    return await serve_each(job, targets(job), _push_to)


async def _push_to(job: Job, name: str, others: tuple[RunUpdate, ...]) -> str | None:
    """Bring the copy to one site, or return why there is nothing to do."""
    plan = _push_plan(job, name)
    if isinstance(plan, Skip):
        return plan.why
    if isinstance(plan, RunUpdate):
        await job.update(plan)
        return "it is no longer wanted there"
    mine = await bring(job, await _with_care(job, plan), others)
    await job.update(arrived(job.run, mine))
    return None


@on(
    copy(ERROR, host=(HERE, PASSIVE)),
    copy(TRANSFERRED),  # the first good copy may come after the bad one
    lane="transfer",
    timeout=None,
    stall=STALLED,
    aliases=("RetryBadChecksumTransfer",),
    decide=lambda job: skip_of(*(_repair_plan(job, host) for host in _places(job))),
)
async def repair(job: Job) -> Result:
    """Transfer the wrong parts of a bad copy again.

    The copy becomes ``transferring``, then ``verifying``; ``error`` if it fails.
    """
    return await serve_each(job, _places(job), _repair_at)


async def _repair_at(job: Job, host: str, others: tuple[RunUpdate, ...]) -> str | None:
    """Repair the copy at one host, or return why there is nothing to do."""
    plan = _repair_plan(job, host)
    # `sharing` asks this machine's disk, so that only a copy here can be checked.
    if isinstance(plan, TransferPlan) and host == job.site.name:
        shared = await sharing(job, plan.resume or plan.source)
        plan = _shared(job.run, plan, shared) if shared else plan
    if isinstance(plan, Skip):
        return plan.why
    if isinstance(plan, TransferPlan):
        make_again = fetch if host == job.site.name else bring
        plan = arrived(job.run, await make_again(job, plan, others))
    await job.update(plan)
    return None


def _shared(run: Run, plan: TransferPlan, others: Sequence[str]) -> RunUpdate | Skip:
    """Refuse to repair files that another entry shares: they may be right for that entry."""
    why = f"its files are at, above or below those of {', '.join(others[:3])}, too"
    return _still_bad(run, plan.resume, plan.trigger) or Skip(f"it is not repaired: {why}")


def _still_bad(run: Run, bad: Copy | None, trigger: str) -> RunUpdate | None:
    """Return the update that marks a copy bad again if this reaction can no longer repair it."""
    if bad is None or bad.status != TRANSFERRING or not is_ours(bad, trigger):
        return None
    return broken_off(run, bad)


# -- doing --------------------------------------------------------------------------------------


async def fetch(job: Job, plan: TransferPlan, others: tuple[RunUpdate, ...] = ()) -> Copy:
    """Bring the copy here from the first source that works; returns its entry.

    Data from one source is reused with the next; a source whose link is closed is skipped. Raises
    the error of the last one, or `Retry` if any source may work later. If only closed links are
    left, the retry is due when the first one opens. `others` are as in `bring`.
    """
    sources = {source.key.host: source for source in (plan.source, *plan.others)}
    failed: list[Retry | GiveUp] = []
    closed: list[Retry | GiveUp] = []
    for name in links.traffic.order([*sources]):
        try:
            one = evolve(plan, source=sources[name])
            return await _move(job, one, name, pull_bytes, others)
        except links.Closed as error:
            closed.append(error)
        except (Retry, GiveUp) as error:
            if isinstance(error, RootAway) and not error.host and error.root in job.site.roots:
                raise  # our own disk is missing: no other source helps
            failed.append(error)
            job.log.warning(f"{plan.key} was not to be had from {name}: {error}")
        # The failed attempt may have claimed the entry: the next source continues that.
        plan = evolve(plan, resume=job.run.copy(plan.key))
    # A closed link decides when to retry only if nothing else does: its opening may be hours away.
    hopeful = any(isinstance(error, Retry) for error in failed)
    raise worst(failed if hopeful else [*failed, *closed])


async def bring(job: Job, plan: TransferPlan, others: tuple[RunUpdate, ...] = ()) -> Copy:
    """Bring the copy from here to its host; returns its entry.

    `others` are written as well if this reaction is parked. Raises `Retry` if the link is closed.
    """
    return await _move(job, plan, plan.key.host, push_bytes, others)


async def _move(
    job: Job,
    plan: TransferPlan,
    name: str,
    move: Callable[..., Moved],
    others: tuple[RunUpdate, ...] = (),
) -> Copy:
    """Claim the copy and move its bytes once the link has a free slot; returns its entry.

    Waiting for a slot leaves the run unchanged. If the link closes meanwhile, the transfer stops,
    and continues when it opens again.
    """
    here, there = job.site, job.sites.get(name)
    pulling = plan.key.host == here.name
    source = plan.source.location
    assert source is not None
    # The claim comes after the slot: a site that waits in a queue must not block the others, which
    # may be able to make the same copy at once.
    async with links.place(job, name) as rate:
        mine = await _claim(job, plan, others)
        route = Route(
            here,
            there,
            local_path=plan.location if pulling else source,
            remote_path=source if pulling else plan.location,
            expected=await manifest_of(job, plan.source.manifest),
            max_rate=rate,
            min_free=(here if pulling else there).min_free,
            again=plan.again,
            found=await manifest_of(job, plan.resume.manifest)
            if plan.again and plan.resume
            else None,
            checksum=plan.source.checksum,
        )
        async with suspecting(job, plan.source):
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


def _wrong(route: Route) -> list[str]:
    """Return the names of the files that a repair has brought, as far as manifests show them."""
    if route.expected is None or route.found is None:
        return []
    return [printable(one.path) for one in route.expected.differences(route.found)]


async def _with_care(job: Job, plan: TransferPlan) -> TransferPlan:
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


# -- deciding -----------------------------------------------------------------------------------


def _pull_plan(job: Job) -> TransferPlan | Skip | RunUpdate:
    """Decide about a pull; an update withdraws the entry of what is no longer wanted."""
    key, trigger = key_of(job), trigger_of("pull", job)
    plan = plan_pull(job.run, key, job.site, job.sites, trigger=trigger, now=job.now())
    if isinstance(plan, Skip):
        return withdrawal(job.run, key.at(job.site.name), trigger) or plan
    return plan


def _push_plan(job: Job, name: str) -> TransferPlan | Skip | RunUpdate:
    """Decide about a push to a site; an update withdraws what is no longer wanted there."""
    key, trigger, now = key_of(job), trigger_of("push", job), job.now()
    plan = plan_push(job.run, key, job.site, job.sites, name=name, trigger=trigger, now=now)
    if isinstance(plan, Skip):
        return withdrawal(job.run, key.at(name), trigger) or plan
    return plan


def _places(job: Job) -> list[str]:
    """Return the hosts of the copies that may be repaired: the bad one's, or all of ours."""
    if job.event.status != TRANSFERRED:
        return [key_of(job).host]
    trigger = trigger_of("repair", job)
    return [one.host for one in job.run.copies if _is_ours_and_bad(job, one, trigger)]


def _repair_plan(job: Job, host: str) -> TransferPlan | Skip | RunUpdate:
    """Decide about a repair; an update marks a copy bad again that can no longer be repaired."""
    trigger, bad = trigger_of("repair", job), job.run.copy(key_of(job).at(host))
    plan = plan_repair(job.run, bad, job.site, job.sites, trigger=trigger)
    if isinstance(plan, Skip):
        return _still_bad(job.run, bad, trigger) or plan
    return plan


def _is_ours_and_bad(job: Job, one: Copy, trigger: str) -> bool:
    """Return whether a good copy elsewhere may repair this one, or is repairing it."""
    there = job.sites.find(one.host)
    passive = there is not None and not there.listener and one.source in (None, job.site.name)
    is_bad = one.status == ERROR or is_ours(one, trigger)
    return (one.host == job.site.name or passive) and is_bad and same_data(one, key_of(job))


def plan_pull(
    run: Run, seen: CopyKey, site: Site, sites: Sites, *, trigger: str, now: datetime
) -> TransferPlan | Skip:
    """Decide whether `site` fetches data of this type and version, and from where. Pure."""
    key = seen.at(site.name)
    asked = requested_from(run.copy(key), trigger)
    good = sources(run, key, site, sites, asked)
    if isinstance(good, Skip):
        return _lacking(run, key, good.why)
    if seen.host in [source.host for source in good[1:]]:
        return Skip(f"{good[0].host} has it too, and comes first in download_options")
    # A person's request overrides the rules, except that there must be a good source.
    if asked is None and (why := unwanted(run, key, site, now)):
        return _lacking(run, key, why)
    return _plan(run, good, key, site, trigger)


def plan_push(
    run: Run, seen: CopyKey, site: Site, sites: Sites, *, name: str, trigger: str, now: datetime
) -> TransferPlan | Skip:
    """Decide whether `site` brings its copy of this type and version to the site `name`. Pure."""
    key = seen.at(name)
    asked = requested_from(run.copy(key), trigger)
    if why := not_brought(asked, site, name):
        return Skip(why)
    there = _target(seen.type, site, sites, name)
    if isinstance(there, Skip):
        return there
    source = run.copy(seen.at(site.name))
    if source is None:
        return Skip(f"there is no copy at {site.name}")
    if why := unfit(source):
        return _lacking(run, key, why)
    if asked is None and (why := unwanted(run, key, there, now)):
        return _lacking(run, key, why)
    return _plan(run, [source], key, there, trigger)


def _lacking(run: Run, key: CopyKey, why: str) -> Skip:
    """Return that a copy is not made, as something unmet if there is none."""
    return Unmet(why) if run.copy(key) is None else Skip(why)


def _target(kind: str, site: Site, sites: Sites, name: str) -> Site | Skip:
    """Return the site `name` if data of this type can be brought to it from `site`."""
    there = sites.find(name)
    if there is None:
        return Skip(f"{name} is not in sites.json")
    if (how := unserved(there.method)) is not None:
        return Skip(f"{name} is reached by {how}")
    if kind not in site.data_type or kind not in there.data_type:
        return Skip(f"{kind} data does not go to {name} (data_type)")
    return there


def plan_repair(
    run: Run, bad: Copy | None, site: Site, sites: Sites, *, trigger: str
) -> TransferPlan | Skip:
    """Decide whether `site` repairs this copy, and from where. Pure."""
    if bad is None:
        return Skip("the copy is gone")
    others = [one for one in run.copies if one.key == bad.key and one is not bad]
    if any(one.status in (TRANSFERRING, VERIFYING, TRANSFERRED) for one in others):
        return Skip("another entry of this copy is good, or on the way")
    if why := _past_repair(bad, site, sites, trigger):
        return Skip(why)
    if is_disputed(bad):
        return Skip("it contradicts others, and it is open who is right")
    most = majority(run, bad.key, same=same_bytes(sites))
    # Files in quarantine may be the right ones: nothing is overwritten before a person decides.
    if bad.is_quarantined and not any(one.vouched for one in most):
        return Skip("no majority says what is right: a person must vouch for a copy")
    if bad.quarantine is not None and bad.quarantine.place is None:
        raise Retry("what differs is about to be set aside", after=JUDGED)
    if not most and voters(run, bad.key, same_bytes(sites)):
        raise Retry("the other copies contradict one another", after=JUDGED)
    good = _to_repair_from(run, bad, site, sites)
    # A copy of the majority may itself still be `error`, until its own site acquits it.
    if not good and any(map(is_disputed, most)):
        raise Retry("the copies to repair it from are about to be acquitted", after=ACQUITTED)
    if not good:
        return Skip("no good copy is within reach")
    assert bad.location is not None  # `_past_repair` has checked it
    return TransferPlan(good[0], bad.key, bad.location, trigger, bad, tuple(good[1:]), again=True)


def _past_repair(bad: Copy, site: Site, sites: Sites, trigger: str) -> str | None:
    ours = is_ours(bad, trigger)
    found_bad = bad.status == ERROR and bad.checksumproblem
    if not (ours or found_bad or bad.is_abandoned):
        return f"it is {bad.status}, and not for what is in it"
    if bad.status == ERROR and (bad.repairs or 0) >= REPAIRS:
        return f"it was repaired {REPAIRS} times: a person must look at it"
    if bad.location is None:
        return f"{bad.key} has no location"
    if not _served(bad.host, site, sites):
        return f"{bad.host} is not reached by any of {', '.join(sorted(methods()))}"
    return None


def _to_repair_from(run: Run, bad: Copy, site: Site, sites: Sites) -> list[Copy]:
    """Return good copies of the majority, the source first; only ours if we pushed the bad one.

    Those with a manifest come before the others, from which everything is transferred.
    """
    if bad.host == site.name:
        names = dict.fromkeys([bad.source or "", *site.download_options, *sites])
    elif bad.source == site.name or (bad.source is None and bad.host in site.upload_options):
        names = dict.fromkeys([site.name])
    else:
        return []
    most = majority(run, bad.key, same=same_bytes(sites))
    found = (run.copy(bad.key.at(name)) for name in names if name != bad.host)
    good = [
        one for one in found if one in most and not unfit(one) and _served(one.host, site, sites)
    ]
    return sorted(good, key=lambda one: one.manifest is None)


def _served(name: str, site: Site, sites: Sites) -> bool:
    there = sites.find(name)
    return there is not None and (name == site.name or there.method in methods())


def _plan(
    run: Run, good: list[Copy], key: CopyKey, owner: Site, trigger: str
) -> TransferPlan | Skip:
    """Plan a copy of the first of `good` as `key` in the directories of `owner`, its site."""
    there = run.copy(key)
    if why := taken(there, trigger):
        return Skip(why)
    assert good[0].location is not None
    location = place_for(key, safe_name(good[0].location), owner)
    if isinstance(location, Skip):
        return location
    # We never write to a location that the entry does not name: it may be another copy's.
    if there is not None and there.status != REQUESTED and there.location != location:
        raise GiveUp(f"the entry of {key} says {there.location!r}, not {location!r}")
    again = is_left_over(run, key, location)
    return TransferPlan(good[0], key, location, trigger, there, tuple(good[1:]), again)


def sources(
    run: Run, key: CopyKey, site: Site, sites: Sites, asked: str | None = None
) -> list[Copy] | Skip:
    """Return the good copies in the order of ``download_options``, or only the one `asked` for."""
    if key.type not in site.data_type:
        return Skip(f"{site.name} does not move {key.type} data (data_type)")
    good: list[Copy] = []
    why: list[str] = []
    for name in site.download_options if asked is None else (asked,):
        found = run.copy(key.at(name))
        there = sites.find(name)
        if found is None:
            why.append(f"{name} has no such copy")
        elif there is None:
            why.append(f"{name} is not in sites.json")
        elif (how := unserved(there.method)) is not None:
            why.append(f"{name} is reached by {how}")
        elif (problem := unfit(found)) is not None:
            why.append(problem)
        else:
            good.append(found)
    return good or Skip(f"no source: {'; '.join(why) or 'download_options names no site'}")
