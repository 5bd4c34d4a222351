"""Run ``caxev rucio rules``: check a rule file, explain it, have it applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from caxev.cli.errors import NothingToDo
from caxev.cli.options import as_table, example, global_options, state
from caxev.cli.output import Column, Table, print_line, show
from caxev.cli.rucio.chosen import Chosen, look_again, rucio, selecting

if TYPE_CHECKING:
    from caxev.core.model import Copy, Run
    from caxev.database import Database


@rucio.command(
    epilog=example(
        "caxev rucio rules --check rules.json",
        "caxev rucio rules --from-run 100 --to-run 200 --dry-run",
        "caxev rucio rules --apply --last-days 30",
    )
)
@selecting
@click.option("--check", "file", metavar="FILE", help="Check this rule file.")
@click.option("--dry-run", is_flag=True, help="Show which rules apply to each run.")
@click.option("--apply", "applying", is_flag=True, help="Have the listeners apply the rules again.")
@as_table
@global_options(hidden=True)
def rules(
    *, file: str | None, dry_run: bool, applying: bool, as_json: bool, **options: Any
) -> None:
    """Check a rule file, explain it for runs, or apply it again.

    Listeners apply the rules by themselves, to runs that change and when the file has changed.
    --apply asks the catalogue again even if nothing has changed.
    """
    from caxev import rucio

    state().log("warning")
    if file is not None and not (dry_run or applying):
        loaded = rucio.load_rules(file)
        print_line(f"{file}: {len(loaded)} rules, all can be used")
        return
    if dry_run == applying:
        raise click.UsageError("say one of --check FILE, --dry-run and --apply")
    chosen = Chosen.of(options)
    path = file or chosen.there.rucio.rules
    loaded = rucio.load_rules(path) if path else ()
    if applying:
        print_line(state().with_database(lambda database: _apply(database, chosen)))
        return
    rows = state().with_database(lambda database: _explain(database, chosen, loaded))
    show(Table(_RULES, rows), as_json=as_json, empty="no run is in the catalogue")


_RULES: Final = (
    Column("run", "RUN"),
    Column("wanted", "WANTED"),
    Column("removed", "REMOVED"),
    Column("change", "TO BE DONE"),
    Column("unmet", "RULES THAT DO NOT APPLY"),
)


async def _explain(
    database: Database, chosen: Chosen, loaded: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return what the rules demand for each run, and what would be done, by its entry."""
    runs = await chosen.runs(database)
    return [explained(chosen, run, entry, loaded) for run in runs if (entry := chosen.entry(run))]


def explained(chosen: Chosen, run: Run, entry: Copy, loaded: Sequence[Any]) -> dict[str, Any]:
    """Return one row of the explanation. Pure except for the time."""
    from caxev import rucio
    from caxev.cli.runs import shown
    from caxev.core.clock import utcnow

    there = chosen.there
    # The RSEs of sites.json are kept, too, unless a rule decides otherwise.
    always = [rse for rse in (there.rucio_upload_rse, *there.rucio_transfer) if rse]
    wishes = rucio.wishes_for(loaded, run, entry.key, always=always)
    known = map(rucio.RuleState.from_row, entry.rule_info)
    standing = [one for one in known if one is not None]
    change = rucio.changes(
        wishes,
        [one for one in standing if one.state != rucio.ENDED],
        [one for one in standing if one.state == rucio.ENDED],
        run_name=run.name or str(run),
        now=utcnow(),
    )
    unmet = [f"{one.label}: {why}" for one in loaded if (why := one.unmet(run, entry.key))]
    wanted = [f"{' or '.join(one.rses)} ({one.rule})" for one in wishes.keep]
    if wishes.only_verify:
        wanted = [f"only a look ({wishes.only_verify})"]
    return {
        "run": shown(run),
        "wanted": wanted,
        "removed": [f"{rse} ({rule})" for rse, rule in wishes.remove.items()],
        "change": str(change),
        "unmet": unmet,
    }


async def _apply(database: Database, chosen: Chosen) -> str:
    runs = [run for run in await chosen.runs(database) if chosen.entry(run) is not None]
    if not runs:
        raise NothingToDo("no run is in the catalogue")
    asked = await look_again(database, chosen, runs)
    if not asked:
        raise NothingToDo("no site brings data there")
    return f"{len(runs)} runs: asked {', '.join(asked)}"
