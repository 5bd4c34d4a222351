"""The first view: does anybody have to do something, what moves, and what has failed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import islice
from typing import Final

from attrs import frozen

from caxev.core.alarms import urgency
from caxev.core.ledger import State
from caxev.core.model import TRANSFERRED
from caxev.web.lights import Level, Light, is_active
from caxev.web.reasons import grouped
from caxev.web.rendering import Parts, element_id, render
from caxev.web.scene import HEADLINES, DiskUse, Scene, numbers, work
from caxev.web.state import LiveState

CHANGES_SHOWN: Final = 14
PROGRESS_SHOWN: Final = 12
RECENT: Final = timedelta(hours=24)


@frozen
class SiteRow:
    """A row of the table of sites.

    `owner` is the process that listens now; `oldest` is since when its oldest reaction could have
    run.
    """

    name: str
    light: Light
    listens: bool
    owner: str | None
    running: int
    pending: int
    failed: int
    good: int
    oldest: datetime | None
    disk: DiskUse | None
    version: str
    standby: int
    helpers: int
    streamed: datetime | None


def now_parts(scene: Scene) -> Parts:
    """Return the parts of the first view."""
    rows = [site_row(scene, site) for site in scene.names]
    parts = {
        "summary": _summary(scene, {row.name: row.light for row in rows}),
        "numbers": render("now_numbers.html", numbers=numbers(scene.state)),
    }
    for row in rows:
        name = element_id("site", row.name)
        parts[name] = render("now_site.html", id=name, one=row)
    failed, since = scene.state.of_state(State.FAILED), scene.now - RECENT
    recent = [one for one in failed if one.reaction.due > since]
    parts["progress"] = _progress(scene.state)
    parts["failures"] = render(
        "now_failures.html",
        groups=grouped(recent),
        total=len(recent),
        older=len(failed) - len(recent),
    )
    alarms = sorted(scene.state.active_alarms(), key=urgency)
    parts["alarms"] = render("now_alarms.html", alarms=alarms, total=len(alarms))
    changes = list(islice(reversed(scene.state.runs.changes), CHANGES_SHOWN))
    parts["changes"] = render("now_changes.html", changes=changes)
    return parts


def site_row(scene: Scene, site: str) -> SiteRow:
    """Return what is shown of a site."""
    state, now = scene.state, scene.now
    record, counts = state.sites.get(site), state.runs.counts
    is_listening = record is not None and is_active(record, now)
    processes = state.processes_of(site, now)
    owner = record.owner if record is not None and is_listening else None
    versions = [one.version for one in processes if one.owner == owner]
    return SiteRow(
        name=site,
        light=scene.light(site),
        listens=scene.listens(site),
        owner=owner,
        running=state.tally[site, State.RUNNING],
        pending=state.tally[site, State.PENDING],
        failed=state.tally[site, State.FAILED],
        good=sum(n for of, n in counts.items() if of.host == site and of.status == TRANSFERRED),
        oldest=state.oldest_due(site, now),
        disk=scene.fullest(site),
        version=versions[0] if versions else "",
        standby=sum(one.owner != owner and not one.helps for one in processes),
        helpers=sum(one.helps for one in processes),
        streamed=record.streamed if record is not None else None,
    )


def _summary(scene: Scene, lights: Mapping[str, Light]) -> str:
    reasons = [
        (level, site, words)
        for site, light in lights.items()
        for level, words in light.reasons
        if level >= Level.WARN
    ]
    health, notes = scene.state.health, []
    if health.trouble is not None:
        since, why = health.trouble
        reasons.append((Level.BAD, "", f"the database cannot be read: {why}"))
        notes.append({"words": "What follows is as it was before. No answer since", "at": since})
    if health.pass_done is not None:
        done, total = health.pass_done, max(health.pass_total, health.pass_done)
        notes.append({"words": f"Reading the runs: {done:,} of about {total:,}.", "at": None})
    if health.gap is not None and scene.now - health.gap[0] < RECENT:
        words = "The change stream was interrupted and everything was read again"
        notes.append({"words": words, "at": health.gap[0]})
    reasons.sort(key=lambda one: -one[0])
    worst = max([level for level, _, _ in reasons], default=Level.GOOD)
    return render(
        "now_summary.html",
        level=worst,
        headline=HEADLINES[worst],
        reasons=reasons,
        words=_all_well(lights),
        notes=notes,
    )


def _all_well(lights: Mapping[str, Light]) -> str:
    listening = sum(light.level is Level.GOOD for light in lights.values())
    sites = "1 site is" if listening == 1 else f"{listening} sites are"
    return f"{sites} listening, no reaction has failed and no alarm is active."


def _progress(state: LiveState) -> str:
    rows = work(state)
    return render("now_progress.html", rows=rows[:PROGRESS_SHOWN], total=len(rows))
