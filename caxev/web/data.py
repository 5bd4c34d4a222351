"""The state as data: what ``/api/v1`` answers with, made of what the views are made of. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias, TypeVar

from attrs import asdict

from caxev.core.ledger import State
from caxev.core.model import Run
from caxev.web.jobs import JobRow
from caxev.web.lights import Level
from caxev.web.now import site_row
from caxev.web.rendering import run_path
from caxev.web.runs import Change
from caxev.web.scene import Scene, numbers, work
from caxev.web.state import Open
from caxev.web.storage import Holdings, host_rows

Value: TypeAlias = dict[str, Any]
T = TypeVar("T")


def now_value(scene: Scene) -> Value:
    """Return the numbers, and what is in progress."""
    state = scene.state
    worst = max((scene.light(site).level for site in scene.names), default=Level.OFF)
    return {
        "level": worst.icon,
        "numbers": {one.name: one.value for one in numbers(state)},
        "in_progress": [
            {
                "run": run_path(one.run),
                "label": one.label,
                "what": one.what,
                "from": one.source,
                "at": one.place,
                "since": one.since,
                "progress": one.progress and one.progress.values,
            }
            for one in work(state)
        ],
        "trouble": _pair(state.health.trouble),
        "history_lost": _pair(state.health.gap),
        "runs_read": state.health.pass_done,
    }


def site_value(scene: Scene, name: str) -> Value:
    """Return the light of a site, and what it is made of."""
    row, record = site_row(scene, name), scene.state.sites.get(name)
    counts = {State.RUNNING: row.running, State.PENDING: row.pending, State.FAILED: row.failed}
    return {
        "site": name,
        "level": row.light.level.icon,
        "reasons": [{"level": level.icon, "why": why} for level, why in row.light.reasons],
        "listening": row.owner is not None,
        "owner": record and record.owner,
        "version": row.version or None,
        "standby": row.standby,
        "streamed": row.streamed,
        "oldest_due": row.oldest,
        "configuration": record and record.configuration,
        "disks": [{**asdict(one), "full_in_s": one.seconds} for one in scene.disks(name)],
        **{state.value: number for state, number in counts.items()},
    }


def reaction_value(scene: Scene, one: Open) -> Value:
    """Return an open reaction; `key` is its key in the ledger."""
    reaction = one.reaction
    return {
        "key": reaction.id,
        **_picked(reaction, "site", "handler", "lane", "due", "attempts", "note"),
        "state": reaction.state.value,
        "run": run_path(reaction.run),
        "label": scene.state.label(reaction.run),
        "event": str(reaction.event),
        "progress": one.progress and one.progress.values,
    }


def alarm_values(scene: Scene) -> list[Value]:
    """Return the active alarms."""
    return [
        {
            "id": one.alarm.id,
            "site": one.alarm.site,
            "severity": one.alarm.severity.value,
            "summary": one.alarm.summary,
            "details": dict(one.alarm.details),
            "since": one.since,
            "undelivered": one.undelivered,
        }
        for one in scene.state.active_alarms()
    ]


def run_value(document: Mapping[str, Any]) -> Value:
    """Return a run with its copies."""
    run = Run.from_document(document)
    names = ("type", "host", "version", "status", "since", "source", "size", "error")
    return {
        "id": run_path(run.id),
        **_picked(run, "number", "name", "detector", "start"),
        "tags": list(run.tags),
        "raw_size_byte": run.raw_size,
        "copies": [_picked(one, *names) for one in run.copies],
    }


def job_value(row: JobRow) -> Value:
    """Return the last job of a copy."""
    names = ("system", "id", "attempt", "state", "since", "node", "why", "log")
    return {**row.copy.key._asdict(), **_picked(row, *names)}


def change_value(change: Change) -> Value:
    """Return a change of a copy. Its `number` counts from the start of the page's process."""
    names = ("number", "at", "label", "before", "after")
    return {"run": run_path(change.run), **change.key._asdict(), **_picked(change, *names)}


def request_value(request: Any) -> Value:
    """Return a request that waits for a listener; `runs` None: all."""
    names = ("site", "kind", "handler", "alarm", "by", "at")
    return {"id": str(request.id), "runs": request.number, **_picked(request, *names)}


def storage_values(scene: Scene, counted: Holdings) -> list[Value]:
    """Return what each host holds of each type; `patrol` is about all copies of the host."""
    return [
        {
            "host": host.host,
            **_picked(row, "type", "good", "busy", "bad", "bytes"),
            "bytes_by_day": row.by_day,
            "patrol": host.reading and _picked(host.reading, "days", "share", "oldest", "never"),
        }
        for host in host_rows(scene, counted)
        for row in host.types
    ]


def after(
    rows: Iterable[T], key: Callable[[T], str], start: str | None, limit: int
) -> tuple[Sequence[T], str | None]:
    """Return the rows behind the key `start` in order, and the key behind which the next are."""
    ordered = sorted((one for one in rows if start is None or key(one) > start), key=key)
    page = ordered[:limit]
    return page, key(page[-1]) if len(ordered) > limit else None


def _picked(one: object, *names: str) -> Value:
    return {name: getattr(one, name) for name in names}


def _pair(found: tuple[datetime, str] | None) -> Value | None:
    return None if found is None else {"since": found[0], "why": found[1]}
