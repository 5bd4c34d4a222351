"""The same as data: JSON below ``/api/v1``, its changes as events, ``/healthz``, and metrics.

Lists come in pages: ``limit`` rows, and in `next` the address of the following page, None behind
the last. An answer has a tag: with it in ``If-None-Match`` only what has changed is sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

from attrs import define
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from caxev.core.ledger import State
from caxev.database import Database
from caxev.web import data, listing
from caxev.web.answers import Answers
from caxev.web.hub import Hub
from caxev.web.jobs import job_rows
from caxev.web.links import WINDOWS, link_rows
from caxev.web.listing import BadFilter, Filter
from caxev.web.reasons import grouped
from caxev.web.rendering import plain
from caxev.web.scene import Scene
from caxev.web.views import Failures

T = TypeVar("T")

DEFAULT: Final = 100
MOST: Final = 10_000
LONGEST_NUMBER: Final = 20
FRESH: Final = 60.0
"""Seconds after which a state that nothing was heard for counts as old, for ``/healthz``."""
OPEN: Final = ("pending", "running", "failed")


@define(eq=False)
class Api:
    """Answers with JSON. `hub` is asked only for how many watch."""

    scene: Scene
    database: Database
    hub: Hub
    answers: Answers

    def routes(self) -> list[Route]:
        """Return the addresses."""
        named = {
            "now": self.now,
            "sites": self.sites,
            "runs": self.runs,
            "runs/{id:path}": self.run,
            "changes": self.changes,
            "failures": self.failures,
            "reactions": self.reactions,
            "alarms": self.alarms,
            "links": self.links,
            "requests": self.requests,
            "storage": self.storage,
        }
        routes = [Route(f"/api/v1/{path}", answer) for path, answer in named.items()]
        return [*routes, Route("/healthz", self.healthz), Route("/metrics", self.metrics)]

    async def parts(self) -> Mapping[str, Any]:
        """Return what ``/api/v1/events`` sends as it changes, by name."""
        scene = self.scene
        sites = {f"site {name}": data.site_value(scene, name) for name in scene.names}
        return {"now": data.now_value(scene), "alarms": data.alarm_values(scene), **sites}

    async def now(self, request: Request) -> Response:
        """Answer with the numbers, and what is in progress."""
        return answer(request, data.now_value(self.scene))

    async def sites(self, request: Request) -> Response:
        """Answer with the sites and their lights."""
        names = self.scene.names
        return page(request, "sites", names, str, lambda name: data.site_value(self.scene, name))

    async def runs(self, request: Request) -> Response:
        """Answer with a page of runs, newest first."""
        limit = _limit(request, listing.MOST)
        chosen = Filter.of(request.query_params)
        before = request.query_params.get("before") or None
        found = await listing.read_page(self.database, chosen, before, limit, self.scene.now)
        more = found.following and chosen.address(
            "/api/v1/runs", before=found.following, limit=str(limit)
        )
        rows = [data.run_value(one) for one in found.documents]
        return answer(request, {"runs": rows, "next": more})

    async def run(self, request: Request) -> Response:
        """Answer with a run, its jobs, and what is still to be done."""
        run_id = listing.id_of(request.path_params["id"])
        found = (await self.database.runs([run_id])).get(run_id)
        if found is None:
            raise BadFilter("there is no such run")
        scene = self.scene
        more = {
            "jobs": list(map(data.job_value, job_rows(found, scene.sites))),
            "reactions": [data.reaction_value(scene, one) for one in scene.state.of_run(run_id)],
        }
        return answer(request, {**data.run_value(found.document), **more})

    async def changes(self, request: Request) -> Response:
        """Answer with the latest changes of copies, oldest first, after the number `after`.

        `next` is there as long as there may be more: also at the end, for what is still to come.
        """
        after = _whole(request.query_params.get("after"), 0, 2**53, least=0)
        limit = _limit(request, MOST)
        found = [one for one in self.scene.state.runs.changes if one.number > after]
        rows = found[:limit] if after else found[-limit:]
        last = rows[-1].number if rows else after
        more = f"/api/v1/changes?after={last}&limit={limit}"
        return answer(request, {"changes": list(map(data.change_value, rows)), "next": more})

    async def failures(self, request: Request) -> Response:
        """Answer with failed reactions by handler and reason."""
        which = Failures.of(request.query_params)
        failed = filter(which.means, self.scene.state.of_state(State.FAILED))
        return page(
            request,
            "failures",
            grouped(failed),
            lambda one: f"{one.handler} {one.reason}",
            lambda one: {
                "handler": one.handler,
                "reason": one.reason,
                "sites": one.sites,
                "count": len(one.members),
                "reactions": [data.reaction_value(self.scene, m) for m in one.members[:DEFAULT]],
            },
        )

    async def reactions(self, request: Request) -> Response:
        """Answer with open reactions, by their keys."""
        which, query = Failures.of(request.query_params), request.query_params
        state = query.get("state", "")
        if state not in ("", *OPEN):
            raise BadFilter(f"{state!r} is no state: {', '.join(OPEN)}")
        states = [State(state)] if state else map(State, OPEN)
        found = (one for each in states for one in self.scene.state.of_state(each))
        return page(
            request,
            "reactions",
            filter(which.means, found),
            lambda one: one.reaction.id,
            lambda one: data.reaction_value(self.scene, one),
        )

    async def alarms(self, request: Request) -> Response:
        """Answer with the active alarms."""
        return page(request, "alarms", data.alarm_values(self.scene), lambda one: one["id"], dict)

    async def links(self, request: Request) -> Response:
        """Answer with what moves between the sites."""
        window = request.query_params.get("window", "24h")
        if window not in WINDOWS:
            raise BadFilter(f"window is one of {', '.join(WINDOWS)}")
        return page(
            request,
            "links",
            link_rows(self.scene, WINDOWS[window]),
            lambda one: f"{one.source} {one.target}",
            lambda one: {
                "from": one.source,
                "to": one.target,
                "active": one.active,
                "queued": one.queued,
                "failed": one.failed,
                "bytes_per_s": one.rate,
                "copies": one.copies,
                "bytes": one.bytes,
                "limit": one.limit,
            },
        )

    async def requests(self, request: Request) -> Response:
        """Answer with what waits for a listener."""
        waiting = self.scene.state.requests
        return page(request, "requests", waiting, lambda one: str(one.id), data.request_value)

    async def storage(self, request: Request) -> Response:
        """Answer with what each host holds."""
        rows = data.storage_values(self.scene, await self.answers.holdings.get())
        return page(request, "storage", rows, lambda one: f"{one['host']} {one['type']}", dict)

    # -- for monitoring ---------------------------------------------------------------------

    async def healthz(self, request: Request) -> Response:
        """Answer 200 while the state is up to date, else 503 with the reason."""
        del request
        health, status, words = self.scene.state.health, 200, "ok"
        if health.trouble is not None:
            # Without its address and its words: nobody has to log in for this.
            status, words = 503, "the database cannot be read"
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
    body = json.dumps(value, default=plain, separators=(",", ":")).encode()
    tag = f'"{blake2b(body, digest_size=12).hexdigest()}"'
    headers = {"etag": tag, "cache-control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


def page(
    request: Request,
    name: str,
    rows: Iterable[T],
    key: Callable[[T], str],
    value: Callable[[T], Mapping[str, Any]],
) -> Response:
    """Return a page of rows in the order of their keys, which is that after the key `after`."""
    limit, query = _limit(request, MOST), dict(request.query_params)
    found, last = data.after(rows, key, query.get("after"), limit)
    more = None
    if last is not None:
        query |= {"after": last, "limit": str(limit)}
        more = f"/api/v1/{name}?{urlencode(query, errors='backslashreplace')}"
    return answer(request, {name: [value(one) for one in found], "next": more})


def _limit(request: Request, most: int) -> int:
    return _whole(request.query_params.get("limit"), DEFAULT, most)


def _whole(value: str | None, default: int, most: int, least: int = 1) -> int:
    if value is None:
        return default
    # Python refuses to read a number of thousands of digits.
    is_short = value.isdecimal() and len(value) <= LONGEST_NUMBER
    if not is_short or not least <= int(value) <= most:
        raise BadFilter(f"{value[:LONGEST_NUMBER]!r} is no number from {least} to {most:,}")
    return int(value)
