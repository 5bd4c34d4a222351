"""What each view shows: its parts by their ids, as HTML. Made of the state alone, without waiting.

A part is an element that the browser replaces when it has changed. `VIEWS` are those that follow
the state; `pages` has what asks the database as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Final, TypeAlias

from attrs import frozen

from caxev.config import Sites
from caxev.config.sites import link_between
from caxev.core.alarms import urgency
from caxev.core.amounts import size
from caxev.core.ledger import State
from caxev.core.model import ERROR, TRANSFERRED
from caxev.web import drawing
from caxev.web.lights import Level, Light
from caxev.web.reasons import grouped
from caxev.web.rendering import element_id, render
from caxev.web.runs import Arrivals
from caxev.web.scene import HEADLINES, Scene, numbers, trigger_of, work
from caxev.web.state import LiveState, Open

Parts: TypeAlias = dict[str, str]

CHANGES_SHOWN: Final = 14
PROGRESS_SHOWN: Final = 12
WINDOWS: Final = {"1h": 1, "24h": 24, "7d": 168}
"""The periods of the links, in hours."""

# -- now ------------------------------------------------------------------------------------------


def now_parts(scene: Scene) -> Parts:
    """Return the parts of the first view: does anybody have to do something."""
    lights = {site: scene.light(site) for site in scene.names}
    parts = {
        "summary": _summary(scene, lights),
        "numbers": render("now_numbers.html", numbers=numbers(scene.state)),
    }
    for site, light in lights.items():
        parts[element_id("site", site)] = _card(scene, site, light)
    failed = scene.state.of_state(State.FAILED)
    parts["progress"] = _progress(scene.state)
    parts["failures"] = render("now_failures.html", groups=grouped(failed), total=len(failed))
    alarms = sorted(scene.state.active_alarms(), key=urgency)
    parts["alarms"] = render("now_alarms.html", alarms=alarms, total=len(alarms))
    changes = list(islice(reversed(scene.state.runs.changes), CHANGES_SHOWN))
    parts["changes"] = render("now_changes.html", changes=changes)
    return parts


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
    if health.gap is not None and scene.now - health.gap[0] < timedelta(days=1):
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


def _card(scene: Scene, site: str, light: Light) -> str:
    state, record = scene.state, scene.state.sites.get(site)
    good = sum(
        count
        for place, count in state.runs.counts.items()
        if place.host == site and place.status == TRANSFERRED
    )
    return render(
        "now_site.html",
        id=element_id("site", site),
        site=site,
        light=light,
        works=scene.listens(site),
        running=state.tally[site, State.RUNNING],
        pending=state.tally[site, State.PENDING],
        failed=state.tally[site, State.FAILED],
        good=good,
        streamed=record.streamed if record is not None else None,
        note="last heard of the database",
    )


def _progress(state: LiveState) -> str:
    rows = work(state)
    return render("now_progress.html", rows=rows[:PROGRESS_SHOWN], total=len(rows))


# -- failures, alarms -----------------------------------------------------------------------------


def failures_parts(scene: Scene) -> Parts:
    """Return failed reactions, grouped by handler and reason."""
    failed = scene.state.of_state(State.FAILED)
    groups = grouped(failed)
    html = render("failures_part.html", groups=groups, total=len(failed), labels=scene.state.label)
    return {"groups": html}


def alarms_parts(scene: Scene) -> Parts:
    """Return the active alarms, the worst first."""
    alarms = sorted(scene.state.active_alarms(), key=urgency)
    return {"alarms": render("alarms_part.html", alarms=alarms)}


# -- links ----------------------------------------------------------------------------------------


@frozen
class LinkRow:
    """What moves and has moved from one site to another."""

    source: str
    target: str
    moving: int
    rate: float | None
    copies: int
    bytes: int
    spark: str
    limit: str | None


def links_parts(scene: Scene, window: str) -> Parts:
    """Return the links on which something moves, or has moved in the window or a day."""
    rows = link_rows(scene, WINDOWS[window])
    return {"matrix": render("links_part.html", links=rows, window=window)}


def link_rows(scene: Scene, hours: int) -> list[LinkRow]:
    """Return a row for each link in use, the busiest first."""
    state, now = scene.state, scene.now
    arrived = state.runs.links.within(now, hours)
    moving: Counter[tuple[str, str]] = Counter()
    rates: Counter[tuple[str, str]] = Counter()
    running = {trigger_of(one): one for one in state.of_state(State.RUNNING)}
    for one in state.runs.moving.values():
        if one.source and one.source != one.key.host:
            link = (one.source, one.key.host)
            moving[link] += 1
            reaction = running.get((one.run, one.trigger or ""))
            if reaction and reaction.progress and reaction.progress.rate:
                rates[link] += int(reaction.progress.rate)
    rows = [
        LinkRow(
            *link,
            moving[link],
            rates[link] or None,
            (total := arrived.get(link, Arrivals())).copies,
            total.bytes,
            _spark(state, link, now),
            _limit(scene.sites, *link),
        )
        for link in {*arrived, *moving}
    ]
    return sorted(rows, key=lambda row: (-row.moving, -row.bytes, row.source, row.target))


def _spark(state: LiveState, link: tuple[str, str], now: datetime) -> str:
    hour = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    hours = state.runs.links.hours.get(link, {})
    values = [
        hours[at].bytes if (at := hour - timedelta(hours=back)) in hours else 0
        for back in range(23, -1, -1)
    ]
    words = f"{size(sum(values))} in 24 hours, at most {size(max(values))} in one"
    return drawing.sparkline(values, words)


def _limit(sites: Sites, source: str, target: str) -> str | None:
    """Return the limits of a link in words."""
    ends = sites.find(source), sites.find(target)
    if ends[0] is None or ends[1] is None:
        return None
    link = link_between(ends[1], ends[0])
    words = []
    if link.max_rate is not None:
        words.append(f"{size(float(link.max_rate))}/s")
    if link.hours is not None:
        words.append(f"{_clock(link.hours.begin)} to {_clock(link.hours.end)} UTC")
    return ", ".join(words) or None


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600:02d}:{int(seconds) % 3600 // 60:02d}"


# -- a site ---------------------------------------------------------------------------------------


@frozen
class LaneRow:
    """What is running and waiting in a lane."""

    name: str
    running: int
    due: int
    later: int
    next: datetime | None


def lane_rows(open_: Iterable[Open], now: datetime) -> list[LaneRow]:
    """Return a row for each lane with open reactions."""
    lanes: dict[str, list[Open]] = {}
    for one in open_:
        if one.reaction.state is not State.FAILED:
            lanes.setdefault(one.reaction.lane, []).append(one)
    rows = []
    for name, members in sorted(lanes.items()):
        pending = [m.reaction.due for m in members if m.reaction.state is State.PENDING]
        later = [at for at in pending if at > now]
        running = len(members) - len(pending)
        following = min(later, default=None)
        rows.append(LaneRow(name, running, len(pending) - len(later), len(later), following))
    return rows


def site_parts(scene: Scene, site: str) -> Parts:
    """Return what is known of a site."""
    state, now = scene.state, scene.now
    mine = [one for one in state.reactions.values() if one.reaction.site == site]
    places = sorted(place for place in state.runs.counts if place.host == site)
    html = render(
        "site_part.html",
        site=site,
        light=scene.light(site),
        facts=_facts(scene, site),
        copies=[(one.type, one.status, state.runs.counts[one]) for one in places],
        lanes=lane_rows(mine, now),
    )
    return {"site": html}


def _facts(scene: Scene, site: str) -> Sequence[tuple[str, object]]:
    from caxev.web.rendering import time

    record, found = scene.state.sites.get(site), scene.sites.find(site)
    facts: list[tuple[str, object]] = []
    if found is not None:
        facts += [("reached by", found.method), ("host", found.hostname)]
    if record is None or not record.epoch:
        return facts
    facts += [
        ("process", record.owner),
        ("lease valid until", time(record.expires)),
        ("epoch", record.epoch),
        ("stream read", time(record.streamed)),
        ("last scan of all runs", time(record.scanned)),
        ("clock", None if record.skew is None else f"{record.skew:+.1f} s"),
        ("digest of its sites.json", record.configuration or None),
    ]
    for gap in record.gaps[-3:]:
        facts.append(("history lost", f"{gap.found:%Y-%m-%d %H:%M:%S} UTC: {gap.why}"))
    return facts


# -- storage --------------------------------------------------------------------------------------


@frozen
class TypeRow:
    """Copies of a type at a host; `bytes`: None if unknown."""

    type: str
    good: int
    busy: int
    bad: int
    bytes: int | None


@frozen
class HostRow:
    """Copies at a host."""

    host: str
    types: tuple[TypeRow, ...]

    @property
    def bytes(self) -> int | None:
        known = [row.bytes for row in self.types if row.bytes is not None]
        return sum(known) if known else None

    @property
    def bar(self) -> str:
        """The statuses of all its copies as one bar."""
        good, busy, bad = (
            sum(getattr(row, name) for row in self.types) for name in ("good", "busy", "bad")
        )
        parts = [("good", good), ("busy", busy), ("bad", bad)]
        return drawing.stack(parts, f"{good} good, {busy} on the way, {bad} bad")


def storage_parts(scene: Scene, sizes: Mapping[tuple[str, str], int]) -> Parts:
    """Return what each host holds; `sizes` are bytes by host and type."""
    return {"storage": render("storage_part.html", hosts=host_rows(scene, sizes))}


def host_rows(scene: Scene, sizes: Mapping[tuple[str, str], int]) -> list[HostRow]:
    """Return a row for each host with copies."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    order = scene.sites.types.order
    for place, number in scene.state.runs.counts.items():
        kind = {TRANSFERRED: "good", ERROR: "bad"}.get(place.status, "busy")
        counts.setdefault(place.host, {}).setdefault(place.type, Counter())[kind] += number
    return [
        HostRow(
            host,
            tuple(
                TypeRow(kind, n["good"], n["busy"], n["bad"], sizes.get((host, kind)))
                for kind, n in sorted(counts[host].items(), key=lambda one: order(one[0]))
            ),
        )
        for host in scene.hosts
        if host in counts
    ]


VIEWS: Final[Mapping[str, Callable[[Scene], Parts]]] = {
    "now": now_parts,
    "failures": failures_parts,
    "alarms": alarms_parts,
    **{
        f"links:{name}": (lambda scene, name=name: links_parts(scene, name))  # type: ignore[misc]
        for name in WINDOWS
    },
}
"""The views that are made of the state alone and have no parameters."""
