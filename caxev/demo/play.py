"""Play the demo: three sites, real servers and a stand-in DAQ, until all is copied.

``caxev demo`` calls `play`; `world` has the servers and the sites.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import trio
from attrs import define, field
from rich.console import Console

from caxev import aio
from caxev.asking.annotations import TagRuns
from caxev.asking.asker import Asker
from caxev.config import ConfigError, load_sites
from caxev.core.clock import utcnow
from caxev.core.errors import GiveUp
from caxev.core.history import Deed, HistoryRow, What, of_run
from caxev.core.ledger import Reaction
from caxev.core.model import ERROR, TRANSFERRED, Copy, CopyKey, Run
from caxev.core.registry import Registry
from caxev.core.selection import Selection
from caxev.core.update import RunUpdate
from caxev.database import Database, HistorySearch, open_database, run
from caxev.demo.world import TAPE, World
from caxev.engine.listener import prepare

BIRTH: Final = "lngs"
"""The site of sites.json where the stand-in DAQ writes."""
PROTECTED: Final = "keep"
"""The tag of runs that stay at their site of birth."""
PERSON: Final = "caxev demo"
"""The name under which the demo acts as a person."""
SETTLING: Final = 1.0
"""Seconds in which the page has read the last changes."""
IDLE: Final = 5.0
"""Seconds for which the demo counts queries while nothing happens."""
PATIENCE: Final = 60.0
"""Seconds without anything new after which the demo gives up."""


def play(
    console: Console,
    runs: int,
    size: int,
    *,
    keep: bool,
    sites: Path,
    opened: Callable[[str], object] | None,
) -> tuple[dict[str, Any], bool]:
    """Play with so many runs of `size` bytes; return the summary, and whether all went well.

    `sites` is a sites.json with the site `BIRTH`. `opened` is called with the address of the page,
    once it is served.

    Raises `ConfigError` if that is wrong, or the disk has too little room.
    """
    load_sites(sites).get(BIRTH)
    with (
        ended_by_signals() as tidying_up,
        tempfile.TemporaryDirectory(prefix="caxev-demo-") as directory,
    ):
        _check_room(directory, runs * size)
        with World(Path(directory), sites, tape=True) as world:
            show = Show(console, world, opened)
            try:
                summary = run(_main, world, show, runs, size, keep)
            finally:
                tidying_up()
    show.summary(summary)
    ends = {**wanted(world, runs), "back_from_tape": 1, "purged": 1}
    complete = all(summary[name] == count for name, count in ends.items())
    return summary, complete and not summary["reactions"]["failed"]


def _check_room(directory: str, size: int) -> None:
    # Each run exists several times (at the sites, on tape and restored), and the database takes its
    # own space. A disk that fills up would end the demo with an error far from its cause.
    needed, free = int(size * 5.5) + (1 << 30), shutil.disk_usage(directory).free
    if free < needed:
        raise ConfigError(
            f"{directory} has {free >> 20} MiB free and the demo needs {needed >> 20}: "
            "ask for less by --runs or --size-mb, or name another place by TMPDIR"
        )


def wanted(world: World, runs: int) -> dict[str, int]:
    """Return the expected number of copies of each kind, by their names in the summary."""
    sites = world.sites.values()
    return {
        "verified": runs * len(world.listening),
        "on_tape": runs * (len(sites) - len(world.listening)),
        **{kind: runs * sum(kind in site.made for site in sites) for kind in derived(world)},
    }


def derived(world: World) -> list[str]:
    """Return the types of data that sites may make from others, in the order of their making."""
    types = world.sites.types
    return sorted(types.derived, key=types.order)


@contextmanager
def ended_by_signals() -> Iterator[Callable[[], None]]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, for which trio unwinds its tasks.

    The process then ends with the signal's status. Call what is yielded when only the clean-up is
    left: from then on signals are ignored, as they are after the first SIGTERM or SIGHUP.
    """
    asked: list[int] = []

    def leave(number: int, _frame: object) -> None:
        # Only once: a second KeyboardInterrupt would hit the clean-up of the first.
        if not asked:
            asked.append(number)
            signal.raise_signal(signal.SIGINT)

    def pass_over() -> None:
        for number in former:
            signal.signal(number, lambda _number, _frame: None)

    handlers: dict[int, Any] = {signal.SIGTERM: leave, signal.SIGHUP: leave}
    handlers[signal.SIGINT] = signal.default_int_handler  # a shell's background jobs ignore it
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield pass_over
    except KeyboardInterrupt:
        if not asked:
            raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if asked:
        sys.exit(128 + asked[0])


