"""A site: its listener, its disks, its lanes, and its sites.json compared with those of others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import cattrs
from attrs import frozen

from caxev.config import Sites
from caxev.core.ledger import State
from caxev.core.processes import Process, differing
from caxev.web.lights import is_active
from caxev.web.rendering import render, time
from caxev.web.scene import Scene
from caxev.web.state import Open

HIDDEN: Final = frozenset({"markers", "alarms"})
"""Fields of a site that are not shown: addresses of alarms can hold what lets anybody send some."""
DIFFERENCES: Final = 20
"""Keys in which two files differ that are named."""


@frozen
class LaneRow:
    """Running and waiting reactions of a lane; `workers` None: as many as caxev has by default."""

    name: str
    workers: int | None
    running: int
    due: int
    later: int
    failed: int
    next: datetime | None


@frozen
class ProcessRow:
    """A process of a site; `differs`: in which keys its sites.json is another."""

    process: Process
    role: str
    leads: bool
    running: int
    differs: tuple[str, ...]


def lane_rows(open_: Iterable[Open], now: datetime, workers: Mapping[str, int]) -> list[LaneRow]:
    """Return a row for each lane with open reactions, or with workers in sites.json."""
    lanes: dict[str, list[Open]] = {name: [] for name in workers}
    for one in open_:
        lanes.setdefault(one.reaction.lane, []).append(one)
    return [
        _lane_row(name, workers.get(name), members, now) for name, members in sorted(lanes.items())
    ]


def _lane_row(name: str, workers: int | None, open_: Sequence[Open], now: datetime) -> LaneRow:
    of = {state: [one for one in open_ if one.reaction.state is state] for state in State}
    later = [one.reaction.due for one in of[State.PENDING] if one.reaction.due > now]
    return LaneRow(
        name,
        workers,
        running=len(of[State.RUNNING]),
        due=len(of[State.PENDING]) - len(later),
        later=len(later),
        failed=len(of[State.FAILED]),
        next=min(later, default=None),
    )


def site_parts(scene: Scene, site: str) -> dict[str, str]:
    """Return what is known of a site."""
    state, found = scene.state, scene.sites.find(site)
    mine = [one for one in state.reactions.values() if one.reaction.site == site]
    groups = sorted(group for group in state.runs.counts if group.host == site)
    html = render(
        "site_part.html",
        site=site,
        light=scene.light(site),
        facts=_facts(scene, site),
        disks=scene.disks(site),
        copies=[(one.type, one.status, state.runs.counts[one]) for one in groups],
        lanes=lane_rows(mine, scene.now, found.lanes if found else {}),
    )
    return {"site": html}


def _facts(scene: Scene, site: str) -> Sequence[tuple[str, object]]:
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
    ]
    for gap in record.gaps[-3:]:
        facts.append(("history lost", f"{gap.found:%Y-%m-%d %H:%M:%S} UTC: {gap.why}"))
    return facts


def process_rows(scene: Scene, processes: Iterable[Process]) -> list[ProcessRow]:
    """Return a row for each process, its sites.json compared with that of the page."""
    return [_process_row(scene, one) for one in processes]


def _process_row(scene: Scene, one: Process) -> ProcessRow:
    record = scene.state.sites.get(one.site)
    leader = record.owner if record is not None and is_active(record, scene.now) else None
    leads = leader == one.owner
    return ProcessRow(
        one,
        one.role(leader),
        leads,
        scene.state.running_at(one.site, None if leads else one.owner),
        tuple(_differences(scene.sites, one)),
    )


def _differences(mine: Sites, one: Process) -> list[str]:
    if not one.configuration or one.configuration == mine.digest:
        return []
    found = differing(mine.keys, one.keys) or ["the order of sites"]
    more = len(found) - DIFFERENCES
    return [*found[:DIFFERENCES], f"and {more} more"] if more > 1 else found


def configuration(sites: Sites, name: str) -> str:
    """Return a site's entry in sites.json as it was loaded, without what is as by default."""
    found = sites.find(name)
    if found is None:
        return ""
    entry: dict[str, Any] = cattrs.unstructure(found)
    shown = {k: v for k, v in entry.items() if v not in (None, (), {}, []) and k not in HIDDEN}
    return json.dumps(shown, indent=2, default=str, ensure_ascii=True)
