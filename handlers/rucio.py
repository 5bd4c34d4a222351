"""Rucio, the catalogue: upload, replication rules, verification, download and removal.

- `rucio_upload` reacts to a copy that became good here, and brings it to the catalogues in
  ``upload_options``. It also reacts to a copy that a person requested, and to cax's states
  ``RSEreupload`` and ``RSEquota``, in which an upload waits to be retried.
- `rucio_rules` makes the replication rules match the rule file, and records their state in the
  entry: ``rse``, ``rule_info``. It checks rules that are not OK at growing intervals, and the
  others when they expire.
- `rucio_check` compares all replicas when a person or a deletion requests it (``check_asked``).
- `rucio_rm` deletes a dataset that ``caxev rucio rm`` marked, once `caxev.handlers.deletion` has
  recorded the proof that it may go.
- `rucio_pull` fetches a copy from a catalogue in ``download_options``, for a run that has one of
  ``rucio_tags``, or because a person requested it.

An entry in a catalogue has the location ``scope:dataset``. It is ``transferring`` until every file
is available at the entrance RSE and its storage reports the right size and checksum, and only then
``transferred``; no other handler verifies it.

Safe to repeat: an entry is claimed by a conditional update and written by compare-and-set, and the
steps of `caxev.rucio` are idempotent. An interrupted upload is continued by the same reaction,
which recognizes its entry by the ``trigger``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final

from attrs import frozen

from caxev import (
    ERROR,
    GONE,
    HERE,
    PASSIVE,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    Copy,
    CopyIs,
    CopyKey,
    GiveUp,
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
    tag,
)
from caxev.config import ConfigError, Site, Sites
from caxev.copies.deletion import Intent, Proven, begin, tombstone, weigh, withdraw
from caxev.copies.lifecycle import (
    CopyPlan,
    arrived,
    claim,
    found_bad,
    is_ours,
    key_of,
    manifest_of,
    place_for,
    requested_from,
    serve_each,
    taken,
    targets,
    trigger_of,
    unfit,
    written,
)
from caxev.copies.retention import to_be_purged, unwanted, was_deleted
from caxev.copies.storage import custodian
from caxev.rucio import client
from caxev.rucio.changes import ENDED, RuleState, Wishes, wishes_for
from caxev.rucio.errors import OverQuota
from caxev.rucio.files import Checked, stored_as
from caxev.rucio.names import CopyNames, Did, names_of, taken_at
from caxev.rucio.orders import DatasetState, Download, Settlement, Upload
from caxev.rucio.rules import load_rules, source_of

STALLED = 15 * 60.0
"""Seconds without a byte after which a transfer is stopped and retried."""
LONGEST_WAIT = 6 * 3600.0
"""Maximum number of seconds between two checks of a rule that is not OK."""
GOING = 15 * 60.0
"""Seconds from a rule's end to the check whether its replicas are gone."""
STUCK = "stuck"
"""The alarm that a rule is stuck."""
REUPLOAD = "RSEreupload"
QUOTA = "RSEquota"
WAITING = (REUPLOAD, QUOTA)
"""cax's states of an entry whose upload waits to be retried."""


NO_RULES: Final[Skip] = Skip("this site looks after no entry of it in a catalogue")
NOTHING_TO_GIVE_UP: Final[Skip] = Skip("nothing is to be given up at a catalogue")

# -- upload ---------------------------------------------------------------------------------------


@frozen
class UploadPlan(CopyPlan):
    """A copy to bring into a catalogue, by these `names`."""

    names: CopyNames


@on(
    copy(TRANSFERRED, host=HERE),
    copy((REQUESTED, *WAITING), host=PASSIVE),
    lane="transfer",
    timeout=None,
    stall=STALLED,
    aliases=("CopyPush",),
    decide=lambda job: skip_of(*(_upload_plan(job, name) for name in targets(job))),
)
async def rucio_upload(job: Job) -> Result:
    """Bring data that is good here into the catalogues that want it.

    The entry becomes ``transferring``, then ``transferred``; ``RSEreupload`` or ``RSEquota`` while
    it waits for a retry, ``error`` if it fails.
    """
    return await serve_each(job, targets(job), _upload_to)