@define(eq=False)
class Show:
    """Output for people; the page shows all of it at once."""

    console: Console
    world: World
    opened: Callable[[str], object] | None = None
    _told: set[tuple[str, str, str]] = field(init=False, factory=set)

    def say(self, text: str) -> None:
        """Print a line."""
        # Without soft wrap, rich would break lines in a pipe at 80 characters.
        self.console.print(text, highlight=False, soft_wrap=True)

    def page(self, address: str | None) -> None:
        """Print where the page is, and open it if that was asked for."""
        self.say(f"The page: {address}" if address else "No page: pip install 'caxev[web]'")
        if address and self.opened is not None:
            self.opened(address)

    def lines(self, runs: Sequence[Run]) -> None:
        """Print a line for each change since the last call."""
        for one in runs:
            for copy in one.copies:
                what = "" if copy.type == "raw" else f" {copy.type}"
                news = (f"{one.name}{what}", copy.host, copy.status)
                if news not in self._told:
                    self._told.add(news)
                    self.say(f"{utcnow():%H:%M:%S} {news[0]} {copy.host}: {copy.status}")

    def forget(self, name: str, host: str) -> None:
        """Report this copy again, as a new one."""
        self._told = {news for news in self._told if news[:2] != (name, host)}

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Print the result."""
        reactions, latency = summary["reactions"], summary["latency_ms"]
        self.say(
            f"{summary['runs']} runs: {summary['copies']} copies, {summary['verified']} verified, "
            f"{summary['on_tape']} on tape, {summary['back_from_tape']} back from it, "
            f"{summary['processed']} processed, "
            + "".join(f"{summary[kind]} with {kind}, " for kind in derived(self.world)[1:])
            + f"in {summary['seconds']} s; "
            f"{summary['purged']} purged"
        )
        self.say(
            f"reactions: {reactions['done']} done, {reactions['failed']} failed, "
            f"{reactions['pending']} pending; from change to handler {latency['p50']} ms (median), "
            f"{latency['p99']} ms (p99: those that waited for a place in a full lane)"
        )
        asked = summary["runs_queries_while_idle"]
        self.say(f"queries to the runs collection in {IDLE:.0f} s of idling: {asked}")


def good(copy: Copy) -> bool:
    """Return whether a copy has reached its good final state."""
    return copy.status == TRANSFERRED


async def _main(world: World, show: Show, count: int, size: int, keep: bool) -> dict[str, Any]:
    async with aio.loop(), open_database(world.settings) as database:
        await prepare(database)
        show.say(f"MongoDB at {world.mongod.uri}; sites: {', '.join(world.sites)}")
        for site in world.listening:
            world.listen(site)
        page = await trio.to_thread.run_sync(world.serve_page)
        await _listening(world, database)
        show.page(page)
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_take_data, world, database, count, size)
            await _watch(world, show, database, count)
            await _lose(show, database)
            await _watch(world, show, database, count)
            nursery.cancel_scope.cancel()
        seconds = time.monotonic() - began
        summary = await _summary(world, database, seconds)
        summary["purged"] = await _purge(world, show, database)
        if keep:
            await _keep(world, show)
        return summary


async def _listening(world: World, database: Database) -> None:
    """Wait until every listener has found its place in the stream."""
    with trio.fail_after(PATIENCE):
        while True:
            # Runs that are stored before would be found by a listener's scan at its start, and not
            # by events: the demo would measure the latency of the scan.
            _check_alive(world)
            records = await database.site_records()
            ready = {one.site for one in records if one.active and one.position is not None}
            if ready >= set(world.listening):
                return
            await trio.sleep(0.05)


def _check_alive(world: World) -> None:
    for site, process in world.listeners.items():
        if process.poll() is not None:
            log = (world.directory / "logs" / f"{site}.log").read_text().strip().splitlines()
            last = log[-1] if log else ""
            raise GiveUp(f"the listener of {site} ended: {last}")


async def _take_data(world: World, database: Database, count: int, size: int) -> None:
    for number in range(1, count + 1):
        document = await trio.to_thread.run_sync(world.take_run, BIRTH, number, size, number)
        # Else the rules would purge the first copies while the demo still counts them.
        document["tags"] = [{"name": PROTECTED}]
        await database.insert_run(document)


async def _lose(show: Show, database: Database) -> None:
    """Delete a copy at the site that can take it from tape again, as a person might."""
    for one in (await database.select(Selection(), utcnow()))[:1]:
        lost = one.copy(CopyKey("raw", BIRTH))
        if lost is None or lost.location is None:
            continue
        await trio.to_thread.run_sync(shutil.rmtree, lost.location)
        # Without a tombstone: a lost copy must come back, a deleted one must not.
        deed = Deed(what=What.FORGOTTEN, reason="its files were lost", by=PERSON)
        row = HistoryRow(at=utcnow(), site=BIRTH, deed=deed, aspect=lost.key, **of_run(one))
        await database.write_asked([(RunUpdate.remove_copy(one, lost), row)], utcnow())
        show.forget(one.name, BIRTH)
        show.say(f"{utcnow():%H:%M:%S} {one.name} {BIRTH}: deleted")


def _no_handlers(site: str) -> Registry:
    raise ConfigError(f"the handlers of {site} are not needed to tag a run")


async def _purge(world: World, show: Show, database: Database) -> int:
    """Have the first run purged at its site of birth; return how many copies were deleted."""
    gone = 0
    for one in (await database.select(Selection(), utcnow()))[:1]:
        asker = Asker(database, world.sites, _no_handlers, PERSON)
        await asker.carry_out_one(TagRuns(PROTECTED, remove=True), one.id)
        show.say(f"{utcnow():%H:%M:%S} {one.name} is no longer tagged {PROTECTED}")
        with trio.move_on_after(PATIENCE):
            while (now := (await database.runs([one.id]))[one.id]).copy(CopyKey("raw", BIRTH)):
                _check_alive(world)
                show.lines([now])
                await trio.sleep(0.2)
            gone += 1
        await _show_history(world, show, one)
    return gone


async def _show_history(world: World, show: Show, one: Run) -> None:
    """Print a run's history, as ``caxev explain --timeline`` does."""
    words = ["explain", "--run", str(one.number), "--timeline"]
    show.say(f"\ncaxev {' '.join(words)}")
    shown = await trio.run_process(
        [sys.executable, "-m", "caxev", *words],
        env={**os.environ, **world.environment},
        capture_stdout=True,
        check=False,
    )
    show.say(shown.stdout.decode())


