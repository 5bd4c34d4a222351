"""Every attack of `tests.attacks` against everything that takes a path from the database."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Final, Literal, TypeVar, get_args

import trio
from attrs import Factory, define, evolve
from loguru import logger

from caxev import transfer
from caxev.batch.folder import OUTPUT, Folder
from caxev.batch.work import take_stock
from caxev.cli.mv import bring, plan_move
from caxev.cli.register import found_at
from caxev.cli.selection import named
from caxev.cli.stray import Search
from caxev.config import Deletion, Permission, Site, Sites
from caxev.copies.deletion import intent
from caxev.copies.retention import DeletionPlan, plan_purge
from caxev.core.clock import utcnow
from caxev.core.errors import GiveUp, NothingToDo, Retry
from caxev.core.job import Job
from caxev.core.model import (
    TRANSFERRED,
    CopyField,
    CopyKey,
    Event,
    Run,
)
from caxev.core.selection import Selection
from caxev.core.update import RunUpdate
from caxev.files import confine, empty_quarantine, safe_name, standing
from caxev.files import erase as erase_stray
from caxev.files.erasing import set_aside
from caxev.files.identity import identity
from caxev.handlers.deletion import erase
from caxev.handlers.permissions import apply as give
from caxev.transfer import Route
from tests import sshd as servers
from tests.attacks import Attack, Watched, attacks
from tests.faults.campaign import Problem, Tally, say, say_round
from tests.places import vouched
from tests.test_files import quiet

T = TypeVar("T")
Moving = Literal["pull from", "pull to", "push from", "push to", "read"]
Own = Literal[
    "mv",
    "rm",
    "purge",
    "register",
    "stray --register",
    "stray --delete",
    "permissions",
    "set aside",
    "release",
    "job's result",
]
Deed = Moving | Own
MOVED: Final[tuple[Deed, ...]] = get_args(Moving)
"""Deeds with two ends, which are tried by every way of moving copies."""
OWN: Final[tuple[Deed, ...]] = get_args(Own)
"""Deeds at a site itself."""
DEEDS: Final = (*MOVED, *OWN)
TRIED: Final = [(deed, way) for deed in MOVED for way in ("local", "sftp", "rsync")] + [
    (deed, "local") for deed in OWN
]
CONTENT: Final = b"what anybody may have"
GOOD: Final = (CopyKey("raw", "here"), CopyKey("raw", "there"))
"""The copies that nobody may harm: they are named by no attack."""


@define
class Place:
    """Two sites below one directory, what lies outside of both, and the attacks on either.

    `tried`: how many attacks have been tried.
    """

    here: Site
    there: Site
    watched: Watched
    against_here: list[Attack]
    against_there: list[Attack]
    tried: int = 0

    def do(self, deed: Deed, path: str) -> object:
        """Do it with what that path names. Raises `GiveUp` or `Retry`."""
        match deed:
            case "mv":
                return self._moved(path)
            case "rm" | "purge":
                return self._deleted(deed, path)
            case "register":
                return self._registered(path)
            case "stray --register" | "stray --delete":
                return self._searched(deed, path)
            case "permissions" | "set aside" | "release":
                return self._looked_after(deed, path)
            case "job's result":
                return self._made(path)
            case _:
                return self._copied(deed, path)

    def _copied(self, deed: Deed, path: str) -> object:
        route = Route(
            self.here, self.there, f"{self.here.roots[0]}/run", f"{self.there.roots[0]}/run"
        )
        match deed:
            case "pull from":
                fresh = f"{self.here.roots[0]}/new-{os.urandom(4).hex()}"
                route = evolve(route, remote_path=path, local_path=fresh)
                return transfer.pull(route, report=quiet)
            case "pull to":
                return transfer.pull(evolve(route, local_path=path), report=quiet)
            case "push from":
                fresh = f"{self.there.roots[0]}/new-{os.urandom(4).hex()}"
                route = evolve(route, local_path=path, remote_path=fresh)
                return transfer.push(route, report=quiet)
            case "push to":
                return transfer.push(evolve(route, remote_path=path), report=quiet)
            case _:
                return transfer.manifest(evolve(route, remote_path=path), report=quiet)

    def _moved(self, path: str) -> object:
        """Move the copy that is said to be there, as ``caxev mv`` does."""
        to = f"{self.here.roots[0]}/moved-{os.urandom(4).hex()}"
        try:
            move = plan_move(_run(path), GOOD[0], self.here, to)
        except NothingToDo as error:
            raise GiveUp(str(error)) from error
        return bring(move, self.here, None)

    def _deleted(self, deed: Deed, path: str) -> object:
        """Delete the copy that is said to be there, which the rules want or somebody asked for.

        The rules look at where it is said to be; what is asked for stands in the entry already, by
        whoever wrote that, and `erase` alone looks.
        """
        run, now, sites = _run(path), utcnow(), self.sites
        mine = run.copy(GOOD[0])
        assert mine is not None
        wanted: object = DeletionPlan(mine, by="tests", why="asked for", keep=1, like=mine)
        if deed == "purge":
            wanted = plan_purge(run, mine, self.here, sites, now)
        if not isinstance(wanted, DeletionPlan):
            raise GiveUp(f"it does not go: {wanted}")
        paper = Paper(run)
        trio.run(paper.update, intent(run, wanted, sites, now))
        trio.run(paper.update, RunUpdate.note(run, mine, proof=[]))
        event = Event(run.id, CopyField(*mine.key, "proof"), None, "yes")
        job = Job(paper.run, event, self.here, sites, "here#1", ports=paper)  # type: ignore[arg-type]
        done = trio.run(erase, job)
        if not isinstance(done, RunUpdate) or done.remove is None:
            raise GiveUp(f"it is not erased: {done}")
        return done

    def _looked_after(self, deed: Deed, path: str) -> object:
        roots = self.here.roots
        if deed == "permissions":
            give(path, roots, Permission(0o700))
        else:
            kept = path
            if deed == "set aside":
                mark = standing(path, roots, None)
                kept = set_aside(path, roots, [b""], None, mark)
            empty_quarantine(kept, roots)
        return deed

    def _registered(self, path: str) -> object:
        """Tell the database of the copy at that path, as ``caxev register`` does."""
        book = Book([self._known()])
        try:
            found = found_at(path, self.here, self.sites, any_name=True)
            tell = partial(found.enter, book, named(2, None), None, dry_run=False)  # type: ignore[arg-type]
            trio.run(tell)
        except NothingToDo as error:
            raise GiveUp(str(error)) from error
        return [confine(one, self.here.roots) for one in book.told]

    def _searched(self, deed: Deed, path: str) -> object:
        """Look for strays while an entry names that path; then delete it as if it were one.

        Links that lead out are strays themselves: what is deleted of them is put back.
        """
        root = Path(self.here.roots[0])
        links = {one: one.readlink() for one in root.iterdir() if one.is_symlink()}
        coming = {"type": "raw", "host": "here", "status": "transferring"}
        with suppress(UnicodeEncodeError):  # no text of a database is that
            coming["location"] = path.encode().decode()
        named = Run.from_document({"_id": "named", "name": "named", "data": [coming]})
        book, act = Book([self._known(), named]), deed.removeprefix("stray --")
        search = Search(self.here, self.sites, act, math.inf, False)

        async def run() -> bool:
            async for _row in search.rows(book):  # type: ignore[arg-type]
                pass
            return search.all_well

        try:
            assert trio.run(run)
        finally:
            for link, to in links.items():
                if not os.path.lexists(link):
                    link.symlink_to(to)
        for one in book.told:
            if not os.path.realpath(one).startswith(f"{root}/"):
                return one
        if act == "register":
            raise GiveUp("nothing is told of what is outside")
        try:
            mark = identity(vouched(path.rstrip("/")))
        except OSError:  # a link on the way, as the command would report it
            mark = None
        erase_stray(path, self.here.roots, mark)
        return None

    def _made(self, path: str) -> object:
        """Take stock of a job that is said to make what stands there."""
        root, name = self.here.roots[0], f"job.{os.urandom(4).hex()}"
        folder = Folder.opened(f"{root}-jobs")
        output = folder.work(name) / OUTPUT / safe_name(path)
        output.parent.mkdir(parents=True)
        output.write_bytes(CONTENT)
        return take_stock(str(folder.home), name, path, (root,), True)

    def _known(self) -> Run:
        return _run(f"{self.here.roots[0]}/run")

    @property
    def sites(self) -> Sites:
        sites = (self.here, self.there)
        return Sites(Path("sites.json"), {site.name: site for site in sites})

    def attacks(self, deed: Deed) -> list[Attack]:
        ours = deed in ("pull to", "push from", *OWN)
        return self.against_here if ours else self.against_there

    def harmed(self) -> list[str]:
        """The sites whose good copy is not as it was."""
        sites = (self.here, self.there)
        return [site.name for site in sites if not _is_good(Path(site.roots[0]) / "run")]


def _is_good(copy: Path) -> bool:
    return [one.name for one in copy.iterdir()] == ["data"] and (
        (copy / "data").read_bytes() == CONTENT
    )


@define
class Paper:
    """What a job can do to a run that stands on paper only: each update is written."""

    run: Run

    async def update(self, update: RunUpdate, *, now: datetime | None = None) -> Run:
        assert update.change is not None
        entries = [dict(one) for one in self.run.document["data"]]
        entries[0].update(update.change[1])
        self.run = Run.from_document({**self.run.document, "data": entries})
        return self.run

    async def load_manifest(self, digest: str) -> None:
        """It is not known what the copy must be."""
        del digest

    async def neighbours(self, wanted: object) -> list[Run]:
        """No other run is said to lie there."""
        del wanted
        return []

    async def work(self, function: Callable[..., T], *args: object, job: Job) -> T:
        return function(*args, report=quiet)


@define
class Book:
    """A database that stands on paper: its runs, and the places of which it has been told."""

    runs: list[Run]
    told: list[str] = Factory(list)
    settings: None = None

    async def pages(self, selection: Selection, now: datetime) -> AsyncIterator[list[Run]]:
        del selection, now
        yield self.runs

    async def select(self, selection: Selection, now: datetime, limit: int) -> list[Run]:
        """Whatever run is asked for is there, and is nowhere yet."""
        del now, limit
        return [Run.from_document({"_id": "new", "number": 2, "name": "", "data": []})]

    async def located(
        self, hosts: Collection[str], locations: Collection[str], roots: Collection[str]
    ) -> list[Run]:
        del hosts, roots
        return [run for run in self.runs if any(one.location in locations for one in run.copies)]

    async def neighbours(self, wanted: object) -> list[Run]:
        del wanted
        return self.runs  # who asks looks closer

    async def update_run(self, update: RunUpdate, now: datetime) -> Run:
        del now
        assert update.add is not None
        self.told.append(update.add["location"])
        return self.runs[0]


def _run(path: str) -> Run:
    """A run that is old enough to be purged, whose copy here is said to be at that path."""
    good = {"type": "raw", "status": TRANSFERRED, "manifest": "b3:1", "verified_at": utcnow()}
    entries = [{**good, "host": key.host, "location": path} for key in GOOD]
    entries[1]["location"] = "/there/run"
    start = datetime(2016, 11, 11, tzinfo=UTC)
    return Run.from_document({"_id": "run", "number": 1, "start": start, "data": entries})


def placed(base: Path, **there: Any) -> Place:
    """Lay out sites, secrets and traps."""
    roots = [base / name for name in ("here", "there")]
    for root in roots:
        (root / "run").mkdir(parents=True)
        (root / "run" / "data").write_bytes(CONTENT)
    watched = Watched(base / "outside")
    traps = [attacks(root, watched.outside) for root in roots]
    rules = Deletion(copies=1, proof_days=1.0)
    sites = [Site(name=root.name, dir_raw=str(root), purge=1.0, deletion=rules) for root in roots]
    return Place(sites[0], evolve(sites[1], **there), watched, traps[0], traps[1])


def over_ssh(base: Path, server: servers.Server, method: str = "sftp") -> Place:
    """Lay out the same, with an SSH server between the two."""
    end = server.endpoint
    place = placed(base, method=method, hostname=end.host, port=end.port, username=end.username)
    here = evolve(place.here, identity=end.identity, known_hosts=end.known_hosts)
    return evolve(place, here=here)


def problems(place: Place, deed: Deed, given: Iterable[Attack]) -> Iterator[str]:
    """Try attacks; say which were not refused for good, or led to something outside."""
    for attack in given:
        if (why := _not_refused(place, deed, attack)) is not None and not attack.kept:
            yield f"{deed}: {attack} {why}"
        if not place.watched.untouched:
            yield f"{deed}: {attack} touched something outside"
            return
    for site in (place.here, place.there):
        if place.watched.leaked(Path(site.roots[0])):
            yield f"{deed}: something from outside is now inside {site.name}"


def _not_refused(place: Place, deed: Deed, attack: Attack) -> str | None:
    """Try an attack; what was done instead of refusing it for good, if anything."""
    place.tried += 1
    if deed in OWN and attack.kept:
        _put(Path(attack.path))
    link = attack.path.rstrip("/")
    to = os.readlink(link) if os.path.islink(link) else None
    try:
        place.do(deed, attack.path)
    except GiveUp:
        return None
    except Retry as error:  # such a name may be more than the disk takes
        return f"is tried again: {error}"
    if to is not None and not os.path.lexists(link):
        os.symlink(to, link)
        return None  # it was a link that was deleted, and not what it leads to
    return "was not refused"


def _put(copy: Path) -> None:
    """Have a copy stand where an attack that stays inside says, if the disk takes such a name."""
    with suppress(OSError):
        copy.mkdir(parents=True, exist_ok=True)
        (copy / "data").write_bytes(CONTENT)


def paths(*, rounds: int, seed: int) -> dict[str, Any]:
    """Try all attacks with one deed by one way in each round, in an order that the seed chooses.

    Beside the traps each site has a good copy, which must be whole in the end.
    """
    logger.disable("caxev.handlers")  # each copy that is deleted
    random, tally, outside = Random(seed), Tally({}), 0
    with tempfile.TemporaryDirectory(prefix="caxev-paths-") as directory:
        keys = Path(directory) / "sshd"
        keys.mkdir()
        with servers.running(keys) as server:
            for deed, way in islice(cycle(random.sample(TRIED, len(TRIED))), rounds):
                base = Path(directory) / f"{tally.rounds}"
                near = way == "local"
                place = placed(base, method=way) if near else over_ssh(base, server, way)
                began = monotonic()
                told = list(problems(place, deed, place.attacks(deed)))
                outside += len(told)
                harmed = [Problem("lost", f"the good copy of {name}") for name in place.harmed()]
                tally.compared[f"{deed}, {way}, {tally.rounds}"] = {*GOOD}
                tally.add(harmed)
                tally.faults += place.tried
                say_round(f"{deed}, {way}: {place.tried} attacks", harmed, monotonic() - began)
                for what in told:
                    say(f"    outside: {what}")
    return {**tally.row(), "outside": outside}
