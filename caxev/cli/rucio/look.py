"""Run ``caxev rucio locate`` and ``check``: list entries, and compare them with the catalogue."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import define, field

from caxev.asking.asker import CHANGED
from caxev.cli.command import command, excludes
from caxev.cli.options import options
from caxev.cli.output import Column, columns, show, stream
from caxev.cli.rucio.chosen import (
    CatalogueChoice,
    apply_rules,
    checked,
    rucio,
    selects_catalogue,
)
from caxev.cli.runs import shown
from caxev.cli.values import STATUS
from caxev.core.clock import utcnow
from caxev.core.errors import GiveUp, Retry
from caxev.core.model import ERROR, TRANSFERRED, Copy, Run, new_id
from caxev.core.selection import at_host
from caxev.core.update import FieldIs, RunUpdate
from caxev.files import to_nobody

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.database import Database
    from caxev.rucio.orders import DatasetState, Verdict


@command("caxev rucio locate --since 30d --rse NIKHEF_USERDISK --copies 1", group=rucio)
@excludes("--method=absent", "--rse --copies --status")
@selects_catalogue()
@click.option("--rse", multiple=True, metavar="R", help="Only data at this RSE; may be repeated.")
@click.option("--copies", type=click.IntRange(0), metavar="N", help="Only data at N RSEs.")
@click.option("--status", type=STATUS, help="Only entries of this status.")
@click.option(
    "--method",
    type=click.Choice(("entries", "rules", "absent")),
    default="entries",
    show_default=True,
    help="List entries, their rules, or runs without an entry.",
)
def locate(
    *,
    chosen: CatalogueChoice,
    rse: tuple[str, ...],
    copies: int | None,
    status: str | None,
    method: str,
) -> None:
    """List where the catalogue has runs, as the database knows it."""

    async def rows(database: Database) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(chosen.choice.whole(database)) as runs:
            async for run in runs:
                for row in located(chosen, run, method):
                    is_meant = {*rse} <= {*row["rse"]} and status in (None, row["status"])
                    if is_meant and copies in (None, len(row["rse"])):
                        yield row

    columns = _PLACES if method != "rules" else (*_PLACES, Column("rule", "RULE"))
    stream(columns, "no such run", rows)


_PLACES: Final = columns("run", Column("run.name", "NAME", minor=1), "status", "rse", "location")


def located(chosen: CatalogueChoice, run: Run, method: str) -> Iterator[dict[str, Any]]:
    """Return the rows about one run. Pure."""
    from caxev.rucio.changes import RuleState

    entry = chosen.entry(run)
    row: dict[str, Any] = {"run": shown(run)}
    row |= {"status": None, "rse": [], "location": None}
    if entry is None:
        if method == "absent":
            yield row
        return
    # cax wrote some of these fields in other shapes.
    row |= {"status": entry.status, "location": entry.location, "rse": [*entry.rse]}
    if method == "entries":
        yield row
    for one in entry.rule_info if method == "rules" else ():
        yield {**row, "rule": str(RuleState.from_row(one) or one)}


@command("caxev rucio check --since 7d --deep", "caxev rucio check --run 5", group=rucio)
@selects_catalogue()
@click.option("--deep", is_flag=True, help="Ask the storage of every RSE for sizes and checksums.")
@click.option("--all", "everything", is_flag=True, help="Look for datasets without a run, too.")
@click.option("--repair", is_flag=True, help="Upload again what is missing; declare bad replicas.")
def check(*, chosen: CatalogueChoice, deep: bool, everything: bool, repair: bool) -> None:
    """Compare the database with the catalogue, both ways.

    Reports what is missing, duplicated or different. Exit code 1 if there is a difference.
    """
    comparing = CatalogueComparison(chosen, deep=deep, repair=repair)
    rows = options().with_asker(comparing.run, everything=everything)
    show(_DIFFERENCES, rows, empty="0 differences", failed=bool(rows))


_DIFFERENCES: Final = columns("run", "location", "problem", "repair")


@define
class CatalogueComparison:
    """One comparison; it collects a row for each difference."""

    chosen: CatalogueChoice
    deep: bool = False
    repair: bool = False
    rows: list[dict[str, Any]] = field(factory=list)

    async def run(self, asker: Asker, *, everything: bool) -> list[dict[str, Any]]:
        """Compare, and repair if that was requested."""
        import trio

        from caxev.rucio import client

        async with aclosing(self.chosen.choice.whole(asker.database)) as runs:
            async for run in runs:
                for entry in self.chosen.entries(run):
                    await self._compare(asker, run, entry)
        if everything:
            there = self.chosen.there
            list_all = trio.to_thread.run_sync
            datasets = await list_all(lambda: client.datasets(there))
            # After the catalogue was listed: an upload meanwhile has its entry first, so its
            # dataset is not reported as unknown.
            known = await self._known(asker)
            for dataset in datasets:
                if self.chosen.means(dataset.name) and str(dataset) not in known:
                    self._note(None, str(dataset), "no run has this dataset")
        return self.rows

    async def _known(self, asker: Asker) -> set[str]:
        """Return the datasets of all runs, not only of the selected ones."""
        name = self.chosen.there.name
        return {
            str(one.location)
            async for page in asker.database.pages(at_host(name), utcnow())
            for run in page
            for one in run.copies
            if one.host == name
        }

    def _note(
        self, run: Run | None, location: str | None, problem: str, repair: str | None = None
    ) -> None:
        name = None if run is None else shown(run)
        self.rows.append({"run": name, "location": location, "problem": problem, "repair": repair})

    async def _compare(self, asker: Asker, run: Run, entry: Copy) -> None:
        import trio

        from caxev.rucio import client
        from caxev.rucio.names import Did

        there = self.chosen.there
        if (entries := sum(one.key == entry.key for one in run.copies)) > 1:
            problem = f"{entries} entries for one dataset"
            self._note(run, entry.location, problem, await self._single(asker, run, entry))
        if entry.status != TRANSFERRED:
            repair = await self._again(asker, run, entry)
            self._note(run, entry.location, f"the entry is {entry.status}", repair)
            return
        files = await checked(asker.database, entry)
        if files is None:
            why = "its files' checksums are unknown: its site compares them on request (--repair)"
            self._note(run, entry.location, why, await self._ask(asker, run, entry))
            return
        dataset = Did.of(entry.location)
        compare, ask = trio.to_thread.run_sync, client.verify
        try:
            verdict = await compare(lambda: ask(there, dataset, files, self.deep, report=to_nobody))
            found = await compare(lambda: client.look(there, dataset))
        except Retry as error:  # the server is away: no statement about the dataset
            self._note(run, entry.location, error.why)
            return
        except GiveUp as error:
            self._note(run, entry.location, error.why, await self._again(asker, run, entry))
            return
        await self._judge(asker, run, entry, verdict, found)

    async def _judge(
        self, asker: Asker, run: Run, entry: Copy, verdict: Verdict, found: DatasetState
    ) -> None:
        # With a good replica Rucio itself can replace the bad ones. Without one, somebody must
        # upload again; and replicas that could not be read matter only then.
        lines = (*verdict.bad, *(() if verdict.good else verdict.unseen))
        repair = None
        if lines and verdict.good:
            repair = await self._declare(entry, verdict)
        elif verdict.bad:  # but not for unreadable replicas alone: they may be good
            repair = await self._again(asker, run, entry)
        for line in lines:
            self._note(run, entry.location, line, repair)
        if problems := differing(entry, found):
            repair = await self._look(asker, run)
            for problem in problems:
                self._note(run, entry.location, problem, repair)

    async def _declare(self, entry: Copy, verdict: Verdict) -> str | None:
        """Have Rucio replace bad replicas by copies of the good ones."""
        import trio

        from caxev.rucio import client
        from caxev.rucio.names import Did

        if not self.repair or not verdict.replicas:
            return None
        dataset, there = Did.of(entry.location), self.chosen.there
        why = await trio.to_thread.run_sync(client.declare_bad, there, dataset, verdict.replicas)
        return f"not declared bad: {why}" if why else "declared bad: Rucio replaces it"

    async def _single(self, asker: Asker, run: Run, entry: Copy) -> str | None:
        """Remove all entries of a dataset but the best one, if they all name that dataset."""
        if not self.repair:
            return None
        data = without_doubles(run, entry)
        if data is None:
            return "not repaired: they name several datasets"
        # The whole array is written, as doubles have the same key. So expect it as it was read.
        as_seen = FieldIs("data", run.document["data"])
        update = RunUpdate.overwrite(run, as_seen, data=data)
        return await _written(asker, update, "one entry is left")

    async def _again(self, asker: Asker, run: Run, entry: Copy) -> str | None:
        """Have a site with a good copy upload again."""
        if not self.repair or entry.status not in (TRANSFERRED, ERROR, "RSEreupload"):
            return None
        update = RunUpdate.change_copy(
            run, entry, "RSEreupload", trigger=None, owner=None, checksumproblem=None
        )
        return await _written(asker, update, "will be uploaded again")

    async def _ask(self, asker: Asker, run: Run, entry: Copy) -> str | None:
        """Have the site that is responsible for the entry compare all replicas."""
        if not self.repair:
            return None
        update = RunUpdate.ask(run, entry, new_id(), utcnow())
        return await _written(asker, update, "its site compares it")

    async def _look(self, asker: Asker, run: Run) -> str | None:
        """Have the site that is responsible for the entry check it again."""
        if not self.repair:
            return None
        asked = await apply_rules(asker, self.chosen, [run])
        return f"{_listed(asked)} compares it again" if asked else "no site uploads there"


async def _written(asker: Asker, update: RunUpdate, done: str) -> str:
    return CHANGED if await asker.database.update_run(update, utcnow()) is None else done


def differing(entry: Copy, found: DatasetState) -> list[str]:
    """Return how the catalogue's RSEs and rules differ from those in an entry, a line each. Pure.

    Only rules that keep the data forever count, since others end.
    """
    from caxev.rucio.changes import ENDED, recorded_in

    lines = []
    if tuple(found.rses) != entry.rse:
        places = _listed(found.rses), _listed(entry.rse)
        lines.append("at {} in the catalogue, at {} in the database".format(*places))
    lasting = {one.id for one in found.rules if one.expires is None and one.state != ENDED}
    known = (one for one in recorded_in(entry) if one.expires is None and one.state != ENDED)
    lines += [
        f"its rule at {one.rse} was deleted, or has got an end"
        for one in known
        if one.id not in lasting
    ]
    return lines


def without_doubles(run: Run, entry: Copy) -> list[Any] | None:
    """Return a run's ``data`` with only the best entry of this copy; None if they name several."""

    def is_its(one: object) -> bool:
        found = Copy.from_entry(one)
        return found is not None and found.key == entry.key

    data: list[Any] = run.document["data"]
    ours = [one for one in data if is_its(one)]
    if len({one.get("location") for one in ours} - {None, "n/a"}) > 1:
        return None
    # Entries without a location are leftovers of an upload: they name no other dataset.
    best = max(ours, key=lambda one: (one.get("status") == TRANSFERRED, bool(one.get("rse"))))
    return [one for one in data if one is best or not is_its(one)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "no RSE"