def _upload_plan(job: Job, name: str) -> UploadPlan | Skip:
    trigger = trigger_of("rucio_upload", job)
    return plan_upload(job.run, key_of(job), job.site, job.sites, name=name, trigger=trigger)


async def _upload_to(job: Job, name: str, others: tuple[RunUpdate, ...]) -> str | None:
    """Bring the copy into one catalogue, or return why there is nothing to do."""
    plan = _upload_plan(job, name)
    if isinstance(plan, Skip):
        return plan.why
    await job.update(await _upload(job, plan, others))
    return None


async def _upload(job: Job, plan: UploadPlan, others: tuple[RunUpdate, ...]) -> RunUpdate:
    """Bring the copy into the catalogue; returns the update for its entry."""
    assert plan.source.location is not None
    name = plan.source.location.rstrip("/").rpartition("/")[2]
    fields, began = {"location": plan.location, "source_name": name}, job.now()
    mine = await claim(job, plan, fields, others=others, new={"rse": [], "rule_info": []})
    order = Upload(
        here=job.site,
        there=job.sites.get(plan.key.host),
        names=plan.names,
        location=plan.source.location,
        manifest=plan.source.manifest,
        checksum=plan.source.checksum,
        metadata=metadata_of(job.run, plan, job.sites.get(plan.key.host)),
    )
    try:
        async with job.suspecting(plan.source):
            read, found = await job.work(client.upload, order)
    except Retry as error:
        status = QUOTA if isinstance(error, OverQuota) else REUPLOAD
        await _wait(job, mine, status, error, others)
        raise
    digest = read.manifest.digest
    # Before the entry names it. The second has the checksums of the files in the catalogue, so
    # that replicas can be compared after our copy is gone.
    await job.store_manifest(digest, read.manifest.to_rows())
    await job.store_manifest(stored_as(digest), [one.to_row() for one in read.files])
    return RunUpdate.change_copy(
        job.run,
        mine,
        TRANSFERRED,
        owner=None,
        error=None,
        checksumproblem=None,
        manifest=digest,
        checksum=plan.source.checksum or read.manifest.cax_checksum(),
        verified_at=began,
        rse=list(found.rses),
        rule_info=[one.to_row() for one in found.rules],
        rules=None,  # has `rucio_rules` read the rule file for this entry
    )


async def _wait(
    job: Job, mine: Copy, status: str, why: Retry, others: tuple[RunUpdate, ...]
) -> None:
    """Record in the entry, as cax did, that the upload waits to be retried."""
    update = RunUpdate.change_copy(job.run, mine, status, owner=None, error=str(why))
    waiting = await written(job, update, mine.key)
    job.on_failure(*others, RunUpdate.give_up(job.run, waiting))


def plan_upload(
    run: Run, seen: CopyKey, site: Site, sites: Sites, *, name: str, trigger: str
) -> UploadPlan | Skip:
    """Decide whether `site` brings its copy of this data to the catalogue `name`. Pure."""
    there = sites.find(name)
    if there is None or there.method != "rucio":
        return Skip(f"{name} is no catalogue in sites.json")
    key = seen.at(name)
    entry = run.copy(key)
    asked = entry is not None and entry.status == REQUESTED and entry.source == site.name
    ours = is_ours(entry, trigger, (TRANSFERRING, ERROR, *WAITING))
    if name not in site.upload_options and not (asked or ours):
        return Skip(f"upload_options does not name {name}")
    if seen.type not in site.data_type or seen.type not in there.data_type:
        return Skip(f"{seen.type} data does not go to {name} (data_type)")
    source = run.copy(seen.at(site.name))
    if why := unfit(source, seen.at(site.name)):
        return Skip(why)
    assert source is not None
    # Without a trigger cax had begun it, which waits for a retry.
    waits = entry is not None and entry.status in WAITING and entry.trigger is None
    if entry is not None and not (asked or ours or waits):
        return Skip(f"{key} is {entry.status} already")
    # An entry means that the upload was requested or begun after the deletion.
    if entry is None and (why := was_deleted(run, key)):
        return Skip(why)
    names = _names(run, key, there, entry)
    return UploadPlan(source, key, str(names.dataset), trigger, entry, names)


