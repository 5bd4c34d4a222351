"""Which derived data a site makes from a run, and when. Pure.

`caxev.handlers.processing` claims the planned copies. `caxev.config.DataType` names the source of a
type, and the site's entry the command.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from caxev.batch.derived import events_of, values_of
from caxev.config import DataType, Processing, Site
from caxev.config.data_types import PROCESSED
from caxev.copies.lifecycle import CopyPlan, place_for
from caxev.core.job import Skip, Unmet, skip_of
from caxev.core.model import ERROR, TRANSFERRED, Copy, CopyKey, Run, field_of

DO_NOT: Final = "donotprocess"
"""The tag of runs that are not processed."""
WRITE_MODE: Final = 2
"""The DAQ's write mode of runs that have events on disk."""


def plan_derived(run: Run, types: Iterable[str], site: Site) -> list[CopyPlan] | Skip:
    """Decide which copies of these types the site makes of a run now."""
    plans = [plan for one in types for plan in _plans(run, one, site)]
    claims = [plan for plan in plans if isinstance(plan, CopyPlan)]
    return claims or skip_of(*plans) or Skip("there is no version of it")


def _plans(run: Run, name: str, site: Site) -> Sequence[CopyPlan | Skip]:
    kind, how = site.types.by_name.get(name), site.processing_of(name)
    if kind is None or kind.source is None or how is None:
        return [Skip(f"{site.name} makes no {name} data")]
    if (why := unready(run, name, how)) is not None:
        return [Unmet(why)]
    if kind.source in site.types.versioned:
        found = [one for one in run.copies if (one.type, one.host) == (kind.source, site.name)]
        pairs = [(one, one.version) for one in found if how.version in (None, one.version)]
        return [_plan(run, kind, version, one, site) for one, version in pairs] or [
            Unmet(f"there is no {kind.source} data here")
        ]
    source = run.copy(CopyKey(kind.source, site.name))
    return [_plan(run, kind, version, source, site) for version in _versions(kind, how, site)] or [
        Skip(f"no version is named: pax_processing_versions, or version in {kind.making}")
    ]


def _versions(kind: DataType, how: Processing, site: Site) -> Sequence[str | None]:
    if not kind.versioned:
        return (None,)
    named = site.pax_processing_versions if kind.name == PROCESSED else ()
    return named or (() if how.version is None else (how.version,))


def unready(run: Run, name: str, how: Processing) -> str | None:
    """Return why nothing of that type can be made of a run yet, or None if it can."""
    if DO_NOT in run.tags:
        return f"it is tagged {DO_NOT}"
    missing = [path for path in how.needs(name) if field_of(run.document, path) is None]
    if missing:
        return f"it lacks {', '.join(missing)}"
    if name != PROCESSED:
        return None
    # The last two are what pax cannot read; other programs need what `inputs` names.
    mode = field_of(run.document, "reader.ini.write_mode")
    if mode != WRITE_MODE:
        return f"its write mode is {mode}, not {WRITE_MODE}"
    return None if events_of(run) else "it has no events"


def _plan(
    run: Run, kind: DataType, version: str | None, source: Copy | None, site: Site
) -> CopyPlan | Skip:
    """Decide whether a copy is made of `source`; `resume` is an earlier failure."""
    key, how = CopyKey(kind.name, site.name, version), site.processing_of(kind.name)
    assert how is not None  # `_plans` has checked it
    if source is None or source.status != TRANSFERRED or source.location is None:
        seen = "not here" if source is None else source.status
        why = f"what it is made of is {seen}"
        return Unmet(why) if run.copy(key) is None else Skip(why)
    for one in filter(None, (kind, site.types.by_name.get(source.type))):
        if version is not None and version == site.purged_version(one.name):
            return Skip(f"{version} is deleted here ({one.purging})")
    there = run.copy(key)
    if there is not None and not failed_before(there):
        return Skip(f"{key} is {there.status} already")
    location = place_for(key, how.fill(how.output, values_of(run, key, how)), site)
    if isinstance(location, Skip):
        return location
    return CopyPlan(source, key, location, f"{site.name}: {source.key}", there)


def failed_before(entry: Copy) -> bool:
    """Return whether this copy's job failed for good."""
    # An error with a checksum problem had a good job: a repair replaces it, no new job.
    had_job = entry.job_ended is not None and entry.job_ended.how is not None
    return had_job and entry.status == ERROR and not entry.checksumproblem
