"""Disputes between copies, decided by the majority of their digests.

`judge` reacts to a copy that was found bad here (or that this site put at a host without a
listener), and to every requested reading of a copy. If the digests of the copies differ, it
requests readings of those that were not read lately. When all have answered, each site judges its
own copy: in the majority it is good, even against the master; outside of it the copy becomes
``error``, even the master, and `repair` repairs it from one of the majority.

Without a majority nothing is deleted or overwritten. A copy that differs from the master becomes
``error``, and an alarm asks a person to vouch for one copy (``caxev vouch``), which makes the
others bad. `quarantine` moves the differing files to ``.caxev-quarantine/`` below the site's
directory, once nobody here reads the run; when the copy has been repaired, `release` removes them
after ``quarantine_days``.

Safe to repeat: each reading is requested once, each verdict expects the status that it found, and
files that have been moved are skipped.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from attrs import frozen

from caxev import (
    ERROR,
    HERE,
    PASSIVE,
    TRANSFERRED,
    VERIFYING,
    Copy,
    CopyIs,
    CopyKey,
    Decision,
    GiveUp,
    Job,
    Result,
    Retry,
    Run,
    RunUpdate,
    Skip,
    What,
    copy,
    copy_field,
    on,
    skip_of,
)
from caxev.config import Site, Sites
from caxev.copies.lifecycle import found_bad, found_good, in_commands, key_of, manifest_of, write
from caxev.copies.quorum import (
    agree,
    at_odds,
    at_one_host,
    is_disputed,
    majority,
    same_data,
    voters,
)
from caxev.copies.readings import Ask, decided
from caxev.copies.sharing import sharing
from caxev.copies.storage import can_be_read, same_bytes
from caxev.core.entry import SetAside
from caxev.core.job import Wait
from caxev.core.moments import after
from caxev.files import empty_quarantine, printable, standing
from caxev.files.erasing import set_aside

FRESH = timedelta(days=7)
"""How long a reading counts, and how long a requested one is waited for."""
VERIFIED = timedelta(minutes=10)
"""Time between two checks whether a copy that is being verified has a vote by now."""
ALARM = "no_majority"


@frozen
class Acquit:
    """The copy is good: it agrees with the majority."""


@frozen
class Convict:
    """The copy is bad: it differs from the majority."""

    why: str


@frozen
class Hung:
    """There is no majority. `master` is the master copy if this copy differs from it."""

    why: str
    master: Copy | None


Judgement = Acquit | Convict | Hung | Wait | Skip


@on(
    copy(ERROR, host=(HERE, PASSIVE)),
    copy_field("check_answered"),
    aliases=("CompareChecksums",),
    decide=lambda job: plan_peace(job.run, _ours(job), job.sites),
)
async def judge(job: Job) -> Result:
    """Judge our copy by the majority if the copies of a run contradict one another."""
    ours = _ours(job)
    passed = [why for mine in ours if (why := await _judge(job, mine)) is not None]
    if len(passed) < len(ours):
        return None
    return Skip("; ".join(dict.fromkeys(passed)) or "there is no copy of ours")


def plan_peace(run: Run, ours: Collection[Copy], sites: Sites) -> Skip | None:
    """Return why none of our copies is in a dispute; None if one may be. Pure."""
    same = same_bytes(sites)
    if any(at_odds(run, one.key, same) or is_disputed(one) for one in ours):
        return None
    return Skip("the copies do not contradict one another")


async def _judge(job: Job, mine: Copy) -> str | None:
    """Judge one of our copies; returns why there is no verdict, or None."""
    same = same_bytes(job.sites)
    odd = at_odds(job.run, mine.key, same)
    hosts = {one.host for one in voters(job.run, mine.key, same)} if odd else ()
    # Asked only in a dispute: it costs a query for each host.
    mute = [host for host in hosts if not await job.has_listened(host)]

    def decide() -> Ask | Judgement:
        now = job.run.copy(mine.key)
        assert now is not None
        return plan_judgement(job.run, now, job.sites, job.now(), job.safe_now(), mute=mute)

    verdict = await decided(job, decide)
    # Before the verdict, which may raise: the alarm must end even if this copy still waits.
    if not _troubled(job.run, mine.key, job.sites):
        await job.all_clear(ALARM, about=_data(mine))
    match verdict:
        case Acquit():
            job.did(What.VERIFIED, reason="by the majority")
            await write(job, found_good(job.run, mine))
        case Convict(why):
            job.log.error(f"{mine.key} of {job.run} is bad: {why}")
            job.did(What.DAMAGED, reason=f"by the majority: {why}")
            await write(job, found_bad(job.run, mine, why))
        case Hung():
            await _hang(job, mine, verdict)
        case Wait():
            raise verdict.retry(job.safe_now())
        case Skip(why):
            return why
    return None


def _ours(job: Job) -> list[Copy]:
    """Return the copies of this data in this site's care: its own, and those that it pushed."""
    data, found = key_of(job), []
    for one in job.run.copies:
        there = job.sites.find(one.host)
        passive = there is not None and not there.listener and one.source == job.site.name
        if same_data(one, data) and (one.host == job.site.name or passive):
            found.append(one)
    return found


