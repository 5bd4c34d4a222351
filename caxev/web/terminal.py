"""The first view as a terminal shows it, for ``caxev top``."""

from __future__ import annotations

from typing import Final

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from caxev.config import Sites
from caxev.core.amounts import lasting, size
from caxev.core.escapes import escaped
from caxev.core.ledger import State
from caxev.database import Database
from caxev.web.feeder import Feeder, Heard
from caxev.web.lights import Level
from caxev.web.now import site_row
from caxev.web.reasons import grouped
from caxev.web.scene import HEADLINES, Scene, numbers, work
from caxev.web.state import LiveState

SECONDS: Final = 1.0
"""Between two pictures."""
ROWS: Final = 12
"""Rows of what is in progress, and of reasons."""
COLOURS: Final = {"good": "green", "warn": "yellow", "bad": "red", "off": "dim"}


async def show(database: Database, sites: Sites, *, once: bool) -> None:
    """Show what all sites do until cancelled; with `once`, one picture once all runs are read."""
    scene, console, ready = Scene(LiveState(), sites), Console(), trio.Event()

    def heard(_: Heard) -> None:
        if scene.state.health.pass_done is None:
            ready.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Feeder(database, scene.state, heard).run)
        if once:
            await ready.wait()
            console.print(picture(scene))
            nursery.cancel_scope.cancel()
            return
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                live.update(picture(scene), refresh=True)
                await trio.sleep(SECONDS)


def picture(scene: Scene) -> Group:
    """Return everything that is shown."""
    counts = "   ".join(f"{one.value:,} {one.name}" for one in numbers(scene.state))
    parts: list[RenderableType] = [
        _headline(scene),
        Text(counts),
        Text(),
        _sites(scene),
        Text(),
        _progress(scene),
    ]
    return Group(*parts, *_failures(scene))


def _headline(scene: Scene) -> Text:
    health = scene.state.health
    if health.trouble is not None:
        since, why = health.trouble
        words = f"The database cannot be read since {since:%H:%M:%S} UTC: {why}"
        return Text(escaped(words), style="bold red")
    if health.pass_done is not None:
        return Text(f"Reading the runs: {health.pass_done:,} of about {health.pass_total:,}")
    worst = max((scene.light(site).level for site in scene.names), default=Level.GOOD)
    return Text(HEADLINES[worst], style=f"bold {COLOURS[worst.icon]}")


def _sites(scene: Scene) -> Table:
    names = (
        "SITE",
        "RUNNING",
        "WAITING",
        "FAILED",
        "OLDEST",
        "FREE",
        "FULL IN",
        "VERSION",
        "STATE",
    )
    table = _table(*names)
    for site in scene.names:
        one = site_row(scene, site)
        counts = (f"{number:,}" for number in (one.running, one.pending, one.failed))
        oldest = "" if one.oldest is None else lasting((scene.now - one.oldest).total_seconds())
        disk = one.disk
        free, full = ("", "") if disk is None else (size(disk.free), disk.full_in)
        words = "; ".join(why for level, why in one.light.reasons if level == one.light.level)
        state = Text(escaped(words), style=COLOURS[one.light.level.icon])
        version = escaped(one.version) + (f" +{one.standby}" if one.standby else "")
        table.add_row(Text(escaped(site)), *counts, oldest, free, full, Text(version), state)
    return table


def _progress(scene: Scene) -> Table:
    table = _table("RUN", "WHAT", "WHERE", "PROGRESS")
    for one in work(scene.state)[:ROWS]:
        where = f"{one.source} → {one.place}" if one.source else one.place
        progress = str(one.progress or "")
        if not progress and one.since is not None:
            progress = f"for {lasting(max((scene.now - one.since).total_seconds(), 0.0))}"
        table.add_row(*(Text(escaped(cell)) for cell in (one.label, one.what, where, progress)))
    return table


def _failures(scene: Scene) -> list[Text | Table]:
    groups = grouped(scene.state.of_state(State.FAILED))
    if not groups:
        return []
    table = _table("FAILED", "HANDLER", "AT", "REASON")
    for one in groups[:ROWS]:
        cells = (f"{len(one.members):,}", one.handler, ", ".join(one.sites), one.reason)
        table.add_row(*(Text(escaped(cell)) for cell in cells))
    return [Text(), table]


def _table(*headings: str) -> Table:
    table = Table(*headings, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.header_style = "dim"
    return table
