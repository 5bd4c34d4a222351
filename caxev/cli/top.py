"""Run ``caxev top``: what all sites do, live in a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from caxev.cli.command import command
from caxev.cli.options import as_text, options

if TYPE_CHECKING:
    from caxev.database import Database


@command("caxev top", "caxev top --once", output=as_text)
@click.option(
    "--once",
    is_flag=True,
    help="Print one picture, once all runs are read, and leave; so it does in a pipe.",
)
def top(*, once: bool) -> None:
    """Show what all sites do, live: what is wrong, what moves, and what failed.

    It follows the changes of the database, as the page does, and writes nothing. Ctrl-C ends it.
    """
    sites = options().sites()

    async def show(database: Database) -> None:
        from caxev.web import terminal

        # Who reads a pipe would wait for the second picture for ever.
        await terminal.show(database, sites, once=once or not sys.stdout.isatty())

    options().with_database(show)
