"""One site's listener until nothing is left to do, in this process or in one that is killed.

`Lab` calls `serve` for a site's turn, and `serve_apart` if the listener is to die at a crash point,
by a real SIGKILL. `main` runs in that other process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Final

import trio
from attrs import frozen

from caxev import aio
from caxev.config import Settings, Sites, load_sites
from caxev.core.clock import clock
from caxev.core.registry import Handler, Registry, recorded
from caxev.database import Database, open_database
from caxev.engine.leaving import Leaving
from caxev.engine.listener import serve_leases
from caxev.engine.options import Options
from caxev.engine.workers import Workers
from caxev.rucio.messages import Messages
from caxev.rucio.rule_files import RuleFiles

QUIET: Final = 0.03
"""Seconds without a change after which the stream counts as read; the server is on loopback."""
OWNER: Final = "lab"
_BOOT: Final = "import sys; sys.path[:] = {path!r}; from caxev.testing.serving import main; main()"


@frozen
class Bench:
    """The configuration of a lab's listeners, and the worker processes of those in this process."""

    settings: Settings
    sites: Sites
    handlers: Sequence[Handler]
    workers: Workers | None = None


async def serve(bench: Bench, database: Database, site: str) -> None:
    """Listen for a site until nothing is left to do."""
    options = Options(
        site=bench.sites.get(site),
        sites=bench.sites,
        settings=bench.settings,
        registry=Registry(bench.handlers, bench.sites.here(site)),
        once=True,
        services=(RuleFiles, Messages),
        caught_up=QUIET,
        workers=bench.workers,
    )
    await serve_leases(options, database, OWNER, Leaving())


@frozen
class ListenerEnd:
    """How a separate listener ended: whether it was killed, and the crash points it passed."""

    killed: bool
    points: tuple[str, ...]


async def serve_apart(bench: Bench, database: Database, site: str, crash: str = "") -> ListenerEnd:
    """Listen as `serve` does, in a separate process that is killed at `crash` (``POINT:N``).

    Raises RuntimeError if it neither succeeds nor is killed.
    """
    with tempfile.NamedTemporaryFile("r", prefix="caxev-points-") as log:
        armed = {"CAXEV_CRASH": crash, "CAXEV_CRASH_LOG": log.name}
        done = await trio.run_process(
            [sys.executable, "-c", _BOOT.format(path=sys.path)],
            stdin=json.dumps(_order(bench, site)).encode(),
            capture_stderr=True,
            check=False,
            env={**os.environ, **armed},
        )
        points = [line.split(" ", 1)[1] for line in log.read().splitlines()]
    killed = done.returncode == -signal.SIGKILL
    if killed:
        # So that the next turn need not wait for the dead listener's lease to run out.
        await database.release_of_dead(site)
    elif done.returncode:
        raise RuntimeError(f"the listener failed:\n{done.stderr.decode(errors='replace')}")
    # Each once, in order: handlers pass a point for every run.
    return ListenerEnd(killed, tuple(dict.fromkeys(points)))


def _order(bench: Bench, site: str) -> dict[str, object]:
    # The other process imports the handlers by name, which works only at the top of a module.
    for handler in bench.handlers:
        name = handler.function.__qualname__
        if "<" in name:
            raise TypeError(
                f"{handler.name} cannot run in a process of its own: {name} stands inside a "
                "function; move it to the top level of a module"
            )
    return {
        "uri": bench.settings.mongo_uri,
        "database": bench.settings.database,
        "sites": str(bench.sites.path),
        "site": site,
        "handlers": [[one.module, one.name] for one in bench.handlers],
        "ahead": clock.ahead.total_seconds(),
    }


def main() -> None:
    """Run the separate process, whose order is on standard input."""
    order = json.load(sys.stdin)
    clock.ahead = timedelta(seconds=order["ahead"])
    bench = Bench(
        Settings.load(mongo_uri=order["uri"], database=order["database"], environ={}),
        load_sites(Path(order["sites"])),
        [_found(module, name) for module, name in order["handlers"]],
    )

    async def listen() -> None:
        async with aio.loop(), open_database(bench.settings) as database:
            await serve(bench, database, order["site"])

    trio.run(listen)


def _found(module: str, name: str) -> Handler:
    import_module(module)
    return next(one for one in recorded if (one.module, one.name) == (module, name))