def _names(run: Run, key: CopyKey, there: Site, entry: Copy | None) -> CopyNames:
    """Return the names of the copy; an existing entry keeps its dataset."""
    names = names_of(run, key, there.rucio)
    if entry is None or entry.location is None:
        return names
    dataset = Did.of(entry.location)
    return CopyNames(dataset, Did(names.run.scope, dataset.scope), names.period, names.campaign)


def metadata_of(run: Run, plan: UploadPlan, there: Site) -> dict[str, object]:
    """Return the dataset's metadata for the catalogue, by the keys that cax used."""
    user = run.document.get("user")
    metadata = {
        "phys_group": user if isinstance(user, str) else None,
        "provenance": there.rucio.detectors.get(run.detector, run.detector) or None,
        "datatype": source_of(run) or None,
        "campaign": plan.names.campaign,
        "run_number": run.number,
        "prod_step": plan.key.type,
        "version": plan.key.version,
    }
    return {name: value for name, value in metadata.items() if value is not None}


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
    for entry in _catalogued(job.run, job.site, job.sites):
        plan = plan_rules(job, entry)
        if isinstance(plan, Skip):
            # Another reaction to the run may have settled it after this one raised the alarm.
            await job.all_clear(STUCK, about=entry.key)
            skipped.append(plan.why)
        elif (wait := await _settle(job, entry, plan)) is not None:
            waits.append(wait)
    if waits:
        raise min(waits, key=lambda wait: wait.after or 0.0)
    return Skip("; ".join(skipped)) if skipped else None


def _catalogued(run: Run, site: Site, sites: Sites) -> Iterator[Copy]:
    """Yield the run's good entries in catalogues that this site looks after."""
    for entry in run.copies:
        there = sites.find(entry.host)
        if there is None or there.method != "rucio" or entry.status != TRANSFERRED:
            continue
        if entry.location is not None and custodian(entry, sites) == site.name:
            yield entry


@frozen
class Settling:
    """The wishes for one entry, their digest, and the rules that the entry records."""

    wishes: Wishes
    digest: str
    remembered: tuple[RuleState, ...]


def plan_rules(job: Job, entry: Copy) -> Settling | Skip:
    """Decide whether to ask the catalogue about this entry.

    That is needed if the entry became good, its ``rules`` were removed, the wishes have changed, or
    a rule is not OK yet. Raises `Retry` if the rule file is invalid.
    """
    # The digest saves the question: most events of a run change nothing that the rules depend on.
    there = job.sites.get(entry.host)
    wishes = wishes_of(job.run, entry, there)
    digest = blake2b(repr(wishes).encode(), digest_size=8).hexdigest()
    remembered = remembered_in(entry)
    settled = all(is_settled(one, job.now()) for one in remembered)
    if settled and entry.rules == digest:
        return Skip(f"the rules of {entry.location} are what they should be")
    return Settling(wishes, digest, remembered)


def wishes_of(run: Run, entry: Copy, there: Site) -> Wishes:
    """Return the wishes of rule file and sites.json for this entry. Raises `Retry` if invalid."""
    always = [rse for rse in (there.rucio_upload_rse, *there.rucio_transfer) if rse]
    try:
        rules = load_rules(there.rucio.rules) if there.rucio.rules else ()
    except ConfigError as error:
        raise Retry("; ".join(error.problems), after=600.0) from error
    return wishes_for(rules, run, entry.key, always=always)


