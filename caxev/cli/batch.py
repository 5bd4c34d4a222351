"""Define ``caxev batch`` and ``receive`` for their help only.

`caxev.__main__` runs them without importing this module: machines start them, and wait for them.
"""

from __future__ import annotations

import sys

import click

from caxev.cli.options import example


@click.command(
    hidden=True,
    short_help="Run or watch a job; started by a batch system.",
    epilog=example("caxev batch run /data/jobs/groups/process.3fa2c1 3"),
    context_settings={"allow_extra_args": True},
    options_metavar="run GROUP | watch GROUP NUMBER ID SYSTEM",
)
@click.pass_context
def batch(context: click.Context) -> None:
    """Run a job that was filed in a directory, or report the end of one that was killed.

    A batch system starts this at its nodes, where caxev must be installed at the same path as
    here and find the runs database by its environment. It is not for people.
    """
    from caxev.batch.runner import main

    sys.exit(main(context.args))


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
