"""Transfers from site to site, present and past: a matrix, and a row for each link. Pure."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Final

from attrs import frozen

from caxev.config import Sites
from caxev.config.sites import link_between
from caxev.core.amounts import size
from caxev.core.ledger import State
from caxev.web import drawing
from caxev.web.rendering import render
from caxev.web.runs import Arrivals
from caxev.web.scene import Scene, trigger_of
from caxev.web.state import LiveState

WINDOWS: Final = {"1h": 1, "24h": 24, "7d": 168}
"""The periods that are shown, in hours."""
MATRIX: Final = 16
"""A matrix has room for so many sites."""
SHADES: Final = 5
SHOWN: Final = 100
"""Links that have a row; the API has all."""
LANES: Final = frozenset({"transfer", "tape", "rucio"})
"""The lanes whose reactions move a copy from one site to another."""

Ends = tuple[str, str]
"""The site that data comes from, and the one that it goes to."""


@frozen
class LinkRow:
    """Transfers from one site to another, present and past."""

    source: str
    target: str
    active: int
    queued: int
    failed: int
    rate: float | None
    copies: int
    bytes: int
    limit: str | None
    shade: int = 0
    """How dark its cell is: 0 for nothing, up to `SHADES` for the most bytes."""


@frozen
class Matrix:
    """The links from each site to each, those that are not used as None."""

    sites: tuple[str, ...]
    rows: tuple[tuple[str, tuple[LinkRow | None, ...]], ...]


def links_parts(scene: Scene, window: str) -> dict[str, str]:
    """Return the links on which something moves or waits, or has moved in the window."""
    rows, now = link_rows(scene, WINDOWS[window]), scene.now
    shown = [(one, _spark(scene.state, (one.source, one.target), now)) for one in rows[:SHOWN]]
    html = render(
        "links_part.html", links=shown, total=len(rows), matrix=matrix(rows), window=window
    )
    return {"matrix": html}


def link_rows(scene: Scene, hours: int) -> list[LinkRow]:
    """Return a row for each link in use, the busiest first."""
    state, now = scene.state, scene.now
    arrived = state.runs.links.within(now, hours)
    active, rates = _moving(state)
    queued, failed = (_owed(scene, one) for one in (State.PENDING, State.FAILED))
    most = max((one.bytes for one in arrived.values()), default=0)
    rows = [
        LinkRow(
            *link,
            active[link],
            queued[link],
            failed[link],
            rates[link] or None,
            (total := arrived.get(link, Arrivals())).copies,
            total.bytes,
            _limit(scene.sites, *link),
            -(-SHADES * total.bytes // most) if most else 0,
        )
        for link in {*arrived, *active, *queued, *failed}
    ]
    return sorted(rows, key=lambda row: (-row.active, -row.bytes, row.source, row.target))


def matrix(rows: list[LinkRow]) -> Matrix | None:
    """Return the links as a matrix; None if there are too many sites for one."""
    sites = sorted({*(one.source for one in rows), *(one.target for one in rows)})
    known = {(one.source, one.target): one for one in rows}
    if not sites or len(sites) > MATRIX:
        return None
    cells = ((one, tuple(known.get((one, other)) for other in sites)) for one in sites)
    return Matrix(tuple(sites), tuple(cells))


def _moving(state: LiveState) -> tuple[Counter[Ends], Counter[Ends]]:
    """Return how many copies are being made on each link, and at how many bytes a second."""
    moving: Counter[Ends] = Counter()
    rates: Counter[Ends] = Counter()
    running = {trigger_of(one): one for one in state.of_state(State.RUNNING)}
    for one in state.runs.moving.values():
        if one.source and one.source != one.key.host:
            link = (one.source, one.key.host)
            moving[link] += 1
            reaction = running.get((one.run, one.trigger or ""))
            if reaction and reaction.progress and reaction.progress.rate:
                rates[link] += int(reaction.progress.rate)
    return moving, rates


def _owed(scene: Scene, state: State) -> Counter[Ends]:
    """Return how many transfers wait for each link, or have failed.

    A reaction to a copy elsewhere brings it here; one to a copy here sends it to where the site
    uploads, if that is one place.
    """
    found: Counter[Ends] = Counter()
    for group, number in scene.state.groups.items():
        if group.state is not state or group.lane not in LANES or group.host is None:
            continue
        if group.host != group.site:
            found[group.host, group.site] += number
        elif (target := _sole_upload(scene.sites, group.site)) is not None:
            found[group.site, target] += number
    return found


def _sole_upload(sites: Sites, name: str) -> str | None:
    site = sites.find(name)
    return site.upload_options[0] if site and len(site.upload_options) == 1 else None


def _spark(state: LiveState, link: Ends, now: datetime) -> str:
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
    if link.transfers is not None:
        words.append(f"{link.transfers} at once")
    if link.hours is not None:
        words.append(f"{_clock(link.hours.begin)} to {_clock(link.hours.end)} UTC")
    return ", ".join(words) or None


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600:02d}:{int(seconds) % 3600 // 60:02d}"