def remembered_in(entry: Copy) -> tuple[RuleState, ...]:
    """Return the rules recorded in an entry's ``rule_info``; cax's texts contain none."""
    rows = map(RuleState.from_row, entry.rule_info)
    return tuple(row for row in rows if row is not None)


async def _settle(job: Job, entry: Copy, plan: Settling) -> Retry | None:
    """Bring rules and entry up to date; returns when to check again, None: never."""
    there = job.sites.get(entry.host)
    order = Settlement(
        there=there,
        dataset=Did.of(entry.location),
        run_name=job.run.name or str(job.run),
        wishes=plan.wishes,
        remembered=plan.remembered,
        files=await _checked(job, entry) if plan.wishes.remove else None,
    )
    found = await job.work(client.settle, order)
    if found.done != "nothing":
        job.log.info(f"{entry.location}: {found.done}")
    fields = {**standing(entry, found), "rules": plan.digest}
    # Not written without a change: each write is an event to which every handler may react.
    if entry.having(*fields).fields != fields:
        await written(job, _fields(job.run, entry, **fields), entry.key)
    stuck = [str(one) for one in found.unfinished if one.state == "STUCK"]
    if stuck:
        summary = f"{entry.location} is stuck on its way to other RSEs"
        await job.alarm(STUCK, summary, severity="warning", about=entry.key, why="; ".join(stuck))
    else:
        await job.all_clear(STUCK, about=entry.key)
    after = look_again(found, there, job.now())
    return None if after is None else Retry(", ".join(map(str, found.rules)), after=after)


def is_settled(rule: RuleState, now: datetime) -> bool:
    """Return whether no change of a rule is due: it has ended, or is OK and has not expired."""
    return rule.state == ENDED or (rule.ok and (rule.expires is None or now < rule.expires))


def standing(entry: Copy, found: DatasetState) -> dict[str, object]:
    """Return the entry's fields for this state of its dataset.

    ``verified_at`` is removed, until the next comparison, if an RSE has lost its replicas, since
    those may be the compared ones, or if no rule keeps the data for ever.
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


def _fields(run: Run, entry: Copy, **fields: object) -> RunUpdate:
    """Set fields of an entry without changing its status, if nobody wrote them meanwhile."""
    which = CopyIs(entry.key, {**entry.as_seen.fields, **entry.having(*fields).fields})
    return RunUpdate(run.id, (which,), change=(which, fields))


# -- comparing ------------------------------------------------------------------------------------


@on(
    copy_field("check_asked", host=PASSIVE),
    lane="rucio",
    timeout=None,
    stall=4 * STALLED,
    aliases=("CopyPush", "RucioRule"),  # a site that uploads, or keeps rules, must also answer
    decide=lambda job: plan_check(job.copy, job.site, job.sites),
)
async def rucio_check(job: Job) -> Result:
    """Verify every replica when a person or a deletion requests it.

    The entry stays ``transferred``, with a new ``verified_at`` and ``check_answered``, if one RSE
    has all of it (without ``verified_at`` if none will keep it); else it becomes ``error``.
    """
    entry = job.copy
    skip = plan_check(entry, job.site, job.sites)
    if entry is None or skip is not None:
        return skip
    return await _check(job, entry, job.sites.get(entry.host))


def plan_check(entry: Copy | None, site: Site, sites: Sites) -> Skip | None:
    """Decide whether `site` compares this entry's replicas. Pure."""
    if entry is None:
        return Skip("the entry is gone")
    if not _is_catalogued(entry, sites):
        return Skip(f"{entry.host} is no catalogue in sites.json")
    if entry.status != TRANSFERRED:
        return Skip(f"it is {entry.status}")
    if (who := custodian(entry, sites)) != site.name:
        return Skip(f"{who or 'no site'} looks after it")
    return None


def _is_catalogued(entry: Copy | None, sites: Sites) -> bool:
    there = None if entry is None else sites.find(entry.host)
    return there is not None and there.method == "rucio"


