"""Acts that concern listeners themselves: retry, replay, the end of an alarm.

Such a request is a document for each site, and for each so many runs, that waits until the site's
listener carries it out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar, Final

from attrs import evolve, field, frozen

from caxev.asking.base import ActPlan, counted, pages
from caxev.config import Sites
from caxev.config.errors import hint, known_names
from caxev.core.clock import utcnow
from caxev.core.errors import ConfigError, NothingToDo
from caxev.core.history import Deed, HistoryRow, What
from caxev.core.model import RunId
from caxev.core.registry import Registry

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.database import Database, Request

COUNTED: Final = 1000
"""Up to this number failed reactions of a selection are counted: a message needs no exact one."""


@frozen
class ListenerAct:
    """Something that is asked of the listeners of sites: of some runs, or (None) of all.

    `handler` narrows it to one handler, by its own name: see `handler_called`.
    """

    kind: ClassVar[str] = ""
    done: ClassVar[str] = ""
    sites: tuple[str, ...]
    handler: str | None = None

    def requests(self, runs: Sequence[RunId] | None, bulk: str | None = None) -> list[Request]:
        """Return what the sites are asked for, as parts of the request `bulk`."""
        from caxev.database import Request

        several = [None] if runs is None else list(pages(runs))
        return [
            Request(self.kind, page, self.handler, bulk=bulk, site=site)
            for site in self.sites
            for page in several
        ]

    @property
    def words(self) -> str:
        """The act in words, for a plan."""
        return f"{self.done} at {', '.join(self.sites)}"

    def plan(self, runs: Sequence[RunId]) -> ActPlan:
        """Return the plan for these runs."""
        plan = ActPlan(runs=list(runs))
        plan.done[self.words] = len(runs)
        return plan


@frozen
class RetryReactions(ListenerAct):
    """Try failed reactions again, as if they had never been tried."""

    kind: ClassVar[str] = "retry"
    done: ClassVar[str] = "retried"


@frozen
class Replay(ListenerAct):
    """Run the reactions for existing runs again; with `force` also those that are done."""

    kind: ClassVar[str] = "replay"
    done: ClassVar[str] = "replayed"
    force: bool = field(default=False, kw_only=True)

    def requests(self, runs: Sequence[RunId] | None, bulk: str | None = None) -> list[Request]:
        """Return what the sites are asked for, as parts of the request `bulk`."""
        return [evolve(one, force=self.force) for one in super().requests(runs, bulk)]


def listening_sites(sites: Sites, site: str | None) -> tuple[str, ...]:
    """Return the sites to ask: the one named, or all with a listener. Raises `ConfigError`."""
    if site is None:
        return tuple(one.name for one in sites.values() if one.listener)
    if not sites.get(site).listener:
        why = f"site {site!r} has no listener of its own, according to {sites.path}"
        raise ConfigError(why)
    return (site,)


def handler_called(name: str, registries: Iterable[Registry]) -> str:
    """Return the handler that has this name or alias. Raises `ConfigError` naming the nearest."""
    handlers = [handler for registry in registries for handler in registry.handlers.values()]
    names = {handler.name for handler in handlers}
    if name in names:  # a handler's own name precedes another one's alias
        return name
    meant = sorted({handler.name for handler in handlers if name in handler.aliases})
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ConfigError(f"{name!r} is the name of several handlers: {', '.join(meant)}")
    raise ConfigError(f"no handler {name!r} {known_names(name, sorted(names))}")


def addressed(
    sites: Sites, registry: Callable[[str], Registry], site: str | None, handler: str | None
) -> tuple[tuple[str, ...], str | None]:
    """Return the sites to ask, and the handler's own name if one is given. Raises `ConfigError`."""
    # Resolved here: in the request an unknown name would be an error in the log of a listener far
    # away, and an alias may not be known to its version.
    names = listening_sites(sites, site)
    return names, handler and handler_called(handler, map(registry, names))


def enabling(
    names: Sequence[str], registry: Callable[[str], Registry], handler: str | None
) -> tuple[str, ...]:
    """Return the sites that enable a handler (None: all). Raises `ConfigError` if none does."""
    if handler is None:
        return tuple(names)
    found = tuple(n for n in names if any(one.name == handler for one in registry(n).enabled))
    if not found:
        raise ConfigError(
            f"handler {handler!r} is enabled at none of {', '.join(names)}: see their task_list"
        )
    return found


async def leave(asker: Asker, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Leave requests for listeners; return as `asked`."""
    for one in requests:
        row = row_of(one, What.REQUESTED, asker.by)
        await asker.database.add_request(one.site, one, asker.by, utcnow(), row)
    return await asked(asker, requests)


async def asked(asker: Asker, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Return for each site how many requests were left there, and whether one listens now."""
    rows = []
    for site, number in Counter(one.site for one in requests).items():
        record = await asker.database.site_record(site)
        active = bool(record and record.active)
        rows.append({"site": site, "queued": number, "listening": active})
    return rows


def row_of(request: Request, what: str, by: str) -> HistoryRow:
    """Return the row of history about a request to a site's listener."""
    runs = request.runs or ()
    of = "" if request.runs is None else f" of {counted(len(runs))}"
    words = [f"{request.kind}{of}", request.handler or "", request.alarm or ""]
    words.append("forced" if request.force else "")
    deed = Deed(what=what, reason=", ".join(filter(None, words)), by=by)
    run = runs[0] if len(runs) == 1 else None
    return HistoryRow(at=utcnow(), site=request.site, deed=deed, run=run)


async def failures(
    database: Database, site: str, runs: Sequence[RunId] | None, handler: str | None
) -> int:
    """Return how many reactions have failed; of a selection, counted up to `COUNTED` or so."""
    # The tally is one cheap query. For a selection the reactions themselves are counted.
    if runs is None and handler is None:
        return (await database.tally(site)).get(site, {}).get("failed", 0)
    if runs is not None and len(runs) == 1:
        return len(
            await database.reactions(
                site, run=runs[0], state="failed", handler=handler, limit=COUNTED
            )
        )
    number, meant = 0, None if runs is None else frozenset(runs)
    async with aclosing(database.reaction_pages(site, "failed", handler)) as pages:
        async for page in pages:
            number += sum(meant is None or one.run in meant for one, _ in page)
            if number >= COUNTED:
                break
    return number


async def clear_alarm(asker: Asker, name: str) -> Mapping[str, Any]:
    """Ask the listener of its site to end the alarm of this id. Raises `NothingToDo`.

    Returns as `asked`, with the alarm's `summary`.
    """
    from caxev.database import Request

    found = [one.alarm for one in await asker.database.alarms() if one.active]
    alarm = next((alarm for alarm in found if alarm.id == name), None)
    if alarm is None:
        near = hint(name, [one.id for one in found], "caxev alarms lists those that are")
        raise NothingToDo(f"no alarm {name!r} is active: {near}")
    (left,) = await leave(asker, [Request("clear", alarm=alarm.key, site=alarm.site)])
    return {**left, "summary": alarm.summary}
