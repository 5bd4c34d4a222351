"""Datasets in Rucio, the catalogue: replication rules, verification and removal.

- `rucio_rules` makes the replication rules match the rule file, and records their state in the
  entry: ``rse``, ``rule_info``. It checks rules that are not OK at growing intervals, and the
  others when they expire.
- `rucio_check` compares all replicas when a person or a deletion requests it (``check_asked``).
- `rucio_rm` deletes a dataset that ``caxev rucio rm`` marked, once `caxev.handlers.deletion` has
  recorded the proof that it may go.

`caxev.handlers.rucio` brings data there and back. One site looks after each dataset: see
`caxev.copies.storage.custodian`.

Safe to repeat: an entry is written by compare-and-set, and the steps of `caxev.rucio` are
idempotent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final

import trio
from attrs import evolve

from caxev import (
    GONE,
    PASSIVE,
    TRANSFERRED,
    Copy,
    CopyKey,
    Denied,
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
    tag,
)
from caxev.config import ConfigError, Site, Sites
from caxev.copies.deletion import (
    Intent,
    Proven,
    Withdraw,
    begin,
    begun,
    go_on,
    tombstone,
    weigh,
    why_of,
    withdraw,
)
from caxev.copies.lifecycle import SOON, found_bad, in_commands, written
from caxev.copies.storage import custodian
from caxev.rucio import client
from caxev.rucio.changes import ENDED, RuleState, Wishes, recorded_in, wishes_for
from caxev.rucio.files import Checked, stored_as
from caxev.rucio.names import Did, names_of
from caxev.rucio.orders import DatasetState, Settlement
from caxev.rucio.rules import load_rules

STALLED = 3600.0
"""Seconds without a byte after which a comparison is stopped and retried."""
LONGEST_WAIT = 6 * 3600.0
"""Maximum number of seconds between two checks of a rule that is not OK."""

GOING = 15 * 60.0
"""Seconds from a rule's end to the check whether its replicas are gone."""

LOST_AFTER = 600.0
"""Seconds between two answers that files of a dataset are at no RSE, before it counts as lost."""

STUCK = "stuck"
"""The alarm that a rule is stuck."""
BAD = "bad replicas"
"""The alarm that some replicas of a dataset are bad, though another RSE has all of it."""

NO_RULES: Final[Skip] = Skip("this site looks after no entry of it in a catalogue")


# -- rules ----------------------------------------------------------------------------------------


@on(
    copy((TRANSFERRED, GONE)),
    tag("*"),
    tag("*", gone=True),
    lane="rucio",
    timeout=3600.0,
    attempts=100,
    aliases=("RucioRule", "CopyPush"),  # cax made a dataset's first rules when it had pushed it
    decide=lambda job: None if any(_catalogued(job.run, job.site, job.sites)) else NO_RULES,
)
async def rucio_rules(job: Job) -> Result:
    """Make the replication rules of a run's datasets match the rule file, and watch them until OK.

    The entries stay ``transferred``; their ``rse`` and ``rule_info`` record the state.
    """
    skipped: list[str] = []
    waits: list[Retry] = []
    if job.copy is None:
        await job.all_clear(STUCK)
        await job.all_clear(BAD)
    for entry in _catalogued(job.run, job.site, job.sites):
        # It reads the rule file, whose disk may hang.
        plan = await trio.to_thread.run_sync(plan_rules, job, entry, abandon_on_cancel=True)
        if isinstance(plan, Skip):
            # Another reaction to the run may have settled it after this one raised the alarm.
            await job.all_clear(STUCK, about=entry.key)
            skipped.append(plan.why)
        elif (wait := await _settle(job, entry, *plan)) is not None:
            waits.append(wait)
    if waits:
        raise min(waits, key=lambda wait: wait.after or 0.0)
    return Skip("; ".join(skipped)) if skipped else None


def _catalogued(run: Run, site: Site, sites: Sites) -> Iterator[Copy]:
    """Yield the run's good entries in catalogues that this site looks after."""
    for entry in run.copies:
        good = entry.status == TRANSFERRED and entry.location is not None
        if good and not isinstance(in_care(entry, site, sites), Skip):
            yield entry