async def _check(job: Job, entry: Copy, there: Site) -> RunUpdate:
    began = job.now()
    files = await _checked(job, entry)
    if files is None:
        raise GiveUp(f"no good copy here has the checksums of {entry.location}")
    # Deep: the storage itself is asked, as the catalogue only repeats what it was given.
    verdict = await job.work(client.verify, there, Did.of(entry.location), files, True)
    for line in verdict.bad:
        job.log.error(f"{entry.location}: {line}")
    error = "; ".join(verdict.bad[:5]) or None
    if verdict.good:
        found = await job.work(client.look, there, Did.of(entry.location))
        stays = not found.lasting.isdisjoint(verdict.good)
        if not stays:
            error = "no rule without an end keeps what was compared: it proves nothing"
        answer = {"verified_at": began if stays else None, "error": error}
        return _fields(job.run, entry, **answer, **_digests(job.run, entry)).answering(entry)
    if not verdict.bad:
        raise Retry(f"{entry.location}: {'; '.join(verdict.unseen)}")
    return found_bad(job.run, entry, error)


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
    names = _names(job.run, entry.key, job.sites.get(entry.host), entry)
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
    decide=lambda job: None if _is_catalogued(job.copy, job.sites) else NOTHING_TO_GIVE_UP,
)
async def rucio_rm(job: Job) -> Result:
    """Remove a dataset whose deletion is proven: all its rules, then its entry.

    Leaves a tombstone.
    """
    entry = job.copy
    if entry is None or not _is_catalogued(entry, job.sites):
        return NOTHING_TO_GIVE_UP
    there = job.sites.get(entry.host)
    wanted = Intent.of(entry)
    if wanted is None or entry.proof is None:
        return Skip(f"it is {entry.status}, without a proof that it may go")
    if (who := custodian(entry, job.sites)) != job.site.name:
        return Skip(f"{who or 'no site'} looks after it")
    # With `erasing` an earlier attempt has passed the point of no return: continue it.
    if not entry.is_erasing:
        found = weigh(job.run, entry, there, job.sites, job.clocks())
        if not isinstance(found, Proven):
            job.log.warning(f"{entry.key} of {job.run}: its proof no longer holds")
            return withdraw(job.run, entry, wanted, "its proof no longer holds", job.now())
        clocks, proof = job.clocks(), found.proof
        sure = begin(job.run, entry, wanted, there, job.sites, proof=proof, clocks=clocks)
        entry = await written(job, sure, entry.key)
    # Rules before entry: a crash in between leaves an entry that is removed again. The other order
    # would leave data in the catalogue that no entry names.
    await job.work(client.give_up, there, Did.of(entry.location))
    job.log.info(f"{entry.key} of {job.run} is given up: {wanted.why}")
    return RunUpdate.remove_copy(job.run, entry, tombstone=tombstone(entry, wanted, job.owner))


# -- download -------------------------------------------------------------------------------------


@frozen
class DownloadPlan(CopyPlan):
    """A copy to fetch from a catalogue, from `rse` if one is given."""

    rse: str | None


@on(
    copy(TRANSFERRED, host=PASSIVE),
    copy(GONE, host=HERE),
    copy(REQUESTED, host=HERE),
    tag("*"),
    lane="transfer",
    timeout=None,
    stall=STALLED,
    aliases=("CopyPull",),
    decide=lambda job: skip_of(*(_fetch_plan(job, key) for key in _catalogue_keys(job))),
)
async def rucio_pull(job: Job) -> Result:
    """Fetch a copy of data from a catalogue.

    The new copy becomes ``transferring``, then ``verifying``; ``error`` if it fails.
    """
    skipped: list[str] = []
    for key in _catalogue_keys(job):
        plan = _fetch_plan(job, key)
        if isinstance(plan, Skip):
            skipped.append(plan.why)
            continue
        mine = await _fetch(job, plan)
        await job.update(arrived(job.run, mine))
        job.on_failure()  # this copy is done: a later one that fails must not make it an error
    return Skip("; ".join(dict.fromkeys(skipped)) or "no catalogue has it") if skipped else None


