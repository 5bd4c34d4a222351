"""Run ``caxev vouch``: let a person decide which copy is right if copies contradict each other.

The command writes a mark to that copy's entry; `caxev.handlers.judge` at each site does the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from caxev.asking.base import DataChoice, Step
from caxev.asking.vouching import VouchFor
from caxev.cli.command import command
from caxev.cli.options import as_text, options
from caxev.cli.output import print_line
from caxev.cli.selection import RunChoice, selects_data, selects_run
from caxev.cli.values import SITE

if TYPE_CHECKING:
    from caxev.asking.asker import Asker


@command("caxev vouch --run 123 --site lngs", output=as_text)
@selects_run()
@click.option("--site", type=SITE, required=True, help="The site whose copy is right.")
@selects_data
@click.option("--why", metavar="TEXT", help="The reason; caxev history shows it.")
def vouch(*, run: RunChoice, site: str, data: DataChoice, why: str | None) -> None:
    """Decide that a site's copy is the right one, if no majority of copies does.

    For copies that contradict each other. The others become bad, and are repaired from this
    one.
    """
    act = VouchFor(options().sites().get(site).name, data, why)
    print_line(options().with_asker(_done, run, act).state)


async def _done(asker: Asker, runs: RunChoice, act: VouchFor) -> Step:
    run = await runs.find_one(asker.database)
    return await asker.carry_out_one(act, run.id)