def in_care(entry: Copy | None, site: Site, sites: Sites) -> Copy | Skip:
    """Return the entry if it is one in a catalogue that `site` looks after. Pure."""
    if entry is None:
        return Skip("the entry is gone")
    there = sites.find(entry.host)
    if there is None or there.method != "rucio":
        return Skip(f"{entry.host} is no catalogue in sites.json")
    if (who := custodian(entry, sites)) != site.name:
        return Skip(f"{who or 'no site'} looks after it")
    return entry


def plan_rules(job: Job, entry: Copy) -> tuple[Settlement, str] | Skip:
    """Decide what to ask of the catalogue for this entry; returns a digest of the wishes, too.

    This is needed if the entry became good, its ``rules`` were removed, the wishes have changed, or
    a rule is not OK yet. Raises `Denied` if the rule file is invalid.
    """
    # The digest saves the question: most events of a run change nothing that the rules depend on.
    there = job.sites.get(entry.host)
    wishes = wishes_of(job.run, entry, there)
    digest = blake2b(repr(wishes).encode(), digest_size=8).hexdigest()
    remembered = recorded_in(entry)
    settled = all(is_settled(one, job.now()) for one in remembered)
    if settled and entry.rules == digest:
        return Skip(f"the rules of {entry.location} are what they should be")
    run_name = job.run.name or str(job.run)
    return Settlement(there, Did.of(entry.location), run_name, wishes, remembered), digest


def wishes_of(run: Run, entry: Copy, there: Site) -> Wishes:
    """Return the wishes of rule file and sites.json for this entry. Raises `Denied` if invalid."""
    always = [rse for rse in (there.rucio_upload_rse, *there.rucio_transfer) if rse]
    try:
        rules = load_rules(there.rucio.rules) if there.rucio.rules else ()
    except ConfigError as error:
        raise Denied("; ".join(error.problems)) from error
    return wishes_for(rules, run, entry.key, always=always)


async def _settle(job: Job, entry: Copy, order: Settlement, digest: str) -> Retry | None:
    """Bring rules and entry up to date; returns when to check again, None: never."""
    if order.wishes.remove:
        order = evolve(order, files=await _checked(job, entry))
    found = await job.work(client.settle, order)
    if found.done != "nothing":
        job.log.info(f"{entry.location}: {found.done}")
        job.did("rules changed", reason=found.done)
    fields = {**standing(entry, found), "rules": digest}
    # Not written without a change: each write is an event to which every handler may react.
    if entry.having(*fields).fields != fields:
        await written(job, RunUpdate.replace(job.run, entry, **fields), entry.key)
    stuck = [str(one) for one in found.unfinished if one.state == "STUCK"]
    if stuck:
        summary = f"{entry.location} is stuck on its way to other RSEs"
        await job.alarm(STUCK, summary, severity="warning", about=entry.key, why="; ".join(stuck))
    else:
        await job.all_clear(STUCK, about=entry.key)
    after = look_again(found, order.there, job.now())
    return None if after is None else Retry(", ".join(map(str, found.rules)), after=after)


def is_settled(rule: RuleState, now: datetime) -> bool:
    """Return whether no change of a rule is due: it has ended, or is OK and has not expired."""
    return rule.state == ENDED or (rule.ok and (rule.expires is None or now < rule.expires))


def standing(entry: Copy, found: DatasetState) -> dict[str, object]:
    """Return the entry's fields for this state of its dataset.

    ``verified_at`` is removed, until the next comparison, if an RSE has lost its replicas, since
    those may be the compared ones, or if no rule keeps the data forever.
    """
    fields: dict[str, object] = {
        "rse": list(found.rses),
        "rule_info": [one.to_row() for one in found.rules],
    }
    if not found.lasting or not {*found.rses}.issuperset(entry.rse):
        fields["verified_at"] = None
    return fields


