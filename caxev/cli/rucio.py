"""``caxev rucio``: data in the catalogue, as the database and Rucio have it.

`put` and `get` write requests that the sites' listeners fulfil; `rules` checks a rule file,
explains what it means, and has listeners apply it; `check` compares the database with the catalogue
both ways; `locate` lists what the database knows; `rm` gives a dataset up, on proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from attrs import define, field

from caxev.cli.errors import FAILED, NothingToDo
from caxev.cli.options import RUN_NUMBER, as_json, example, global_options, state
from caxev.cli.output import Table, say, show
from caxev.config import ConfigError

if TYPE_CHECKING:
    from caxev.catalogue import Found, Verdict
    from caxev.cli.runs import Wanted
    from caxev.config import Site
    from caxev.model import Copy, CopyKey, Run, RunUpdate
    from caxev.mongo import Database

F = TypeVar("F", bound=Callable[..., Any])
PROOF: Final = timedelta(hours=24)
"""How fresh the comparison of other copies must be before a dataset is given up."""
OTHERS: Final = 2
"""How many other good copies there must be."""


@click.group()
def rucio() -> None:
    """Bring data to the Rucio catalogue, look after it there, and fetch it."""


def selecting(function: F) -> F:
    """Add the options that say which runs and which data are meant."""
    options = (
        click.option(
            "--run", "number", type=RUN_NUMBER, metavar="N", help="The run of this number."
        ),
        click.option("--name", metavar="X", help="The run of this name."),
        click.option("--from-run", type=RUN_NUMBER, metavar="A", help="Runs from this number on."),
        click.option("--to-run", type=RUN_NUMBER, metavar="B", help="Runs up to this number."),
        click.option(
            "--last-days",
            type=click.FloatRange(0, 36525, min_open=True),
            metavar="D",
            help="Runs that were started in the last D days.",
        ),
        click.option("--tag", metavar="T", help="Runs with this tag."),
        click.option("--detector", metavar="D", help="Only runs of this detector."),
        click.option("--type", "kind", default="raw", show_default=True, help="The type of data."),
        click.option("--version", metavar="V", help="Of derived data, this version."),
        click.option("--catalogue", metavar="C", help="The catalogue's name in sites.json."),
    )
    for one in reversed(options):
        function = one(function)
    return function


def catalogue_called(name: str | None) -> Site:
    """Return the catalogue of that name, or the only one. Raises `ConfigError`."""
    sites = state().sites()
    if name is not None:
        site = sites.get(name)
        if site.method != "rucio":
            raise ConfigError(f"site {name!r} is of method {site.method}, not rucio")
        return site
    brought = {to for one in sites.values() for to in one.upload_options}
    found = [one for one in sites.values() if one.method == "rucio"]
    found = [one for one in found if one.name in brought] or found
    if len(found) != 1:
        known = ", ".join(one.name for one in found) or "none"
        raise ConfigError(
            f"{sites.path} has {len(found)} catalogues ({known}): say which, or add one"
        )
    return found[0]


@define
class Chosen:
    """What a command line means: runs, a type and version of data, and the catalogue."""

    wanted: Wanted
    kind: str
    version: str | None
    there: Site

    @classmethod
    def of(cls, options: dict[str, Any]) -> Chosen:
        """Take the options of `selecting` out of a command's."""
        from caxev.cli.replay import _wanted

        between = (options.pop("from_run"), options.pop("to_run"))
        wanted = _wanted(
            options.pop("number"),
            options.pop("name"),
            between=between,
            last_days=options.pop("last_days"),
            tag=options.pop("tag"),
            detector=options.pop("detector"),
        )
        there = catalogue_called(options.pop("catalogue"))
        return cls(wanted, options.pop("kind"), options.pop("version"), there)

    def entry(self, run: Run) -> Copy | None:
        """The run's entry at the catalogue."""
        same = (one for one in run.copies if one.host == self.there.name and one.type == self.kind)
        return next((one for one in same if self.version in (None, one.version)), None)

    async def runs(self, database: Database) -> list[Run]:
        """Read the runs whole."""
        found = await self.wanted.find(database, database.settings)
        whole = await database.runs([run.id for run in found])
        return [whole[run.id] for run in found if run.id in whole]


# -- put and get ----------------------------------------------------------------------------------