async def _watch(world: World, show: Show, database: Database, count: int) -> None:
    """Show progress until every copy has reached its final state and nothing is running."""
    state: object = None
    deadline = trio.current_time() + PATIENCE
    while True:
        _check_alive(world)
        runs = await database.select(Selection(), utcnow())
        reactions = await _unfinished(database)
        show.lines(runs)
        if _finished(runs, sum(wanted(world, count).values())) and not reactions:
            return
        progress = [document.get("progress") for _, document in reactions]
        now = ([[c.seen_as for c in one.copies] for one in runs], progress)
        if now != state:
            state, deadline = now, trio.current_time() + PATIENCE
        elif trio.current_time() > deadline:
            show.say(f"nothing has happened for {PATIENCE:.0f} s: giving up")
            for reaction, _ in reactions:
                show.say(f"    unfinished: {_described(reaction)}")
            return
        await trio.sleep(0.2)


def _finished(runs: Sequence[Run], wanted: int) -> bool:
    ends = [copy for one in runs for copy in one.copies if copy.status in (TRANSFERRED, ERROR)]
    return len(ends) >= wanted


async def _settled(database: Database) -> None:
    """Wait until nothing runs and nothing is due soon."""
    while True:
        # Before the look: the last changes may not have come to all listeners yet.
        await trio.sleep(SETTLING)
        if not await _unfinished(database):
            return


async def _unfinished(database: Database) -> list[tuple[Reaction, dict[str, Any]]]:
    """Return the reactions that run or are due soon; others wait for a time, such as an age."""
    soon = utcnow() + timedelta(seconds=PATIENCE)
    return [
        found
        for state in ("pending", "running")
        for found in await database.reactions(state=state, limit=1000)
        if found[0].due <= soon
    ]


def _described(reaction: Reaction) -> str:
    about = f"{reaction.site}: {reaction.handler} of {reaction.run}, {reaction.event}"
    return f"{about}: {reaction.state} since {reaction.at}, due {reaction.due}: {reaction.note}"


async def _summary(world: World, database: Database, seconds: float) -> dict[str, Any]:
    with trio.move_on_after(PATIENCE):
        await _settled(database)
    runs = await database.select(Selection(), utcnow())
    copies = [copy for one in runs for copy in one.copies]
    everywhere = [copy for copy in copies if copy.type == "raw"]
    raw = [copy for copy in everywhere if copy.host in world.listening]
    tally = await database.tally()
    pages = [page async for page in database.history_pages(HistorySearch())]
    done = [row for page in pages for row in page if row.event is not None]
    waits = [1000 * row.waited for row in done if row.waited is not None]
    # Counted by the server itself, while all listeners idle: an event-driven program makes none.
    before = await trio.to_thread.run_sync(_queries, world)
    await trio.sleep(IDLE)
    after = await trio.to_thread.run_sync(_queries, world)
    return {
        "runs": len(runs),
        "copies": len(raw),
        "verified": sum(map(good, raw)),
        "on_tape": sum(map(good, everywhere)) - sum(map(good, raw)),
        "back_from_tape": sum(good(copy) and copy.source == TAPE for copy in raw),
        **{kind: sum(one.type == kind and good(one) for one in copies) for kind in derived(world)},
        "reactions": {
            "done": len(done),
            "failed": sum(states.get("failed", 0) for states in tally.values()),
            "pending": sum(
                states.get("pending", 0) + states.get("running", 0) for states in tally.values()
            ),
        },
        "seconds": round(seconds, 1),
        "latency_ms": {"p50": _quantile(waits, 50), "p99": _quantile(waits, 99)},
        "runs_queries_while_idle": after - before,
    }


def _queries(world: World) -> int:
    settings = world.settings
    return world.mongod.queries(f"{settings.database}.{settings.collection}")


def _quantile(values: Sequence[float], percent: int) -> float | None:
    if len(values) < 2:  # noqa: PLR2004  # no quantile of fewer
        return round(values[0], 1) if values else None
    return round(statistics.quantiles(values, n=100)[percent - 1], 1)


async def _keep(world: World, show: Show) -> None:
    show.say("kept running until Ctrl-C. In another terminal:")
    for name, value in world.environment.items():
        show.say(f"    export {name}='{value}'")
    show.say("    caxev status")
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        async for _ in signals:
            return