def look_again(found: DatasetState, there: Site, now: datetime) -> float | None:
    """Return the seconds until the rules are checked again, or None if no change is due.

    Rules that are not OK: after a quarter of the youngest one's age, or only after `LONGEST_WAIT`
    if the catalogue sends messages. Rules that are OK: when they have expired.
    """
    # With messages we still check: a message may get lost, and none reports a stuck rule.
    waits: list[float] = []
    if found.unfinished:
        age = min((now - one.created).total_seconds() for one in found.unfinished)
        soon = min(max(float(there.rucio.ask_after), age / 4), LONGEST_WAIT)
        waits.append(LONGEST_WAIT if there.rucio.messages else soon)
    ends = (one.expires for one in found.rules if one.ok and one.expires is not None)
    waits += [(end - now).total_seconds() + GOING if now < end else LONGEST_WAIT for end in ends]
    return min(waits, default=None)


# -- comparing ------------------------------------------------------------------------------------


@on(
    copy_field("check_asked", host=PASSIVE),
    copy(TRANSFERRED, host=PASSIVE),  # requested while it was about to go
    lane="rucio",
    stall=STALLED,
    aliases=("CopyPush", "RucioRule"),  # a site that uploads, or keeps rules, must also answer
    decide=lambda job: skip_of(plan_check(job.copy, job.site, job.sites)),
)
async def rucio_check(job: Job) -> Result:
    """Verify every replica when a person or a deletion requests it.

    The entry stays ``transferred``, with a new ``verified_at`` and ``check_answered``, if one RSE
    has all of it (without ``verified_at`` if none will keep it); else it becomes ``error``.
    """
    entry = plan_check(job.copy, job.site, job.sites)
    if isinstance(entry, Skip):
        return entry
    return await _check(job, entry, job.sites.get(entry.host))


def plan_check(entry: Copy | None, site: Site, sites: Sites) -> Copy | Skip:
    """Decide whether `site` compares this entry's replicas. Pure."""
    ours = in_care(entry, site, sites)
    if isinstance(ours, Skip):
        return ours
    if ours.status != TRANSFERRED:
        return Skip(f"it is {ours.status}")
    return ours if ours.pending else Skip("nobody asks for it to be read again")


async def _check(job: Job, entry: Copy, there: Site) -> RunUpdate:
    began = job.now()
    # An earlier comparison must not let other copies go once this one has failed for good.
    lost = "it cannot be compared (caxev reactions --failed shows why); once it can: caxev retry"
    job.on_failure(RunUpdate.replace(job.run, entry, verified_at=None, error=lost))
    files = await _checked(job, entry)
    if files is None:
        raise GiveUp(f"no good copy here has the checksums of {entry.location}")
    # Deep: the storage itself is asked, as the catalogue only repeats what it was given.
    verdict = await job.work(client.verify, there, Did.of(entry.location), files, True)
    if verdict.lost:
        # A bad replica is removed before it is made again: only one that is missing twice is lost.
        with job.yield_slot():
            await trio.sleep(LOST_AFTER)
        verdict = await job.work(client.verify, there, Did.of(entry.location), files, True)
    for line in verdict.bad:
        job.log.error(f"{entry.location}: {line}")
    error = "; ".join(verdict.bad[:5]) or None
    if verdict.good:
        await _report(job, entry, verdict.bad)
        found = await job.work(client.look, there, Did.of(entry.location))
        stays = not found.lasting.isdisjoint(verdict.good)
        if not stays:
            error = "no rule without an end keeps what was compared: it proves nothing"
        answer: dict[str, Any] = {"verified_at": began if stays else None, "error": error}
        answer |= _digests(job.run, entry)
        job.did(What.VERIFIED)
        return RunUpdate.replace(job.run, entry, **answer).answering(entry)
    if not verdict.bad:
        raise Retry(f"{entry.location}: {'; '.join(verdict.unseen)}")
    job.did(What.DAMAGED, reason=error or "")
    return found_bad(job.run, entry, error)


async def _report(job: Job, entry: Copy, bad: Sequence[str]) -> None:
    """Raise an alarm while replicas are bad: the entry stays good, and shows no sign of them."""
    if not bad:
        await job.all_clear(BAD, about=entry.key)
        return
    named, _ = in_commands(job.run, entry)
    summary, todo = f"{entry.location} has bad replicas", f"caxev rucio check {named} --repair"
    await job.alarm(BAD, summary, about=entry.key, why="; ".join(bad[:5]), todo=todo)


