"""Transfer of copies between sites.

- `pull` reacts to a copy that became good elsewhere, and fetches it if ``download_options`` names
  that site and this site wants such data. It also reacts to a copy that a person requested here.
- `push` reacts to a copy that became good here, and brings it to the sites in ``upload_options``
  that have none. It also reacts to a copy requested at a site without a listener.

Data that was deleted on purpose (it has a tombstone in ``deleted_data``) is copied again only if a
person requests it.

Both leave the copy ``verifying``; `caxev.handlers.checksum` then verifies it, at its own host.

Safe to repeat: the claim adds an entry only if the run has no such copy, so of two sites one wins.
See `caxev.transfer.carrying` for the bytes.
"""

from __future__ import annotations

from datetime import datetime

from caxev import (
    ELSEWHERE,
    GONE,
    HERE,
    PASSIVE,
    REQUESTED,
    TRANSFERRED,
    Copy,
    CopyKey,
    GiveUp,
    Job,
    Result,
    Run,
    RunUpdate,
    Skip,
    Unmet,
    copy,
    on,
    skip_of,
)
from caxev.config import Site, Sites
from caxev.copies.lifecycle import (
    arrived,
    key_of,
    not_brought,
    place_for,
    requested_from,
    serve_each,
    taken,
    targets,
    trigger_of,
    unfit,
    withdrawal,
)
from caxev.copies.retention import is_left_over, unwanted
from caxev.transfer import unserved
from caxev.transfer.carrying import STALLED, TransferPlan, bring, fetch, with_care


@on(
    copy(TRANSFERRED, host=ELSEWHERE),
    copy(GONE, host=HERE),
    copy(REQUESTED, host=HERE),
    lane="transfer",
    stall=STALLED,
    aliases=("CopyPull",),
    # It fetches what no site is configured for only if that is requested.
    concerns=lambda run, site: bool(site.download_options) or site.name in run.hosts,
    decide=lambda job: skip_of(_pull_plan(job)),
)
async def pull(job: Job) -> Result:
    """Fetch a copy of data that is good at another site.

    The new copy becomes ``transferring``, then ``verifying``; ``error`` if it fails.
    """
    plan = _pull_plan(job)
    if isinstance(plan, Skip | RunUpdate):
        return plan
    mine = await fetch(job, await with_care(job, plan))
    return arrived(job.run, mine)


@on(
    copy(TRANSFERRED, host=HERE),
    copy(GONE, host=ELSEWHERE),
    copy(REQUESTED, host=PASSIVE),
    lane="transfer",
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
    mine = await bring(job, await with_care(job, plan), others)
    await job.update(arrived(job.run, mine))
    return None


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
    key, trigger = key_of(job).at(name), trigger_of("push", job)
    plan = plan_push(job.run, key, job.site, job.sites, trigger=trigger, now=job.now())
    if isinstance(plan, Skip):
        return withdrawal(job.run, key, trigger) or plan
    return plan


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
    run: Run, key: CopyKey, site: Site, sites: Sites, *, trigger: str, now: datetime
) -> TransferPlan | Skip:
    """Decide whether `site` makes the copy `key` at another site from its own. Pure."""
    asked = requested_from(run.copy(key), trigger)
    if why := not_brought(asked, site, key.host):
        return Skip(why)
    there = _target(key, site, sites)
    if isinstance(there, Skip):
        return there
    source = run.copy(key.at(site.name))
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


def _target(key: CopyKey, site: Site, sites: Sites) -> Site | Skip:
    """Return the site of a copy if data of its type can be brought there from `site`."""
    there = sites.find(key.host)
    if there is None:
        return Skip(f"{key.host} is not in sites.json")
    if (how := unserved(there.method)) is not None:
        return Skip(f"{key.host} is reached by {how}")
    if key.type not in site.data_type or key.type not in there.data_type:
        return Skip(f"{key.type} data does not go to {key.host} (data_type)")
    return there


def _plan(
    run: Run, good: list[Copy], key: CopyKey, owner: Site, trigger: str
) -> TransferPlan | Skip:
    """Plan a copy of the first of `good` as `key` in the directories of `owner`, its site."""
    there = run.copy(key)
    if why := taken(there, trigger):
        return Skip(why)
    assert good[0].location is not None
    location = place_for(key, good[0].location, owner)
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
