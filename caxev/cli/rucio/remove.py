"""Run ``caxev rucio rm``, ``forget`` and ``purge``: remove datasets, entries, copies on disk."""

from __future__ import annotations

import click

from caxev.asking.catalogues import FreeDisk, GiveUpDatasets
from caxev.asking.deletions import ForgetCopies
from caxev.asking.listeners import listening_sites
from caxev.cli.command import command
from caxev.cli.options import options
from caxev.cli.plans import WHY, Ask, acts
from caxev.cli.rucio.chosen import CatalogueChoice, rucio, selects_catalogue
from caxev.cli.values import SITE, STATUS


@command("caxev rucio rm --run 123 --why 'taken in error'", group=rucio)
@selects_catalogue(status=True)
@WHY
@acts("Show what would be deleted, or why not.")
def rm(*, chosen: CatalogueChoice, why: str, ask: Ask) -> None:
    """Give up datasets, so that the catalogue deletes all replicas.

    Like `caxev rm`: the site that uploaded a dataset has the other copies read again first, and
    gives it up only if that proves enough of them good (`deletion` of the catalogue in
    sites.json). Until then `caxev rm --site CATALOGUE --cancel` withdraws it.
    """
    act = GiveUpDatasets(chosen.there.name, chosen.data, why)
    ask(chosen.choice, act)


@command("caxev rucio forget --run 123 --status error --why 'never uploaded'", group=rucio)
@selects_catalogue()
@click.option("--status", type=STATUS, help="Only entries with this status.")
@WHY
@acts("Show what would be removed; write nothing.", few=0)
def forget(*, chosen: CatalogueChoice, status: str | None, why: str, ask: Ask) -> None:
    """Remove entries of the catalogue; its datasets stay.

    Only `caxev rucio put` uploads such data again.
    """
    act = ForgetCopies(chosen.there.name, chosen.data, why, status)
    ask(chosen.choice, act)


@command("caxev rucio purge --site lngs --run 1-1000 --dry-run", group=rucio)
@selects_catalogue(status=True)
@click.option("--site", type=SITE, required=True, help="The site whose copies are deleted.")
@acts("Show what would be deleted, or why not.")
def purge(*, chosen: CatalogueChoice, site: str, ask: Ask) -> None:
    """Delete copies on disk that the catalogue has, too.

    Like `caxev rm`, for many runs: the site's listener deletes a copy only if enough others are
    proved good. If the replicas of a dataset were never compared, that is requested first.
    """
    listening_sites(options().sites(), site)
    act = FreeDisk(site, chosen.data, chosen.there.name)
    ask(chosen.choice, act)