async def _checked(job: Job, entry: Copy) -> tuple[Checked, ...] | None:
    """Return what the entry's files must be: from its upload, or from a good copy here."""
    manifest = _digests(job.run, entry).get("manifest")
    if manifest is None:
        return None
    rows = await job.load_manifest(stored_as(str(manifest)))
    if rows is not None:
        return tuple(map(Checked.from_row, rows))
    # Uploads of cax have no stored checksums: read our own copy for them, and keep them.
    here = job.run.copy(CopyKey(entry.type, job.site.name, entry.version))
    if here is None or here.status != TRANSFERRED or here.location is None:
        return None
    catalogue = job.sites.get(entry.host).rucio
    names = names_of(job.run, entry.key, catalogue, entry.location)
    read = await job.work(client.read_copy, job.site, here.location, names)
    if read.manifest.digest != manifest:
        raise GiveUp(f"{here.location} is not what the database says: {read.manifest.digest}")
    await job.store_manifest(stored_as(str(manifest)), [one.to_row() for one in read.files])
    return tuple(read.files)


def _digests(run: Run, entry: Copy) -> Mapping[str, Any]:
    """Return manifest and checksum of the data: the entry's, else another good copy's."""
    same = [one for one in run.copies if (one.type, one.version) == (entry.type, entry.version)]
    for one in (entry, *(other for other in same if other.status == TRANSFERRED)):
        if one.manifest is not None:
            return {"manifest": one.manifest, "checksum": one.checksum}
    return {}


# -- removing -------------------------------------------------------------------------------------


@on(
    copy_field("proof", host=PASSIVE),
    lane="rucio",
    timeout=3600.0,
    exclusive=True,
    decide=lambda job: skip_of(in_care(job.copy, job.site, job.sites)),
)
async def rucio_rm(job: Job) -> Result:
    """Remove a dataset whose deletion is proven: all its rules, then its entry.

    Leaves a tombstone.
    """
    entry = in_care(job.copy, job.site, job.sites)
    if isinstance(entry, Skip):
        return entry
    there, wanted = job.sites.get(entry.host), Intent.of(entry, job.sites.types)
    if wanted is None or entry.proof is None:
        return Skip(f"it is {entry.status}, without a proof that it may go")
    dataset = Did.of(entry.location)
    # With `erasing` an earlier attempt has passed the point of no return: continue it.
    found = None if entry.is_erasing else weigh(job.run, entry, job.sites, job.clocks())
    if isinstance(found, Proven):
        # Without an entry nobody would know of what they keep.
        kept = await job.work(client.containers_with_rules, there, dataset)
        if kept:
            words = f"a rule of {kept[0]} keeps it: end that rule, or detach {dataset} from it"
            found = Withdraw(words)
    if not isinstance(found, Proven | None):
        why = found.why if isinstance(found, Withdraw) else "its proof is out of date"
        job.log.warning(f"{entry.key} of {job.run} is not deleted: {why}")
        job.did(What.WITHDRAWN, reason=why, by=wanted.by or "")
        return withdraw(job.run, entry, wanted, why, job.now())
    # Before the write that checks that this deletion is ours: a process that is stopped behind it
    # for long deletes no rule of a dataset that was uploaded again.
    rules = await job.work(client.standing_rules, there, dataset)
    if found is None:
        sure = go_on(job.run, entry)
    else:
        sure = begin(job.run, entry, job.sites, proof=found.proof, clocks=job.clocks())
    entry = await written(job, sure, entry.key)
    # Rules before entry: a crash in between leaves an entry that is removed again. The other order
    # would leave data in the catalogue that no entry names.
    if await job.work(client.give_up, there, dataset, rules):
        raise Retry(f"{dataset} has got another rule meanwhile", after=SOON)
    job.log.info(f"{entry.key} of {job.run} is given up: {wanted.why}")
    size = job.run.size_of(entry)
    job.did(What.DELETED, bytes=size, **why_of(entry, wanted))
    stone = tombstone(entry, wanted, job.owner, size)
    return RunUpdate.remove_copy(job.run, entry, begun(entry), tombstone=stone)
