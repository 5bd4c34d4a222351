"""Completeness of raw data, recorded as the run's size.

`add_size` reacts to a raw copy that became good at this site, and to the run's ``end`` and
``events_built``. It counts the event files in the copy's manifest, or on the disk if there is no
manifest. If their number matches the number of events, it sets `raw_size_byte` to the bytes of all
files of the copy. Nothing else in the run changes.

Safe to repeat: it only reads, and sets the size only if the run has none.
"""

from __future__ import annotations

import re

from caxev import (
    HERE,
    TRANSFERRED,
    Copy,
    CopyKey,
    FieldIs,
    GiveUp,
    Job,
    Manifest,
    Result,
    Run,
    RunUpdate,
    Skip,
    Unmet,
    copy,
    field,
    on,
    skip_of,
)
from caxev.config import Site
from caxev.copies.lifecycle import manifest_of
from caxev.core.entry import count
from caxev.core.model import field_of
from caxev.files import confine, scan

EVENTS_PER_FILE = 1000
"""Events in one file, unless the run's configuration sets another number."""
PER_FILE = "reader.ini.trigger_config_override.Zip.events_per_file"
EVENT_FILE = re.compile(rb".+-\d+-\d+-\d+-\d+\.zip")
"""Names of event files: experiment, run, first and last event, number of events."""


@on(
    copy(TRANSFERRED, type="raw", host=HERE),
    field("trigger.events_built", "end"),
    # A count runs in a worker process: in a lane of their own, a backlog cannot start hundreds.
    lane="disk",
    aliases=("AddSize",),
    decide=lambda job: skip_of(plan_size(job.run, job.site)),
)
async def add_size(job: Job) -> Result:
    """Set `raw_size_byte` of a run once its raw data is complete here."""
    plan = plan_size(job.run, job.site)
    if isinstance(plan, Skip):
        return plan
    raw, wanted = plan
    manifest = await shape(job, raw)
    found = event_files(manifest)
    # Both more and fewer files are wrong: a size would make incomplete data look complete.
    if found != wanted:
        raise GiveUp(
            f"{raw.key} has {found} files with events, but its events fill {wanted}: "
            "see whether data is missing, or events_built is wrong"
        )
    expected = (FieldIs("raw_size_byte"), raw.as_seen)
    return RunUpdate.set_fields(job.run, *expected, raw_size_byte=manifest.total_bytes)


async def shape(job: Job, copy: Copy) -> Manifest:
    """Return the files of a copy that is here, with their sizes."""
    known = await manifest_of(job, copy.manifest)
    if known is not None:
        return known
    return await job.work(scan_copy, copy.location, job.site.roots)


def scan_copy(location: str, roots: tuple[str, ...]) -> Manifest:
    """List the files of the copy at `location`, which must be inside one of `roots`."""
    return scan(confine(location, roots))


def event_files(manifest: Manifest) -> int:
    """Count the event files. Pure."""
    names = (item.path.rpartition(b"/")[2] for item in manifest.files)
    return sum(EVENT_FILE.fullmatch(name) is not None for name in names)


def plan_size(run: Run, site: Site) -> tuple[Copy, int] | Skip:
    """Decide whether this site can measure the run's size. Pure.

    Returns the copy to count, and the number of event files that it must have.
    """
    if field_of(run.document, "raw_size_byte") is not None:
        return Skip("the run has raw_size_byte")
    if field_of(run.document, "end") is None:
        return Unmet("the run has no end yet")
    events = count(field_of(run.document, "trigger.events_built"))
    if events is None:
        return Unmet("the run has no events_built")
    raw = run.copy(CopyKey("raw", site.name))
    if raw is None:
        return Skip("there is no raw copy here")
    if raw.status != TRANSFERRED or raw.location is None:
        return Unmet(f"the raw copy here is {raw.status}")
    per_file = count(field_of(run.document, PER_FILE)) or EVENTS_PER_FILE
    return raw, -(-events // per_file)