def _troubled(run: Run, key: CopyKey, sites: Sites) -> bool:
    """Return whether the right content of this data is still undecided."""
    # A quarantined copy is undecided too, though an `error` without a vote disputes nothing.
    aside = (one for one in run.copies if same_data(one, key) and one.is_quarantined)
    return at_odds(run, key, same_bytes(sites)) or any(one.status == ERROR for one in aside)


def plan_judgement(
    run: Run,
    mine: Copy,
    sites: Sites,
    now: datetime,
    safe_now: datetime,
    *,
    mute: Collection[str] = (),
) -> Ask | Judgement:
    """Decide the verdict on a copy. Pure.

    Copies lose their votes by `safe_now`, so that a clock which is ahead takes none away. No caxev
    ever listened at the hosts in `mute`: a copy that only its own listener could read again counts
    by its entry.
    """
    same = same_bytes(sites)
    those = voters(run, mine.key, same)
    if not at_odds(run, mine.key, same):
        if is_disputed(mine) and len(those) > 1:
            return Acquit()
        return Skip("the copies do not contradict one another")
    stale = [one for one in those if can_be_read(one, sites, mute) and not _is_fresh(one, now)]
    asked = [(one, _waits_since(one, now)) for one in stale]
    # Everyone is asked before anyone is waited for: the readings run side by side.
    unasked = tuple(one for one, since in asked if since is None)
    if unasked:
        return Ask(unasked)
    ends = {one.host: since + FRESH for one, since in asked if since is not None}
    late = [host for host, end in ends.items() if end <= safe_now]
    if len(late) < len(stale):
        return Wait(f"waits for a fresh reading at {', '.join(ends)}", max(ends.values()))
    verdict = _count(run, mine, late, sites)
    if isinstance(verdict, Hung) and (coming := _coming(run, mine.key)):
        return Wait(f"waits for what is being verified at {', '.join(coming)}", safe_now + VERIFIED)
    return verdict


def _coming(run: Run, key: CopyKey) -> list[str]:
    """Return the hosts of copies that are being verified, and will have a vote."""
    return [one.host for one in run.copies if same_data(one, key) and one.status == VERIFYING]


def _count(run: Run, mine: Copy, late: list[str], sites: Sites) -> Judgement:
    """Count the votes of the copies that have answered."""
    those = voters(run, mine.key, same_bytes(sites))
    most = majority(run, mine.key, late, same=same_bytes(sites))
    names = ", ".join(sorted(one.host for one in most))
    # A bad copy that is not disputed has no vote: no majority makes it good.
    if mine not in those:
        return Skip("it is bad in any case")
    if not most or _is_alone(those, mine, late, most):
        return _hung(run, mine, sites)
    if any(agree(mine, one) for one in most):
        return Acquit() if mine.status == ERROR else Skip(f"it agrees with the majority: {names}")
    return Convict(f"most of its copies say something else: {names}")


def _is_alone(those: Collection[Copy], mine: Copy, late: list[str], most: Collection[Copy]) -> bool:
    """Return whether no other copy has answered: alone it is no majority, unless vouched for."""
    others = [one for one in those if one.host not in (mine.host, *late)]
    return not others and not any(one.vouched for one in most)


def _hung(run: Run, mine: Copy, sites: Sites) -> Hung:
    those = voters(run, mine.key, same_bytes(sites))
    master = next((one for one in those if mine.type in _master_of(one, sites)), None)
    digests = "; ".join(f"{one.host}: {one.manifest or one.checksum}" for one in those)
    return Hung(
        f"no majority of the copies says what is right ({digests})",
        None if master is None or master.host == mine.host or agree(master, mine) else master,
    )


def _master_of(one: Copy, sites: Sites) -> tuple[str, ...]:
    site = sites.find(one.host)
    return () if site is None else site.master


def _waits_since(one: Copy, now: datetime) -> datetime | None:
    """Return when a reading was first requested; a request dated in the future does not count."""
    return min((ask.at for ask in one.pending if ask.at and ask.at <= now), default=None)


def _is_fresh(one: Copy, now: datetime) -> bool:
    """Return whether the copy was read lately, by its date or as the answer to a recent request."""
    answered, noted = one.answered, one.noted_at
    times = [one.verified_at, *(ask.at for ask in one.asked if ask.id in answered)]
    if noted is None or one.pending:
        return False
    return any(at and now - FRESH < at <= min(noted, now) for at in times)


# -- without a majority ---------------------------------------------------------------------------


def _data(one: Copy) -> str:
    """Name the data of a copy, so that all its copies share one alarm."""
    return " ".join(filter(None, (one.type, one.version)))


def speaker(run: Run, key: CopyKey, sites: Sites) -> str | None:
    """Return the one site that raises the alarm: the master's, else the first with a listener."""
    # By entries, not by bytes: of two entries with the same bytes, each site would choose itself.
    heard = voters(run, key, at_one_host)
    those = [one for one in heard if one.host in sites and sites.get(one.host).listener]
    masters = [one for one in those if one.type in _master_of(one, sites)]
    return next((one.host for one in (*masters, *those)), None)


