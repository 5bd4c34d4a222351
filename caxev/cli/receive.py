"""Define ``caxev receive`` for its help only.

`caxev.__main__` runs it without importing this module, because another site waits for its start.
"""

from __future__ import annotations

import sys

import click

from caxev.cli.options import example


@click.command(
    short_help="The remote end of a transfer, started over SSH.",
    epilog=example("ssh xe1t@chicago caxev receive --root /data/raw"),
)
@click.option(
    "--root",
    "roots",
    multiple=True,
    metavar="DIR",
    help="Act only inside this directory; may be repeated.",
)
def receive(roots: tuple[str, ...]) -> None:
    """Take or give one copy over standard input and output.

    Another site's caxev starts this over SSH if sites.json names it in `receiver`. It is not
    for people.
    """
    from caxev.transfer.receive import serve

    sys.exit(serve(roots))
