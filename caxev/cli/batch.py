"""Define ``caxev batch`` for its help only.

`caxev.__main__` runs it without importing this module: it starts with each job and must be quick.
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