async def _hang(job: Job, mine: Copy, hung: Hung) -> None:
    """Raise an alarm, and request the quarantine of files that differ from the master's."""
    if speaker(job.run, mine.key, job.sites) in (None, job.site.name):
        _, which = in_commands(job.run, mine)
        await job.alarm(
            ALARM,
            f"{_data(mine)} of {job.run}: {hung.why}",
            about=_data(mine),
            todo="look at the files, then say which copy is right: "
            f"caxev vouch {which} --site SITE; the others are repaired from that",
        )
    # Only a copy that differs from a master is quarantined, and only by its own site.
    if mine.host != job.site.name or hung.master is None or mine.location is None:
        return
    aside = {"at": job.now(), "place": None, "from": hung.master.host}
    await write(job, found_bad(job.run, mine, hung.why, quarantine=aside))


@on(
    copy_field("quarantine", host=HERE),
    timeout=None,
    exclusive=True,
    aliases=("CompareChecksums",),
    decide=lambda job: skip_of(plan_quarantine(job.copy)),
)
async def quarantine(job: Job) -> Result:
    """Move the files of our copy that differ from the master's into quarantine."""
    mine, wanted = job.copy, plan_quarantine(job.copy)
    if isinstance(wanted, Skip):
        return wanted
    assert mine is not None
    if mine.status != ERROR or mine.location is None:
        return RunUpdate.note(job.run, mine, quarantine=None)  # it has been decided otherwise
    if others := await sharing(job, mine):
        raise GiveUp(f"{mine.location} is at, above or below the files of {others[0]}, too")
    master = job.run.copy(CopyKey(mine.type, wanted.master or "", mine.version))
    paths = [b""] if master is None else await _differing(job, mine, master)
    # The mark is recorded once, before any file moves. After a crash the location may hold a new
    # copy: it does not match the mark, and is left alone.
    mark = wanted.mark or str(await job.work(standing, mine.location, job.site.roots, None))
    marked = {"quarantine": {**wanted.fields, "mark": mark}}
    await write(job, RunUpdate.note(job.run, mine, mine.having("quarantine"), **marked))
    place = await job.work(set_aside, mine.location, job.site.roots, paths, wanted.at, mark)
    kept = {"at": wanted.at, "place": place, "files": len(paths)}
    job.did(What.SET_ASIDE, files=[printable(one) for one in paths])
    return RunUpdate.note(job.run, mine, CopyIs(mine.key, {"status": ERROR}), quarantine=kept)


def plan_quarantine(mine: Copy | None) -> SetAside | Skip:
    """Return the request to set files of a copy aside, if it has one. Pure."""
    wanted = None if mine is None else mine.quarantine
    if wanted is None:
        return Skip("no file of it must be set aside")
    return wanted if wanted.place is None else Skip("it is set aside")


async def _differing(job: Job, mine: Copy, master: Copy) -> list[bytes]:
    """Return the files of our copy that differ from the master's; all if a manifest is missing."""
    theirs, ours = [await manifest_of(job, one.manifest) for one in (master, mine)]
    if theirs is None or ours is None:
        return [b""]
    # Files that only the master has cannot be moved; a repair brings them.
    there = {item.path: item.kind for item in ours.items}
    return [one.path for one in theirs.differences(ours) if there.get(one.path) in ("file", "link")]


@on(
    copy_field("quarantine", host=HERE),
    aliases=("CompareChecksums",),
    decide=lambda job: plan_release(job.copy, job.site, job.safe_now()),
)
async def release(job: Job) -> Result:
    """Remove quarantined files after ``quarantine_days``, once the copy has been repaired."""
    mine, now = job.copy, job.safe_now()
    plan = plan_release(mine, job.site, now)
    if isinstance(plan, Wait):
        raise plan.retry(now)
    if mine is None or plan is not None:
        return plan
    kept = mine.quarantine
    assert kept is not None  # `plan_release` has checked it
    if mine.status != TRANSFERRED:
        job.log.error(f"{mine.key} of {job.run} is {mine.status}: {kept.place} is kept")
        raise Retry("the copy has not been repaired", after=86400.0)
    await job.work(empty_quarantine, kept.place, job.site.roots)
    return RunUpdate.note(job.run, mine, quarantine=None)


def plan_release(mine: Copy | None, site: Site, now: datetime) -> Decision:
    """Decide when the quarantined files of a copy go. Pure."""
    kept = None if mine is None else mine.quarantine
    if kept is None:
        return Skip("nothing of it is set aside")
    if kept.place is None:
        return Skip("its files are about to be set aside")
    days, since = site.quarantine_days, kept.at
    if days is None or since is None:
        return Skip("quarantine_days is null: it is kept")
    until = after(since, timedelta(days=days))
    return Wait(f"it is kept for {days:g} days", until) if now < until else None
