"""Run ``caxev rucio rules``: check a rule file, explain it, have it applied."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import click

from caxev.cli.command import RUNS, command, excludes, needs
from caxev.cli.options import options
from caxev.cli.output import Column, columns, show_lines, stream
from caxev.cli.rucio.chosen import CatalogueChoice, apply_rules, rucio, selects_catalogue
from caxev.cli.runs import shown
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.model import Copy, Run

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.database import Database


@command(
    "caxev rucio rules --check rules.json",
    "caxev rucio rules --run 100-200 --dry-run",
    "caxev rucio rules --apply --since 30d",
    group=rucio,
)
@excludes("--check", "--apply")
@needs(f"{RUNS} --type --version --catalogue", "--dry-run --apply")
@needs("--wide", "--dry-run")
@selects_catalogue(required=False)
@click.option("--check", "file", metavar="FILE", help="Check this rule file.")
@click.option("--dry-run", is_flag=True, help="Show which rules apply to each run.")
@click.option("--apply", "applying", is_flag=True, help="Have the listeners apply the rules again.")
def rules(*, chosen: CatalogueChoice, file: str | None, dry_run: bool, applying: bool) -> None:
    """Check a rule file, explain it for runs, or apply it again.

    Listeners apply the rules by themselves, to runs that change and when the file has changed.
    --apply asks the catalogue again even if nothing has changed.
    """
    from caxev.rucio.rules import load_rules

    if file is not None and not dry_run:
        loaded = load_rules(file)
        show_lines(
            [{"file": file, "rules": len(loaded)}], "{file}: {rules} rules, all valid".format_map
        )
        return
    if dry_run == applying:
        raise click.UsageError("give one of --check FILE, --dry-run and --apply")
    chosen.choice.require()
    path = file or chosen.there.rucio.rules
    loaded = load_rules(path) if path else ()
    if applying:
        row = options().with_asker(_apply, chosen)
        show_lines(
            [row], lambda row: f"{row['runs']} runs: requested from {', '.join(row['sites'])}"
        )
        return
    stream(_RULES, "no run is in the catalogue", _explain, chosen, loaded)


_RULES: Final = columns(
    "run",
    "wanted",
    "removed",
    Column("change", "TO BE DONE"),
    Column("unmet", "RULES THAT DO NOT APPLY"),
)


async def _explain(
    database: Database, chosen: CatalogueChoice, loaded: Sequence[Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """Return what the rules demand for each run, and what would be done, by its entry."""
    async with aclosing(chosen.choice.whole(database)) as runs:
        async for run in runs:
            if (entry := chosen.entry(run)) is not None:
                yield explained(chosen, run, entry, loaded)


def explained(
    chosen: CatalogueChoice, run: Run, entry: Copy, loaded: Sequence[Any]
) -> dict[str, Any]:
    """Return one row of the explanation. Pure except for the time."""
    from caxev.rucio.changes import ENDED, changes, recorded_in, wishes_for

    there = chosen.there
    # The RSEs of sites.json are kept, too, unless a rule decides otherwise.
    always = [rse for rse in (there.rucio_upload_rse, *there.rucio_transfer) if rse]
    wishes = wishes_for(loaded, run, entry.key, always=always)
    standing = recorded_in(entry)
    change = changes(
        wishes,
        [one for one in standing if one.state != ENDED],
        [one for one in standing if one.state == ENDED],
        run_name=run.name or str(run),
        now=utcnow(),
    )
    unmet = [f"{one.label}: {why}" for one in loaded if (why := one.unmet(run, entry.key))]
    wanted = [f"{' or '.join(one.rses)} ({one.rule})" for one in wishes.keep]
    if wishes.only_verify:
        wanted = [f"only compared ({wishes.only_verify})"]
    return {
        "run": shown(run),
        "wanted": wanted,
        "removed": [f"{rse} ({rule})" for rse, rule in wishes.remove.items()],
        "change": str(change),
        "unmet": unmet,
    }


async def _apply(asker: Asker, chosen: CatalogueChoice) -> dict[str, Any]:
    runs = [run async for run in chosen.choice.whole(asker.database) if chosen.entry(run)]
    if not runs:
        raise NothingToDo("no run is in the catalogue")
    asked = await apply_rules(asker, chosen, runs)
    if not asked:
        raise NothingToDo("no site uploads to the catalogue")
    return {"runs": len(runs), "sites": asked}
