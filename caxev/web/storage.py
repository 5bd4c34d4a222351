"""The data at each site: numbers, bytes over time, room on disks, and when it was read again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import pairwise
from math import ceil
from typing import Final

from attrs import Factory, frozen

from caxev.config import Site, Sites
from caxev.copies.retention import DeletionPlan, plan_purge
from caxev.core.amounts import lasting, size
from caxev.core.job import Wait
from caxev.core.ledger import State
from caxev.core.model import ERROR, TRANSFERRED, CopyKey, Run
from caxev.web import drawing
from caxev.web.growth import HostType
from caxev.web.rendering import render
from caxev.web.scene import DiskUse, Scene

WEEK: Final = timedelta(days=7)
AGES: Final = ((30.0, "a month"), (90.0, "3 months"), (365.0, "a year"))
"""Ages, in days, that readings are grouped by."""
PURGES: Final = frozenset({"purge", "purge_processed", "make_room"})
"""Handlers that delete copies by a site's rules."""


@frozen
class Holdings:
    """Figures that only the database can count.

    `bytes` by host and type; `readings` are, by host, how many good copies were read so many days
    ago (None: never, as far as is known), `oldest` when the first of these was. `at` is when they
    were counted; None: not yet.
    """

    bytes: Mapping[HostType, int] = Factory(dict)
    readings: Mapping[str, Mapping[int | None, int]] = Factory(dict)
    oldest: Mapping[str, datetime] = Factory(dict)
    at: datetime | None = None


@frozen
class TypeRow:
    """Copies of a type at a host; `bytes`: None if unknown, else also at the end of each day."""

    type: str
    good: int
    busy: int
    bad: int
    bytes: int | None
    by_day: tuple[int, ...]
    trend: str


@frozen
class Reading:
    """How many copies of a host were read again lately: by age, as one bar and in words.

    `share` of them within the `days` of the host's patrol (None: it has none), `oldest` the longest
    ago, `never` not at all, as far as is known.
    """

    days: float | None
    share: float | None
    bar: str
    oldest: datetime | None
    never: int

    @property
    def percent(self) -> int | None:
        """The share in percent: 100 only if it is all."""
        return None if self.share is None else int(100 * self.share)


@frozen
class HostRow:
    """Copies at a host. `rate` is in bytes a day."""

    host: str
    types: tuple[TypeRow, ...]
    disks: tuple[DiskUse, ...]
    rate: float
    reading: Reading | None
    tape: str | None

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


@frozen
class PurgeRow:
    """Copies of a site that wait for the time at which its rules delete them."""

    site: str
    rules: str
    due: int
    week: int
    later: int
    next: datetime | None
    why: str


def storage_parts(scene: Scene, counted: Holdings) -> dict[str, str]:
    """Return what each host holds, and what its rules will delete."""
    return {
        "storage": render(
            "storage_part.html", hosts=host_rows(scene, counted), ages=_legend(), at=counted.at
        ),
        "purges": render("storage_purges.html", rows=purge_rows(scene)),
    }


