"""Repair of bad copies.

`repair` reacts to a copy that was found bad, or that an old program failed to make: the wrong parts
are transferred again from a copy of the majority. If there is none, it is repaired when one becomes
good. It leaves the copy ``verifying``; `caxev.handlers.checksum` then verifies it, at its own host.

Safe to repeat: see `caxev.transfer.carrying`.
"""

from __future__ import annotations

from collections.abc import Sequence

from caxev import (
    ERROR,
    HERE,
    PASSIVE,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    Copy,
    Job,
    Result,
    Retry,
    Run,
    RunUpdate,
    Skip,
    copy,
    copy_field,
    on,
    skip_of,
)
from caxev.config import Site, Sites
from caxev.copies.lifecycle import (
    arrived,
    broken_off,
    is_ours,
    key_of,
    serve_each,
    trigger_of,
    unfit,
)
from caxev.copies.quorum import is_disputed, majority, same_data, voters
from caxev.copies.sharing import sharing
from caxev.copies.storage import same_bytes
from caxev.core.model import STATUSES
from caxev.transfer import methods
from caxev.transfer.carrying import STALLED, TransferPlan, bring, fetch

BAD = (ERROR, TRANSFERRING)
"""Statuses of a copy that is bad, or is being repaired."""
REPAIRS = 3
"""Number of repairs of a copy before a person must look at it."""

SHARED = 86400.0
"""Seconds between two checks whether another run's entry still has the same files."""
ACQUITTED = 5.0
"""Seconds to wait for copies of the majority to become ``transferred`` again."""
JUDGED = 600.0
"""Seconds between two checks whether other copies still contradict one another."""


@on(
    copy(ERROR, host=(HERE, PASSIVE)),
    copy(TRANSFERRED),  # the first good copy may come after the bad one
    copy_field(STATUSES, host=(HERE, PASSIVE), gone=True),  # another entry of it was taken out
    lane="transfer",
    stall=STALLED,
    aliases=("RetryBadChecksumTransfer",),
    concerns=lambda run, _site: any(one.status in BAD for one in run.copies),
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


def _shared(run: Run, plan: TransferPlan, others: Sequence[str]) -> RunUpdate:
    """Refuse to repair files that another entry shares: they may be right for that entry.

    Raises `Retry`: the end of that, in another run, is no event of this one.
    """
    if (update := _still_bad(run, plan.resume, plan.trigger)) is not None:
        return update
    names = ", ".join(others[:3])
    raise Retry(f"its files are at, above or below those of {names}, too", after=SHARED)


def _still_bad(run: Run, bad: Copy | None, trigger: str) -> RunUpdate | None:
    """Return the update that marks a copy bad again if this reaction can no longer repair it."""
    if bad is None or bad.status != TRANSFERRING or not is_ours(bad, trigger):
        return None
    return broken_off(run, bad)


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
    if one.status != ERROR and not is_ours(one, trigger):
        return False
    there = job.sites.find(one.host)
    passive = there is not None and not there.listener and one.source in (None, job.site.name)
    return (one.host == job.site.name or passive) and same_data(one, key_of(job))


def plan_repair(
    run: Run, bad: Copy | None, site: Site, sites: Sites, *, trigger: str
) -> TransferPlan | Skip:
    """Decide whether `site` repairs this copy, and the source. Pure."""
    if bad is None:
        return Skip("the copy is gone")
    others = [one for one in run.copies if one.key == bad.key and one is not bad]
    if any(one.status in (TRANSFERRING, VERIFYING, TRANSFERRED) for one in others):
        return Skip("another entry of this copy is good, or on the way")
    if why := _past_repair(bad, site, sites, trigger):
        return Skip(why)
    if is_disputed(bad):
        return Skip("it contradicts others, and no majority decides yet")
    most = majority(run, bad.key, same=same_bytes(sites))
    # Files in quarantine may be the right ones: nothing is overwritten before a person decides.
    if bad.is_quarantined and not any(one.vouched for one in most):
        return Skip("no majority decides: a person must vouch for a copy (caxev vouch)")
    if bad.quarantine is not None and bad.quarantine.place is None:
        raise Retry("what differs is about to be set aside", after=JUDGED)
    if not most and voters(run, bad.key, same_bytes(sites)):
        raise Retry("the other copies contradict one another", after=JUDGED)
    good = _to_repair_from(run, bad, site, sites)
    # A copy of the majority may itself still be `error`, until its own site acquits it.
    if not good and any(map(is_disputed, most)):
        raise Retry("the copies to repair it from are about to be found good", after=ACQUITTED)
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

    Those with a manifest come first: from a copy without one, everything is transferred.
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
