"""The same as data: JSON below ``/api/v1``, ``/healthz``, and metrics for Prometheus."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final

from attrs import define
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from caxev.core.ledger import State
from caxev.core.model import Run
from caxev.database import Database
from caxev.web import listing, views
from caxev.web.hub import Hub
from caxev.web.lights import Level, is_active
from caxev.web.listing import BadFilter, Filter
from caxev.web.reasons import grouped
from caxev.web.rendering import run_path
from caxev.web.runs import Change
from caxev.web.scene import Scene, numbers, work
from caxev.web.state import Open

DEFAULT: Final = 100
LONGEST_NUMBER: Final = 20
FRESH: Final = 60.0
"""Seconds after which a state that nothing was heard for counts as old, for ``/healthz``."""


@define(eq=False)
class Api:
    """Answers with JSON. `hub` is asked only for how many watch."""

    scene: Scene
    database: Database
    hub: Hub

    def routes(self) -> list[Route]:
        """Return the addresses."""
        return [
            Route("/api/v1/now", self.now),
            Route("/api/v1/sites", self.sites),
            Route("/api/v1/runs", self.runs),
            Route("/api/v1/runs/{id:path}", self.run),
            Route("/api/v1/changes", self.changes),
            Route("/api/v1/failures", self.failures),
            Route("/api/v1/alarms", self.alarms),
            Route("/api/v1/links", self.links),
            Route("/healthz", self.healthz),
            Route("/metrics", self.metrics),
        ]

    async def now(self, request: Request) -> Response:
        """Answer with the numbers, and what is in progress."""
        state = self.scene.state
        worst = max((self.scene.light(site).level for site in self.scene.names), default=Level.OFF)
        return answer(
            request,
            {
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
                        "progress": _progress(one.progress),
                    }
                    for one in work(state)
                ],
                "trouble": _pair(state.health.trouble),
                "history_lost": _pair(state.health.gap),
                "runs_read": state.health.pass_done,
            },
        )

    async def sites(self, request: Request) -> Response:
        """Answer with the sites and their lights."""
        return answer(request, {"sites": [self._site(name) for name in self.scene.names]})

    def _site(self, name: str) -> dict[str, Any]:
        state, light = self.scene.state, self.scene.light(name)
        record = state.sites.get(name)
        return {
            "site": name,
            "level": light.level.icon,
            "reasons": [{"level": level.icon, "why": why} for level, why in light.reasons],
            "listening": record is not None and is_active(record, self.scene.now),
            "owner": record and record.owner,
            "streamed": record and record.streamed,
            "configuration": record and record.configuration,
            **{one.value: state.tally[name, one] for one in State if one is not State.DONE},
        }

    async def runs(self, request: Request) -> Response:
        """Answer with a page of runs, newest first; `next` is the address of the following one."""
        limit = _whole(request.query_params.get("limit"), DEFAULT, listing.MOST)
        chosen = Filter.of(request.query_params)
        before = request.query_params.get("before") or None
        page = await listing.read_page(self.database, chosen, before, limit, self.scene.now)
        more = page.following and chosen.address(
            "/api/v1/runs", before=page.following, limit=str(limit)
        )
        return answer(request, {"runs": [_run(one) for one in page.documents], "next": more})

    async def run(self, request: Request) -> Response:
        """Answer with a run."""
        run_id = listing.id_of(request.path_params["id"])
        found = (await self.database.runs([run_id])).get(run_id)
        if found is None:
            raise BadFilter("there is no such run")
        return answer(request, _run(found.document))

    async def changes(self, request: Request) -> Response:
        """Answer with the latest changes of copies, oldest first, after the number `after`."""
        after = _whole(request.query_params.get("after"), 0, 2**53, least=0)
        limit = _whole(request.query_params.get("limit"), DEFAULT, 10_000)
        found = [one for one in self.scene.state.runs.changes if one.number > after]
        rows = found[:limit] if after else found[-limit:]
        return answer(request, {"changes": [_change(one) for one in rows]})

    async def failures(self, request: Request) -> Response:
        """Answer with failed reactions by handler and reason."""
        groups = grouped(self.scene.state.of_state(State.FAILED))
        return answer(
            request,
            {
                "failures": [
                    {
                        "handler": one.handler,
                        "reason": one.reason,
                        "sites": one.sites,
                        "count": len(one.members),
                        "reactions": [self._reaction(member) for member in one.members[:100]],
                    }
                    for one in groups
                ]
            },
        )

    def _reaction(self, one: Open) -> dict[str, Any]:
        reaction = one.reaction
        return {
            "site": reaction.site,
            "run": run_path(reaction.run),
            "label": self.scene.state.label(reaction.run),
            "event": str(reaction.event),
            "due": reaction.due,
            "attempts": reaction.attempts,
            "note": reaction.note,
        }

    async def alarms(self, request: Request) -> Response:
        """Answer with the active alarms."""
        rows = [
            {
                "id": one.alarm.id,
                "site": one.alarm.site,
                "severity": one.alarm.severity.value,
                "summary": one.alarm.summary,
                "details": dict(one.alarm.details),
                "since": one.since,
                "undelivered": one.undelivered,
            }
            for one in self.scene.state.active_alarms()
        ]
        return answer(request, {"alarms": rows})

    async def links(self, request: Request) -> Response:
        """Answer with what moves between the sites."""
        window = request.query_params.get("window", "24h")
        if window not in views.WINDOWS:
            raise BadFilter(f"window is one of {', '.join(views.WINDOWS)}")
        rows = [
            {
                "from": one.source,
                "to": one.target,
                "moving": one.moving,
                "bytes_per_s": one.rate,
                "copies": one.copies,
                "bytes": one.bytes,
                "limit": one.limit,
            }
            for one in views.link_rows(self.scene, views.WINDOWS[window])
        ]
        return answer(request, {"window": window, "links": rows})

    # -- for monitoring ---------------------------------------------------------------------

    async def healthz(self, request: Request) -> Response:
        """Answer 200 while the state is up to date, else 503 with the reason."""
        del request
        health, status, words = self.scene.state.health, 200, "ok"
        if health.trouble is not None:
            status, words = 503, f"the database cannot be read: {health.trouble[1]}"
        elif health.pass_done is not None:
            status, words = 503, f"reading the runs: {health.pass_done} of {health.pass_total}"
        elif health.fed is None or (self.scene.now - health.fed).total_seconds() > FRESH:
            status, words = 503, "nothing was heard of the database for a minute"
        return Response(f"{words}\n", status, media_type="text/plain")

    async def metrics(self, request: Request) -> Response:
        """Answer with the numbers, for Prometheus."""
        del request
        body = generate_latest(metrics_of(self.scene, self.hub.viewers))
        return Response(body, headers={"content-type": CONTENT_TYPE_LATEST})


def metrics_of(scene: Scene, viewers: int) -> CollectorRegistry:
    """Return the numbers of now, for Prometheus; nothing is counted in between."""
    registry, state = CollectorRegistry(), scene.state

    def gauge(name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"caxev_web_{name}", words, labels, registry=registry)

    copies = gauge("copies", "Copies by host, type and status", "host", "type", "status")
    for place, count in state.runs.counts.items():
        copies.labels(*place).set(count)
    reactions = gauge("reactions", "Open reactions by site and state", "site", "state")
    for (site, one), count in state.tally.items():
        reactions.labels(site, one.value).set(count)
    light = gauge("light", "0 no listener wanted, 1 good, 2 warning, 3 bad", "site")
    for site in scene.names:
        light.labels(site).set(scene.light(site).level)
    gauge("runs", "Runs").set(len(state.runs))
    gauge("viewers", "Browsers that watch").set(viewers)
    gauge("database_trouble", "1 while the database cannot be read").set(
        state.health.trouble is not None
    )
    return registry


def answer(request: Request, value: Mapping[str, Any]) -> Response:
    """Return a value as JSON; only its tag if the client has it already."""
    body = json.dumps(value, default=_json, separators=(",", ":")).encode()
    tag = f'"{blake2b(body, digest_size=12).hexdigest()}"'
    headers = {"etag": tag, "cache-control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


def _json(value: Any) -> Any:
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
    return str(value)


def _pair(found: tuple[datetime, str] | None) -> dict[str, Any] | None:
    return None if found is None else {"since": found[0], "why": found[1]}


def _progress(progress: Any) -> dict[str, Any] | None:
    if progress is None:
        return None
    return {
        "bytes_done": progress.done,
        "bytes_total": progress.total,
        "bytes_per_s": progress.rate,
        "eta_s": progress.left,
    }


def _run(document: Mapping[str, Any]) -> dict[str, Any]:
    run = Run.from_document(document)
    return {
        "id": run_path(run.id),
        "number": run.number,
        "name": run.name,
        "detector": run.detector,
        "start": run.start,
        "tags": list(run.tags),
        "raw_size_byte": run.raw_size,
        "copies": [
            {
                "type": one.type,
                "host": one.host,
                "version": one.version,
                "status": one.status,
                "since": one.since,
                "source": one.source,
                "size": one.size,
                "error": one.error,
            }
            for one in run.copies
        ],
    }


def _change(change: Change) -> dict[str, Any]:
    return {
        "number": change.number,
        "at": change.at,
        "run": run_path(change.run),
        "label": change.label,
        "type": change.key.type,
        "host": change.key.host,
        "version": change.key.version,
        "before": change.before,
        "after": change.after,
    }


def _whole(value: str | None, default: int, most: int, least: int = 1) -> int:
    if value is None:
        return default
    # Python refuses to read a number of thousands of digits.
    is_short = value.isdecimal() and len(value) <= LONGEST_NUMBER
    if not is_short or not least <= int(value) <= most:
        raise BadFilter(f"{value[:LONGEST_NUMBER]!r} is no number from {least} to {most:,}")
    return int(value)