@rucio.command(epilog=example("caxev rucio put --from-run 100 --to-run 200 --from lngs"))
@selecting
@click.option("--from", "source", required=True, metavar="S", help="The site that has the data.")
@click.option("--dry-run", is_flag=True, help="Print what would be asked for; write nothing.")
@as_json
@global_options(hidden=True)
def put(*, source: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Have runs brought into the catalogue by the listener of the site that has them.

    What waits there as RSEreupload or RSEquota is tried again at once.
    """
    state().log("warning")
    chosen, site = Chosen.of(options), state().sites().get(source)
    _request(Wish(chosen, site.name, chosen.there.name), dry_run=dry_run, as_json=as_json)


@rucio.command(epilog=example("caxev rucio get --run 123 --to chicago --rse NIKHEF_USERDISK"))
@selecting
@click.option("--to", "target", required=True, metavar="S|DIR", help="A site, or a directory here.")
@click.option("--rse", metavar="R", help="From this RSE alone.")
@click.option("--dry-run", is_flag=True, help="Print what would be fetched; write nothing.")
@as_json
@global_options(hidden=True)
def get(*, target: str, rse: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Fetch runs from the catalogue: to a site, by its listener, or to a directory here and now.

    At a site the copy is registered and verified; in a directory it is compared with the
    checksums of catalogue and database, and nobody is told of it.
    """
    state().log("warning")
    chosen = Chosen.of(options)
    if target in state().sites():
        extra = {} if rse is None else {"from_rse": rse}
        wish = Wish(chosen, chosen.there.name, target, extra)
        _request(wish, dry_run=dry_run, as_json=as_json)
        return
    if "/" not in target:
        state().sites().get(target)  # tells the nearest name
    directory = str(Path(target).absolute())
    rows = state().with_database(
        lambda database: _fetch_all(database, chosen, directory, rse, dry_run=dry_run)
    )
    _told(rows, as_json=as_json)


@define
class Wish:
    """Copies that are asked for: from which host to which; `extra` goes into their entries."""

    chosen: Chosen
    source: str
    target: str
    extra: Mapping[str, Any] = field(factory=dict)

    def request(self, run: Run) -> RunUpdate | str:
        """Return the request for one run's copy, or why there can be none."""
        from caxev.cli.replay import me
        from caxev.job import utcnow
        from caxev.model import REQUESTED, TRANSFERRED, CopyKey, RunUpdate

        kind, version = self.chosen.kind, self.chosen.version
        good = [one for one in run.copies if (one.type, one.host) == (kind, self.source)]
        good = [one for one in good if version in (None, one.version)]
        if not good or good[0].status != TRANSFERRED:
            return f"{self.source} has {f'it as {good[0].status}' if good else 'no such copy'}"
        key = CopyKey(kind, self.target, good[0].version)
        there = run.copy(key)
        if there is not None and there.status in WAITING:
            return RunUpdate.change_copy(run, there, WAITING[0], trigger=None, owner=None)
        if there is not None:
            return f"it is there already: {there.status}"
        return RunUpdate.add_copy(
            run,
            key,
            REQUESTED,
            good[0].as_seen,
            location=None,
            checksum=None,
            source=self.source,
            creation_time=utcnow(),
            creation_place=me(),
            **self.extra,
        )


WAITING: Final = ("RSEreupload", "RSEquota")
"""States of an entry whose upload is to be tried again."""


def _request(wish: Wish, *, dry_run: bool, as_json: bool) -> None:
    async def ask(database: Database) -> list[dict[str, Any]]:
        runs = await wish.chosen.runs(database)
        return [await _ask(database, wish, run, dry_run=dry_run) for run in runs]

    _told(state().with_database(ask), as_json=as_json)


async def _ask(database: Database, wish: Wish, run: Run, *, dry_run: bool) -> dict[str, Any]:
    from caxev.cli.runs import label
    from caxev.job import utcnow

    row = {"run": label(run), "what": f"{wish.chosen.kind} from {wish.source} to {wish.target}"}
    update = wish.request(run)
    if isinstance(update, str):
        return {**row, "state": update, "ok": "there already" in update}
    if dry_run:
        return {**row, "state": "would be asked for", "ok": True}
    done = await database.update_run(update, utcnow())
    state = "requested" if done is not None else "has changed meanwhile: ask again"
    return {**row, "state": state, "ok": done is not None}


async def _fetch_all(
    database: Database, chosen: Chosen, directory: str, rse: str | None, *, dry_run: bool
) -> list[dict[str, Any]]:
    import trio
    from attrs import evolve

    from caxev import catalogue
    from caxev.cli.runs import label
    from caxev.files import Manifest
    from caxev.job import GiveUp, Retry, utcnow

    here = evolve(chosen.there, name="here", dir_raw=directory)
    rows = []
    for run in await chosen.runs(database):
        row = {"run": label(run), "what": f"{chosen.kind} to {directory}"}
        entry = chosen.entry(run)
        if entry is None or entry.location is None:
            rows.append({**row, "state": "the catalogue has no such copy", "ok": False})
            continue
        if dry_run:
            rows.append({**row, "state": f"would be fetched from {entry.location}", "ok": True})
            continue
        known = await database.load_manifest(entry.manifest) if entry.manifest else None
        order = catalogue.Download(
            here=here,
            there=chosen.there,
            dataset=catalogue.Did.of(entry.location),
            location=f"{directory}/{entry.fields.get('source_name') or run.name}",
            taken=catalogue.taken_at(run) or utcnow(),
            files=await _checked(database, entry),
            expected=None if known is None else Manifest.from_rows(known),
            rse=rse,
            single=entry.type != "raw",
        )
        try:
            await trio.to_thread.run_sync(_fetch_here, order, entry.manifest)
        except (GiveUp, Retry) as error:
            rows.append({**row, "state": error.why, "ok": False})
        else:
            rows.append({**row, "state": "fetched, compared", "ok": True})
    return rows


def _fetch_here(order: Any, manifest: str | None) -> None:
    """Fetch a copy and compare it with its manifest, where there is one."""
    from caxev import catalogue
    from caxev.files import digest_tree
    from caxev.job import GiveUp

    catalogue.download(order, report=_nobody)
    if manifest is not None:
        found = digest_tree(order.location, sha512=False, report=_nobody).digest
        if found != manifest:
            raise GiveUp(f"{order.location} is {found}, and should be {manifest}")


def _nobody(_done: int, _total: int) -> None:
    """Take a report."""


async def _checked(database: Database, entry: Copy) -> Any:
    from caxev import catalogue

    if entry.manifest is None:
        return None
    rows = await database.load_manifest(catalogue.stored_as(entry.manifest))
    return None if rows is None else tuple(map(catalogue.Checked.from_row, rows))


_COLUMNS: Final = (("run", "RUN"), ("what", "WHAT"), ("state", "STATE"))


def _told(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print the rows; ends with failure where one of them is not ok."""
    show(Table(_COLUMNS, rows), as_json=as_json, empty="nothing to do")
    if any(row["ok"] is False for row in rows):
        raise click.exceptions.Exit(FAILED)


# -- rules ----------------------------------------------------------------------------------------


@rucio.command(
    epilog=example(
        "caxev rucio rules --check rules.json",
        "caxev rucio rules --from-run 100 --to-run 200 --dry-run",
        "caxev rucio rules --apply --last-days 30",
    )
)
@selecting
@click.option("--check", "file", metavar="FILE", help="Say whether this rule file can be used.")
@click.option(
    "--dry-run", is_flag=True, help="Explain what is wanted of each run, and by which rule."
)
@click.option("--apply", "applying", is_flag=True, help="Have the listeners apply the file anew.")
@as_json
@global_options(hidden=True)
def rules(
    *, file: str | None, dry_run: bool, applying: bool, as_json: bool, **options: Any
) -> None:
    """Check the rule file, explain it for runs, or have it applied to them.

    A listener applies it by itself to what changes; --apply is for when the file has changed.
    """
    from caxev import catalogue

    state().log("warning")
    if file is not None and not (dry_run or applying):
        loaded = catalogue.load_rules(file)
        say(f"{file}: {len(loaded)} rules, all can be used")
        return
    if dry_run == applying:
        raise click.UsageError("say one of --check FILE, --dry-run and --apply")
    chosen = Chosen.of(options)
    path = file or chosen.there.rucio.rules
    loaded = catalogue.load_rules(path) if path else ()
    if applying:
        say(state().with_database(lambda database: _apply(database, chosen)))
        return
    rows = state().with_database(lambda database: _explain(database, chosen, loaded))
    show(Table(_RULES, rows), as_json=as_json, empty="no run is in the catalogue")


_RULES: Final = (
    ("run", "RUN"),
    ("wanted", "WANTED"),
    ("removed", "REMOVED"),
    ("change", "TO BE DONE"),
    ("unmet", "RULES THAT DO NOT APPLY"),
)


async def _explain(
    database: Database, chosen: Chosen, loaded: Sequence[Any]
) -> list[dict[str, Any]]:
    """What the rules want of each run, and what would be done, by what the entry tells."""
    runs = await chosen.runs(database)
    return [explained(chosen, run, entry, loaded) for run in runs if (entry := chosen.entry(run))]


def explained(chosen: Chosen, run: Run, entry: Copy, loaded: Sequence[Any]) -> dict[str, Any]:
    """One row of the explanation. Pure but for the time."""
    from caxev import catalogue
    from caxev.cli.runs import label
    from caxev.job import utcnow

    there = chosen.there
    always = [rse for rse in (there.rucio_upload_rse, *there.rucio_transfer) if rse]
    wishes = catalogue.wishes_for(loaded, run, entry.key, always=always)
    info = entry.fields.get("rule_info")
    known = [catalogue.Standing.from_row(row) for row in (info if isinstance(info, list) else ())]
    told = [one for one in known if one is not None]
    change = catalogue.changes(
        wishes,
        [one for one in told if one.state != catalogue.ENDED],
        [one for one in told if one.state == catalogue.ENDED],
        run_name=run.name or str(run),
        now=utcnow(),
    )
    unmet = [f"{one.label}: {why}" for one in loaded if (why := one.unmet(run, entry.key))]
    wanted = [f"{' or '.join(one.rses)} ({one.rule})" for one in wishes.keep]
    if wishes.only_verify:
        wanted = [f"only a look ({wishes.only_verify})"]
    return {
        "run": label(run),
        "wanted": wanted,
        "removed": [f"{rse} ({rule})" for rse, rule in wishes.remove.items()],
        "change": str(change),
        "unmet": unmet,
    }


async def _apply(database: Database, chosen: Chosen) -> str:
    from caxev.cli.replay import me
    from caxev.job import utcnow
    from caxev.mongo import Request

    runs = [run.id for run in await chosen.runs(database) if chosen.entry(run) is not None]
    sites = [one for one in state().sites().values() if chosen.there.name in one.upload_options]
    listening = [one.name for one in sites if one.listener]
    if not runs or not listening:
        raise NothingToDo(
            "no run is in the catalogue" if listening else "no site brings data there"
        )
    for name in listening:
        request = Request("replay", tuple(runs), handler="rucio_rules", force=True)
        await database.add_request(name, request, me(), utcnow())
    return f"{len(runs)} runs: asked {', '.join(listening)}"


# -- locate ---------------------------------------------------------------------------------------


@rucio.command(epilog=example("caxev rucio locate --last-days 30 --rse NIKHEF_USERDISK --copies 1"))
@selecting
@click.option("--rse", multiple=True, metavar="R", help="Only what this RSE has; may be repeated.")
@click.option("--copies", type=click.IntRange(0), metavar="N", help="Only what N RSEs have.")
@click.option("--status", metavar="X", help="Only entries of this status.")
@click.option(
    "--method",
    type=click.Choice(("entries", "rules", "absent")),
    default="entries",
    show_default=True,
    help="List entries, their rules, or runs without an entry.",
)
@as_json
@global_options(hidden=True)
def locate(
    *,
    rse: tuple[str, ...],
    copies: int | None,
    status: str | None,
    method: str,
    as_json: bool,
    **options: Any,
) -> None:
    """List where the catalogue has runs, as the database knows it."""
    state().log("warning")
    chosen = Chosen.of(options)
    runs = state().with_database(chosen.runs)
    rows = [row for run in runs for row in located(chosen, run, method)]
    rows = [
        row
        for row in rows
        if {*rse} <= {*row["rse"]}
        and copies in (None, len(row["rse"]))
        and status in (None, row["status"])
    ]
    columns = _PLACES if method != "rules" else (*_PLACES, ("rule", "RULE"))
    show(Table(columns, rows), as_json=as_json, empty="no such run")


_PLACES: Final = (
    ("run", "RUN"),
    ("name", "NAME"),
    ("status", "STATUS"),
    ("rse", "RSE"),
    ("location", "LOCATION"),
)


def located(chosen: Chosen, run: Run, method: str) -> Iterator[dict[str, Any]]:
    """Return the rows about one run. Pure."""
    from caxev import catalogue
    from caxev.cli.runs import label

    entry = chosen.entry(run)
    row: dict[str, Any] = {"run": label(run), "name": run.name}
    row |= {"status": None, "rse": [], "location": None}
    if entry is None:
        if method == "absent":
            yield row
        return
    rse = entry.fields.get("rse")
    row |= {"status": entry.status, "location": entry.location}
    row |= {"rse": rse if isinstance(rse, list) else []}
    if method == "entries":
        yield row
    info = entry.fields.get("rule_info") if method == "rules" else None
    for one in info if isinstance(info, list) else ():
        yield {**row, "rule": str(catalogue.Standing.from_row(one) or one)}


# -- check ----------------------------------------------------------------------------------------


@rucio.command(
    epilog=example("caxev rucio check --last-days 7 --deep", "caxev rucio check --run 5")
)
@selecting
@click.option("--deep", is_flag=True, help="Ask the storage of every RSE for sizes and checksums.")
@click.option("--all", "everything", is_flag=True, help="Look for datasets without a run, too.")
@click.option("--repair", is_flag=True, help="Have what is missing brought again; declare bad.")
@as_json
@global_options(hidden=True)
def check(*, deep: bool, everything: bool, repair: bool, as_json: bool, **options: Any) -> None:
    """Compare database and catalogue both ways: what is missing, double, or of other bytes.

    Ends with 1 where there is a difference.
    """
    state().log("warning")
    chosen = Chosen.of(options)
    checking = Checking(chosen, deep=deep, repair=repair)
    rows = state().with_database(lambda database: checking.run(database, everything=everything))
    show(Table(_DIFFERENCES, rows), as_json=as_json, empty="0 differences")
    if rows:
        raise click.exceptions.Exit(FAILED)


_DIFFERENCES: Final = (
    ("run", "RUN"),
    ("location", "LOCATION"),
    ("problem", "PROBLEM"),
    ("repair", "REPAIR"),
)


@define
class Checking:
    """One comparison; it collects a row for each difference."""

    chosen: Chosen
    deep: bool = False
    repair: bool = False
    rows: list[dict[str, Any]] = field(factory=list)

    async def run(self, database: Database, *, everything: bool) -> list[dict[str, Any]]:
        """Compare, and repair where that is asked for."""
        import trio

        from caxev import catalogue

        known: set[str] = set()
        for run in await self.chosen.runs(database):
            known |= {str(one.location) for one in run.copies if one.host == self.chosen.there.name}
            await self._compare(database, run)
        if everything:
            there = self.chosen.there
            list_all = trio.to_thread.run_sync
            datasets = await list_all(lambda: catalogue.datasets(there, report=_nobody))
            wanted = [one for one in datasets if one.name == self.chosen.kind]
            for dataset in wanted:
                if str(dataset) not in known:
                    self._note(None, str(dataset), "no run that was asked for has this dataset")
        return self.rows

    def _note(
        self, run: Run | None, location: str | None, problem: str, repair: str | None = None
    ) -> None:
        from caxev.cli.runs import label

        name = None if run is None else label(run)
        self.rows.append({"run": name, "location": location, "problem": problem, "repair": repair})

    async def _compare(self, database: Database, run: Run) -> None:
        import trio

        from caxev import catalogue
        from caxev.job import GiveUp, Retry
        from caxev.model import TRANSFERRED

        entry, there = self.chosen.entry(run), self.chosen.there
        if entry is None:
            return
        if (entries := sum(one.key == entry.key for one in run.copies)) > 1:
            self._note(run, entry.location, f"{entries} entries for one dataset")
        if entry.status != TRANSFERRED:
            repair = await self._again(database, run, entry)
            self._note(run, entry.location, f"the entry is {entry.status}", repair)
            return
        files = await _checked(database, entry)
        if files is None:
            why = "what its files must be is not known: ask for a check where a good copy is"
            self._note(run, entry.location, why)
            return
        dataset = catalogue.Did.of(entry.location)
        compare, ask = trio.to_thread.run_sync, catalogue.verify
        try:
            verdict = await compare(lambda: ask(there, dataset, files, self.deep, report=_nobody))
            found = await compare(lambda: catalogue.look(there, dataset, report=_nobody))
        except (GiveUp, Retry) as error:
            self._note(run, entry.location, error.why, await self._again(database, run, entry))
            return
        await self._judge(database, run, entry, verdict, found)

    async def _judge(
        self, database: Database, run: Run, entry: Copy, verdict: Verdict, found: Found
    ) -> None:
        lines = (*verdict.bad, *(() if verdict.good else verdict.unseen))
        repair = None
        if lines and verdict.good:
            repair = await self._declare(entry, verdict)
        elif lines:
            repair = await self._again(database, run, entry)
        for line in lines:
            self._note(run, entry.location, line, repair)
        told = entry.fields.get("rse") or []
        if list(found.rses) != list(told):
            where = f"at {_listed(found.rses)} in the catalogue, at {_listed(told)} in the database"
            self._note(run, entry.location, where, await self._look(database, run))

    async def _declare(self, entry: Copy, verdict: Verdict) -> str | None:
        """Have Rucio make bad replicas anew from the good ones."""
        import trio

        from caxev import catalogue

        if not self.repair or not verdict.replicas:
            return None
        dataset, there = catalogue.Did.of(entry.location), self.chosen.there
        await trio.to_thread.run_sync(
            lambda: catalogue.declare_bad(there, dataset, verdict.replicas, report=_nobody)
        )
        return "declared bad: Rucio makes it anew"

    async def _again(self, database: Database, run: Run, entry: Copy) -> str | None:
        """Have the upload tried again by whoever has a good copy."""
        from caxev.job import utcnow
        from caxev.model import RunUpdate

        if not self.repair or entry.status == "transferring":
            return None
        update = RunUpdate.change_copy(
            run, entry, "RSEreupload", trigger=None, owner=None, checksumproblem=None
        )
        done = await database.update_run(update, utcnow())
        return "to be brought again" if done is not None else "has changed meanwhile"

    async def _look(self, database: Database, run: Run) -> str | None:
        """Have the site that looks after the entry look again."""
        from caxev.cli.replay import me
        from caxev.job import utcnow
        from caxev.mongo import Request

        if not self.repair:
            return None
        for one in state().sites().values():
            if self.chosen.there.name in one.upload_options and one.listener:
                request = Request("replay", (run.id,), handler="rucio_rules", force=True)
                await database.add_request(one.name, request, me(), utcnow())
        return "its site looks again"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "no RSE"


# -- rm -------------------------------------------------------------------------------------------


@rucio.command(epilog=example("caxev rucio rm --run 123 --why 'taken in error'"))
@selecting
@click.option("--why", required=True, metavar="TEXT", help="Why it goes; kept for ever.")
@click.option("--dry-run", is_flag=True, help="Print what would be done; write nothing.")
@as_json
@global_options(hidden=True)
def rm(*, why: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Give datasets up, so that the catalogue deletes every replica; on proof, by a listener.

    At least two other good copies must have been compared within a day: where they have not, that
    is asked for, and the command is to be given again.
    """
    state().log("warning")
    chosen = Chosen.of(options)

    async def remove(database: Database) -> list[dict[str, Any]]:
        runs = await chosen.runs(database)
        return [await _remove(database, chosen, run, why, dry_run) for run in runs]

    _told(state().with_database(remove), as_json=as_json)


async def _remove(
    database: Database, chosen: Chosen, run: Run, why: str, dry_run: bool
) -> dict[str, Any]:
    from caxev.cli.replay import me
    from caxev.cli.runs import label
    from caxev.job import utcnow
    from caxev.model import DELETING, CopiesAtLeast, RunUpdate

    entry, now = chosen.entry(run), utcnow()
    row = {"run": label(run), "what": f"{chosen.kind} at {chosen.there.name}"}
    if entry is None:
        return {**row, "state": "the catalogue has no such copy", "ok": False}
    proof = CopiesAtLeast(
        OTHERS,
        entry.key,
        manifest=entry.manifest,
        checksum=entry.checksum,
        verified_since=now - PROOF,
    )
    if dry_run:
        enough = proof.holds(run)
        state = "would be given up" if enough else "other copies would be compared first"
        return {**row, "state": state, "ok": True}
    intent = RunUpdate.change_copy(
        run, entry, DELETING, proof, deleting={"by": me(), "why": why, "since": now}, owner=None
    )
    if await database.update_run(intent, now) is not None:
        return {**row, "state": "being given up", "ok": True}
    asked = await _ask_for_proof(database, run, entry.key)
    return {
        **row,
        "state": f"not enough good copies were compared today: asked {asked}",
        "ok": False,
    }


async def _ask_for_proof(database: Database, run: Run, gone: CopyKey) -> str:
    from caxev.job import utcnow
    from caxev.model import TRANSFERRED, RunUpdate

    asked = []
    for one in run.copies:
        same = (one.type, one.version) == (gone.type, gone.version) and one.host != gone.host
        if same and one.status == TRANSFERRED:
            seen = one.as_seen
            fields = {"check_asked": utcnow()}
            update = RunUpdate(run.id, (seen,), change=(seen, fields))
            if await database.update_run(update, utcnow()) is not None:
                asked.append(one.host)
    return ", ".join(asked) or "nobody, there is none"
