"""Run ``caxev work``, the process that helps a site's listener on another machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from caxev.cli.command import command
from caxev.cli.options import options
from caxev.cli.processes import process_options, runs_for_years
from caxev.cli.values import SITE
from caxev.config import ConfigError
from caxev.config.errors import hint
from caxev.core.registry import Registry


@command(
    "caxev work --site lngs --lane transfer",
    "caxev work --site lngs --lane transfer --lane checksum",
    log=None,
)
@click.option("--site", type=SITE, required=True, help="The site whose listener to help.")
@click.option(
    "--lane",
    "lanes",
    multiple=True,
    required=True,
    metavar="LANE",
    help="A lane to help with; may be repeated.",
)
@runs_for_years(lease=60.0, least=3, what="How soon others take over from a helper that vanished.")
def work(*, site: str, lanes: tuple[str, ...], running: dict[str, Any]) -> None:
    """Help the listener of a site on another machine: run reactions of some of its lanes.

    The listener still records changes, and shares these lanes with its helpers; without a listener
    no reaction starts. This machine needs the site's directories, mounted at the same paths, and
    the same sites.json and handlers. Runs until SIGTERM. If it vanishes, or does not reach the
    database, other processes run its reactions.
    """
    given = options()
    given.log("info", lasting=True)
    registry = given.registry(site)
    check_lanes(lanes, registry)
    from caxev.database import run
    from caxev.engine import helping

    chosen = tuple(dict.fromkeys(lanes))
    run(helping.work, process_options(given, site, registry, running), chosen)


def check_lanes(lanes: Iterable[str], registry: Registry) -> None:
    """Raise `ConfigError` unless a helper can run all of these lanes."""
    known = {handler.lane for handler in registry.enabled}
    for name in lanes:
        if name not in known:
            what = hint(name, known, "caxev handlers lists them")
            raise ConfigError(f"no handler of this site uses the lane {name!r} ({what})")
        here = [one for one in registry.enabled if one.lane == name]
        if alone := sorted(one.name for one in here if one.exclusive):
            raise ConfigError(
                f"a helper cannot run the lane {name!r}: {', '.join(alone)} must not run while "
                "others read the same run, which only the listener can make sure"
            )