def host_rows(scene: Scene, counted: Holdings) -> list[HostRow]:
    """Return a row for each host with copies."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for group, number in scene.state.runs.counts.items():
        kind = {TRANSFERRED: "good", ERROR: "bad"}.get(group.status, "busy")
        counts.setdefault(group.host, {}).setdefault(group.type, Counter())[kind] += number
    return [
        HostRow(
            host,
            tuple(
                _type_row(scene, (host, kind), counts[host][kind], counted)
                for kind in sorted(counts[host], key=scene.sites.types.order)
            ),
            tuple(scene.disks(host)),
            scene.state.runs.growth.rate(host, scene.now) * 86400,
            _reading(scene.sites.find(host), counted),
            _tape(scene, host),
        )
        for host in scene.hosts
        if host in counts
    ]


def _type_row(scene: Scene, of: HostType, n: Counter[str], counted: Holdings) -> TypeRow:
    host, kind = of
    if counted.at is None:
        return TypeRow(kind, n["good"], n["busy"], n["bad"], None, (), "")
    total = counted.bytes.get(of, 0)
    days = scene.state.runs.growth.totals(host, kind, total, scene.now)
    words = f"{kind} at {host} in {len(days)} days: from {size(days[0])} to {size(total)}"
    trend = drawing.area(days, words)
    return TypeRow(kind, n["good"], n["busy"], n["bad"], total, tuple(days), trend)


# -- reading again --------------------------------------------------------------------------------


def longest_patrol(sites: Sites) -> int:
    """Return the days beyond which no view asks how old a reading is."""
    periods = [one.patrol.days for one in sites.values() if one.patrol is not None]
    return ceil(max([AGES[-1][0], *periods]))


def _reading(site: Site | None, counted: Holdings) -> Reading | None:
    read = counted.readings.get(site.name) if site is not None else None
    if site is None or not site.readable or not read:
        return None
    days = site.patrol.days if site.patrol else None
    total = sum(read.values())
    ages = [_within(read, 0, AGES[0][0])]
    ages += [_within(read, younger, older) for (younger, _), (older, _) in pairwise(AGES)]
    never = read.get(None, 0)
    parts = [
        *((f"age-{n}", one) for n, one in enumerate(ages)),
        ("age-3", total - sum(ages) - never),
    ]
    words = ", ".join(f"{n:,} {text}" for (_, n), text in zip(parts, _legend(), strict=True))
    bar = drawing.stack([*parts, ("none", never)], f"read again: {words}; {never:,} never")
    share = None if days is None else _within(read, 0, days) / total
    return Reading(days, share, bar, counted.oldest.get(site.name), never)


def _legend() -> list[str]:
    return [*(f"within {name}" for _, name in AGES), "longer ago"]


def _within(read: Mapping[int | None, int], younger: float, older: float) -> int:
    return sum(n for day, n in read.items() if day is not None and younger <= day < older)


def _tape(scene: Scene, host: str) -> str | None:
    """Return what is read from and written to an archive now, in words."""
    site = scene.sites.find(host)
    if site is None or site.method != "tsm":
        return None
    now: Counter[State] = Counter()
    for group, number in scene.state.groups.items():
        if group.lane == "tape":
            now[group.state] += number
    states = ((State.RUNNING, "running"), (State.PENDING, "waiting"), (State.FAILED, "failed"))
    return "tape: " + ", ".join(f"{now[state]:,} {word}" for state, word in states)


# -- what the rules delete ------------------------------------------------------------------------


def purge_rows(scene: Scene) -> list[PurgeRow]:
    """Return a row for each site whose rules delete copies, or that waits to delete some."""
    now, rows = scene.now, []
    for name in scene.names:
        site = scene.sites.find(name)
        rules = rules_of(site)
        waiting = [
            one.reaction
            for one in scene.state.of_state(State.PENDING, name)
            if one.reaction.handler in PURGES
        ]
        if not rules and not waiting:
            continue
        due = sum(one.due <= now for one in waiting)
        week = sum(now < one.due <= now + WEEK for one in waiting)
        following = min(waiting, key=lambda one: one.due, default=None)
        rows.append(
            PurgeRow(
                name,
                rules,
                due,
                week,
                len(waiting) - due - week,
                following.due if following else None,
                following.note if following else "",
            )
        )
    return rows


def rules_of(site: Site | None) -> str:
    """Return in words what a site's rules delete."""
    if site is None:
        return ""
    words = []
    if site.purge is not None:
        words.append(f"raw data after {lasting(site.purge * 86400)}")
    if site.pax_version_purge is not None:
        words.append(f"processed data of {site.pax_version_purge}")
    return ", ".join(words)


@frozen
class Candidate:
    """A raw copy, and whether the rules of its site delete it now; `until`: not before then."""

    run: Run
    size: int | None
    goes: bool
    until: datetime | None
    why: str


def candidate(run: Run, site: Site, sites: Sites, now: datetime) -> Candidate:
    """Return what the rules of a site mean for its raw copy of a run."""
    copy = run.copy(CopyKey("raw", site.name))
    plan = plan_purge(run, copy, site, sites, now)
    until = plan.until if isinstance(plan, Wait) else None
    size = run.raw_size if copy is None else run.size_of(copy)
    return Candidate(run, size, isinstance(plan, DeletionPlan), until, plan.why)