def _fetch_plan(job: Job, key: CopyKey) -> DownloadPlan | Skip:
    trigger = trigger_of("rucio_pull", job)
    return plan_fetch(job.run, key, job.site, job.sites, trigger=trigger, now=job.now())


def _catalogue_keys(job: Job) -> list[CopyKey]:
    """Return the entries in catalogues that the event may be about."""
    aspect = job.event.aspect
    found = []
    for entry in job.run.copies:
        there = job.sites.find(entry.host)
        if there is None or there.method != "rucio":
            continue
        if isinstance(aspect, CopyKey):
            same = (entry.type, entry.version) == (aspect.type, aspect.version)
            if not same or aspect.host not in (job.site.name, entry.host):
                continue
        found.append(entry.key)
    return found


async def _fetch(job: Job, plan: DownloadPlan) -> Copy:
    """Fetch the copy; returns its entry."""
    source = plan.source
    mine = await claim(job, plan, {"location": plan.location})
    digest = source.manifest
    files = await job.load_manifest(stored_as(digest)) if digest else None
    order = Download(
        here=job.site,
        there=job.sites.get(source.host),
        dataset=Did.of(source.location),
        location=plan.location,
        taken=taken_at(job.run) or job.now(),
        files=None if files is None else tuple(map(Checked.from_row, files)),
        expected=await manifest_of(job, digest),
        rse=plan.rse,
        single=source.type != "raw",
    )
    moved = await job.work(client.download, order)
    job.log.info(f"fetched {moved.bytes_sent} of {moved.bytes_total} bytes from {source.host}")
    return mine


def plan_fetch(
    run: Run, seen: CopyKey, site: Site, sites: Sites, *, trigger: str, now: datetime
) -> DownloadPlan | Skip:
    """Decide whether `site` fetches from the catalogue entry `seen`. Pure."""
    source = run.copy(seen)
    if source is None or source.status != TRANSFERRED or source.location is None:
        return Skip(f"{seen} is {source.status if source else 'gone'}")
    key = seen.at(site.name)
    entry = run.copy(key)
    asked = requested_from(entry, trigger)
    if asked not in (None, seen.host):
        return Skip(f"it is to come from {asked}")
    if asked is None and (why := _unwanted(run, seen, site, sites, now)):
        return Skip(why)
    if why := taken(entry, trigger):
        return Skip(why)
    name = source.source_name or run.name + run.suffix
    # The name comes from the database, and must not lead out of the directory.
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise GiveUp(f"{name!r} is no usable name for the copy")
    location = place_for(key, name, site)
    if isinstance(location, Skip):
        return location
    rse = entry.from_rse if entry is not None else None
    if rse is None and site.rucio_download_rse in source.rse:
        rse = site.rucio_download_rse
    return DownloadPlan(source, key, location, trigger, entry, rse)


def _unwanted(run: Run, seen: CopyKey, site: Site, sites: Sites, now: datetime) -> str | None:
    """Return why this site does not fetch the data without a request, or None if it does."""
    tagged = not {*site.rucio_tags}.isdisjoint(run.tags)
    if seen.host not in site.download_options and not tagged:
        return f"download_options does not name {seen.host}"
    if seen.type not in site.data_type:
        return f"{site.name} does not move {seen.type} data (data_type)"
    here = seen.at(site.name)
    why = (to_be_purged if tagged else unwanted)(run, here, site, now)
    if why is not None:
        return why
    for name in site.download_options:
        if name == seen.host:
            break
        other, there = run.copy(seen.at(name)), sites.find(name)
        fit = other is not None and other.status == TRANSFERRED and other.location
        if fit and there is not None and there.method != "tsm":
            return f"{name} has it too, and comes first in download_options"
    return None
