"""What all campaigns share: a collaboration to break, and the comparison of its end.

A campaign takes runs on a `Ground`, breaks something, has `Ground.finish` wait until nothing moves
any more, and adds what `compare` finds to its `Tally`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from shutil import rmtree
from typing import Any, ClassVar, Final, Literal, NamedTuple

import trio
from attrs import define, field, frozen
from rich.console import Console
from rich.table import Table

from caxev import aio
from caxev.config import DEFAULT_HANDLERS, load_handlers
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction, State
from caxev.core.model import (
    TRANSFERRED,
    CopyKey,
    Run,
    RunId,
    Tag,
)
from caxev.core.update import RunUpdate
from caxev.database import (
    Database,
    DatabaseError,
    HistorySearch,
    is_transient,
    open_database,
    run,
)
from caxev.demo.world import World, ask, left
from caxev.engine.listener import prepare
from caxev.files import PART_PREFIX, digest_tree
from caxev.files.erasing import GONE_PREFIX
from tests import dsmc_faults
from tests.faults.told import untold
from tests.mongod import Cluster
from tests.places import vouched

ROOT: Final = Path(__file__).parents[2]
EFFECTS: Final = Path(__file__).parent / "effects.py"
BIRTH: Final = "lngs"
"""The site where runs are taken; the others pull from it, or are pushed to."""
PROCESSES: Final = "chicago"
"""The site that makes derived data of them."""
PATIENCE: Final = 300.0
"""Seconds after which what has not come to its end is lost."""
HELPED: Final = 3.0
"""Seconds of a helper's lease."""
LOOK_EVERY: Final = 0.2
TWO: Final[dict[str, dict[str, Any]]] = {"stockholm": {"listener": False}}
"""Two of the three sites listen: the third one is only pushed to."""
UNSETTLED: Final = ("pending", "running")
SHOWN: Final = 10
"""Problems of a round that are told one by one."""
LISTED: Final = 50
"""Runs, and reactions, that the message of a time-out lists: of the runs, those taken last."""
LATER: Final = timedelta(hours=1)
"""What is due after that only waits for its time: a copy to be stalled, or read again."""

Kind = Literal["lost", "duplicated", "corrupt_accepted", "quorum_broken"]


class Problem(NamedTuple):
    """One thing that is not as it should be."""

    kind: Kind
    what: str


Compared = dict[RunId, set[CopyKey]]
"""Of each run that was compared with what it should be, the entries that it had."""


@define
class Tally:
    """The sum of a campaign, over all runs and their copies that were `compared`.

    `lost`: what did not come to its end: a copy, a handler's effect, a reaction, a partial that
    nobody took away. `duplicated`: a second entry for one copy, a second effect.
    `corrupt_accepted`: a copy that is said to be good and is not what the source is.
    `quorum_broken`: fewer good copies than must remain.
    """

    compared: Compared
    rounds: int = 0
    faults: int = 0
    lost: int = 0
    duplicated: int = 0
    corrupt_accepted: int = 0
    quorum_broken: int = 0

    def add(self, problems: Iterable[Problem]) -> None:
        """Count one round's problems."""
        self.rounds += 1
        for problem in problems:
            setattr(self, problem.kind, getattr(self, problem.kind) + 1)

    def row(self) -> dict[str, int]:
        """Return the figures by name."""
        return {
            "rounds": self.rounds,
            "faults": self.faults,
            "runs": len(self.compared),
            "copies": sum(map(len, self.compared.values())),
            "lost": self.lost,
            "duplicated": self.duplicated,
            "corrupt_accepted": self.corrupt_accepted,
            "quorum_broken": self.quorum_broken,
        }


@frozen
class Born:
    """A run as it was taken: its id, and the digest of the source's manifest."""

    id: RunId
    number: int
    digest: str


@frozen
class End:
    """How runs end where nothing is broken: their copies, with statuses, and their tags."""

    copies: Mapping[CopyKey, str]
    tags: Counter[str]

    @classmethod
    def of(cls, one: Run) -> End:
        """Return the end that a run has come to."""
        return cls({copy.key: copy.status for copy in one.copies}, Counter(one.tags))


def compare(one: Run, born: Born, end: End) -> Iterator[Problem]:
    """Say how a run's document differs from the end that it should have come to. Pure."""
    for key, status in end.copies.items():
        found = one.copy(key)
        if found is None or found.status != status:
            yield Problem("lost", f"{one}: {key} is {found.status if found else 'not there'}")
        elif (status, key.type) == (TRANSFERRED, "raw") and found.manifest != born.digest:
            yield Problem("corrupt_accepted", f"{one}: {key} is good with {found.manifest}")
    for key in {copy.key for copy in one.copies} - end.copies.keys():
        yield Problem("lost", f"{one}: {key} is not gone")
    for key, entries in Counter(copy.key for copy in one.copies).items():
        if entries > 1:
            yield Problem("duplicated", f"{one}: {entries} entries for {key}")
    tags = Counter(one.tags)
    for tag in end.tags | tags:
        if tags[tag] != end.tags[tag]:
            kind: Kind = "lost" if tags[tag] < end.tags[tag] else "duplicated"
            yield Problem(kind, f"{one}: tag {tag} stands there {tags[tag]} times")


def digest_of(path: str) -> str:
    """Return the digest of the manifest of what is at `path`."""
    return digest_tree(vouched(path), sha512=False, report=lambda _done, _total: None).digest


def corrupt(one: Run, born: Born, sites: Collection[str]) -> Iterator[Problem]:
    """Read every copy on the disks of these sites that is said to be good. Blocks."""
    for copy in one.copies:
        if copy.status != TRANSFERRED or copy.host not in sites:
            continue
        if not copy.location or not os.path.lexists(copy.location):
            yield Problem("lost", f"{one}: the bytes of {copy.key}")
        elif digest_of(copy.location) != (born.digest if copy.type == "raw" else copy.manifest):
            yield Problem("corrupt_accepted", f"{one}: the bytes of {copy.key} differ")


def add_oddities(path: Path) -> None:
    """Put into a run what real ones hold once in a while."""
    (path / "empty").mkdir()
    (path / "newest").symlink_to("pax_info.json")
    odd = os.fsencode(path) + b"/odd \xff 'name'\n\".dat"
    with Path(os.fsdecode(odd)).open("wb") as file:
        file.write(b"odd" * 1000)


@define(eq=False)
class Listener:
    """A ``caxev listen`` process and its log, or (``site+1``) a helper of one."""

    site: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def helps(self) -> str:
        """The site that it helps, if it is a helper."""
        of, mark, _ = self.site.partition("+")
        return of if mark else ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def killed(self) -> bool:
        return self.process.poll() == -signal.SIGKILL

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def said(self, text: str) -> bool:
        """Whether it has logged that."""
        return self.log.exists() and text in self.log.read_text(errors="replace")


@define(eq=False)
class Ground:
    """A `World` with its database open, on which runs are taken and listeners come and go.

    `outcasts` are runs that are broken on purpose: what they owe is no loss. `compared` are those
    that were compared with what they should be, however often.
    Each listener has so many `helpers`, which share its transfers and checksums.
    Runs are `odd` as real ones are once in a while, where every site of the world takes such.
    """

    world: World
    database: Database
    lease_time: float = 2.0
    odd: bool = True
    helpers: int = 0
    outcasts: set[RunId] = field(init=False, factory=set)
    compared: Compared = field(init=False, factory=dict)
    listeners: dict[str, Listener] = field(init=False, factory=dict)
    numbers: Iterator[int] = field(init=False)
    birth: ClassVar[str] = BIRTH
    _marks: Iterator[int] = field(init=False, factory=lambda: count(1))
    _marker: RunId | None = field(init=False, default=None)
    _started: list[Listener] = field(init=False, factory=list)
    _last: deque[RunId] = field(init=False, factory=lambda: deque(maxlen=LISTED))

    def __attrs_post_init__(self) -> None:
        raw = self.world.dir_of(self.birth, "dir_raw")
        self.numbers = count(1 + sum(1 for _ in raw.parent.glob("taken-*")))

    # -- listeners --------------------------------------------------------------------------

    def listen(self, site: str, *options: str, **environment: str) -> Listener:
        """Start a listener, or a helper; it is the one of that name from now on."""
        log = self.world.directory / "logs" / f"{site}.{len(self._started)}.{os.urandom(2).hex()}"
        of, mark, _ = site.partition("+")
        helping = ("work", "--lane", "transfer", "--lane", "checksum", "--lease", str(HELPED))
        command = helping if mark else ("listen", "--lease", str(self.lease_time))
        files = ("--handlers", str(EFFECTS), "--log-file", str(log))
        process = self.world.start(
            site, *command, "--site", of, *files, *options, environment=environment
        )
        listener = self.listeners[site] = Listener(site, process, log)
        self._started.append(listener)
        return listener

    async def gather(self) -> None:
        """Have a listener at each site that has none."""
        await self.ready(
            *[self.listeners.get(site) or self.listen(site) for site in self.world.listening]
        )

    @property
    def everyone(self) -> list[str]:
        """The names of all listeners and helpers."""
        sites = self.world.listening
        return [*sites, *(f"{site}+{n + 1}" for site in sites for n in range(self.helpers))]

    async def leading(self, listener: Listener) -> bool:
        """Whether it is this one that acts for its site, and it has found its place."""
        if listener.helps:
            helpers = await self.database.helpers(listener.helps)
            return any(f":{listener.pid}:" in one.name and one.helps for one in helpers)
        record = await self.database.site_record(listener.site)
        if record is None or record.position is None or not record.active:
            return False
        return f":{listener.pid}:" in (record.owner or "")

    async def ready(self, *listeners: Listener) -> None:
        """Wait until each acts for its site, or has died by SIGKILL, or its listener has."""
        for listener in listeners:

            async def settled(one: Listener = listener) -> bool:
                # A helper needs its listener: nobody admits it while that is dead.
                dead = one.helps and self.listeners[one.helps].killed
                return one.killed or bool(dead) or await self.leading(one)

            await self.until(settled, f"the listener of {listener.site} did not get ready")

    async def until(
        self, condition: Callable[[], Awaitable[bool]], why: str, *, within: float = PATIENCE
    ) -> None:
        """Wait for a condition. Raises TimeoutError, whose message has the `situation`."""
        with trio.move_on_after(within):
            while not await _holds(condition):  # of another process
                await trio.sleep(LOOK_EVERY)
            return
        raise TimeoutError(f"{why} (after {within:.0f} s)\n{await self.situation()}")

    async def situation(self) -> str:
        """Return the entries of the runs, and the reactions that are not done, a line each.

        A campaign that fails elsewhere leaves no more than this to find out why.
        """
        try:
            reactions = [
                reaction
                for state in (*UNSETTLED, "failed")
                for reaction, _ in await self.database.reactions(state=state, limit=LISTED)
            ]
            runs = await self.database.runs({*self._last, *(one.run for one in reactions)})
        except DatabaseError as error:
            return f"the database does not answer: {error}"
        return "\n".join([*map(_entries, runs.values()), *map(_described, reactions)])

    async def stop(self, *listeners: Listener) -> None:
        """Have listeners leave in good order, and wait for them."""
        for listener in listeners:
            ask(listener.process)
        for listener in listeners:
            await trio.to_thread.run_sync(left, listener.process)

    def ended(self) -> Iterator[Problem]:
        """Say which listeners have ended by themselves, and start others."""
        for site, listener in list(self.listeners.items()):
            if listener.process.poll() is not None:
                yield Problem("lost", f"the listener of {site} has ended")
                self.listen(site)

    def close(self) -> None:
        """End every listener that was started here, in good order if it can."""
        for listener in self._started:
            if listener.process.poll() is None:
                listener.signal(signal.SIGCONT)
            ask(listener.process)
        for listener in self._started:
            left(listener.process)

    # -- runs -------------------------------------------------------------------------------

    async def take(self, size: int, *, odd: bool = True, **fields: Any) -> Born:
        """Have the DAQ take a run of about `size` bytes; `fields` go into its document.

        Without `odd` it holds files of plain names alone.
        """
        number = next(self.numbers)
        document = await trio.to_thread.run_sync(self._write, number, size, odd)
        digest = await trio.to_thread.run_sync(digest_of, document["data"][0]["location"])
        born = Born(await self.database.insert_run({**document, **fields}), number, digest)
        self._last.append(born.id)
        return born

    def _write(self, number: int, size: int, odd: bool) -> dict[str, Any]:
        document = self.world.take_run(self.birth, number, size, number)
        if odd and self.odd:
            add_oddities(Path(document["data"][0]["location"]))
        (self.world.directory / self.birth / f"taken-{number}").touch()
        return document

    async def finish(self, runs: Sequence[Born], end: End | None) -> list[Problem]:
        """Wait until the runs have come to their end and nothing is owed; what is wrong then.

        Without `end`: until every site has left its tag and, but where raw data is purged, has a
        good copy.
        """
        end = end or self.wanted
        with suppress(TimeoutError):  # what is missing is found below
            await self.until(lambda: self._at_rest(runs, end), "not at rest")
        problems = await self.owed(("pending", "running", "failed"))
        found = await self.database.runs([born.id for born in runs])
        for born in runs:
            problems += await trio.to_thread.run_sync(self.judged, found[born.id], born, end)
            problems += await self.untold(found[born.id])
        return [*problems, *self.partials()]

    async def untold(self, one: Run) -> list[Problem]:
        """Compare what the history has of a run with what has become of it."""
        pages = self.database.history_pages(HistorySearch(runs=[one.id]))
        rows = [row async for page in pages for row in page]
        owed = [
            reaction
            for site in self.world.listening
            for reaction, _ in await self.database.reactions(site, run=one.id)
        ]
        return [Problem("lost", f"{one}: {what}") for what in untold(one, rows, owed)]

    def judged(self, one: Run, born: Born, end: End) -> list[Problem]:
        """Compare a run with its end, and read every copy that is said to be good. Blocks."""
        self.compared.setdefault(one.id, set()).update(copy.key for copy in one.copies)
        return [*compare(one, born, end), *corrupt(one, born, self.world.listening)]

    @property
    def wanted(self) -> End:
        """The end that every run comes to here."""
        keys = [CopyKey("raw", site) for site in self.world.sites]
        for site in self.world.sites.values():
            version = site.processing.version if site.processing else None
            keys += [CopyKey("processed", site.name, version)] if site.processing else []
            keys += [CopyKey("minitrees", site.name, version)] if site.minitrees else []
        purged = {site.name for site in self.world.sites.values() if site.purge is not None}
        stay = [key for key in keys if key.type != "raw" or key.host not in purged]
        seen = [key.host for key in keys if key.host in self.world.listening]
        return End(dict.fromkeys(stay, TRANSFERRED), Counter(f"seen-{host}" for host in seen))

    async def _at_rest(self, runs: Sequence[Born], end: End) -> bool:
        """Whether the runs are at their end, and every site has seen that and owes nothing.

        What a site settles may make a change that another has yet to see: a mark in the stream
        comes to it after that. Where nothing has changed meanwhile, nothing is under way.
        """
        ids = [born.id for born in runs]
        found = await self.database.runs(ids)
        if any(next(compare(found[born.id], born, end), None) for born in runs):
            return False
        if await self.owed(UNSETTLED):
            return False
        await self.heard()
        return not await self.owed(UNSETTLED) and await self.database.runs(ids) == found

    async def heard(self) -> None:
        """Wait until every listener has taken in all changes there are: a new mark is the last."""
        mark = f"mark-{next(self._marks)}"
        if self._marker is None or await self._mark(self._marker, mark) is None:
            document = {"name": "marker", "number": 0, "data": [], "tags": [{"name": mark}]}
            self._marker = await self.database.insert_run(document)
            self.outcasts.add(self._marker)
        leading = [(site, one) for site, one in self.listeners.items() if not one.helps]
        for site, listener in leading:
            while listener is self.listeners[site] and listener.process.poll() is None:
                looked = await self.database.snapshot(site, [self._marker])
                if Tag(mark) in looked.before.get(self._marker, {}):
                    break
                await trio.sleep(LOOK_EVERY)

    async def _mark(self, marker: RunId, mark: str) -> Run | None:
        found = (await self.database.runs([marker])).get(marker)
        if found is None:
            return None
        update = RunUpdate.overwrite(found, tags=[{"name": mark}])
        return await self.database.update_run(update, utcnow())

    async def owed(self, states: Iterable[str]) -> list[Problem]:
        """Say which reactions are in these states, but those that only wait for a later time."""
        return [
            Problem(
                "lost",
                f"{reaction.site}: {reaction.handler} of {reaction.event} is {state}: "
                f"{reaction.note}",
            )
            for state in states
            for reaction, _ in await self.database.reactions(state=state)
            if reaction.run not in self.outcasts
            if reaction.due < utcnow() + LATER or state != "pending"
        ]

    def partials(self) -> Iterator[Problem]:
        """Say what is left of copies that were begun or erased."""
        for site in self.world.sites:
            for prefix in (PART_PREFIX, GONE_PREFIX):
                for path in (self.world.directory / site).rglob(f"{prefix}*"):
                    yield Problem("lost", f"left over: {path.relative_to(self.world.directory)!r}")

    async def forget(self, runs: Sequence[Born], *, anew: bool = False) -> None:
        """Take the bytes of runs off the disk. Their documents stay.

        With `anew` all else that stands beside what was made of them goes, too: the next has to
        make its directory anew.
        """
        found = await self.database.runs([born.id for born in runs])
        for one in found.values():
            for copy in one.copies:
                if copy.location:
                    place = Path(copy.location)
                    doomed = place.parent if anew and copy.type != "raw" else place
                    await trio.to_thread.run_sync(partial(rmtree, doomed, ignore_errors=True))


def _entries(one: Run) -> str:
    """List a run's entries: each with its status, and with its error if it has one."""
    copies = (
        f"{copy.key} is {copy.status}" + (f" ({why})" if (why := copy.fields.get("error")) else "")
        for copy in one.copies
    )
    return f"{one}: {', '.join(copies) or 'no entry'}"


def _described(one: Reaction) -> str:
    """Describe a reaction that is not done: what it is for, and why it waits."""
    waits = f"due at {one.due:%H:%M:%S} UTC, " if one.state is State.PENDING else ""
    since = f"hindered since {one.hindered:%H:%M:%S} UTC, " if one.hindered else ""
    what = f"{one.site}: {one.handler} of {one.event} of run {one.run} is {one.state}"
    return f"{what}, {waits}{since}{one.attempts} attempts: {one.note or 'no note'}"


async def _holds(condition: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await condition()
    except DatabaseError as error:
        if not is_transient(error):
            raise
        return False


@asynccontextmanager
async def ground_in(
    world: World, *, lease_time: float = 2.0, kind: type[Ground] = Ground
) -> AsyncIterator[Ground]:
    """A ground for the length of a block; its listeners have ended afterwards."""
    load_handlers(default=DEFAULT_HANDLERS)
    async with aio.loop(), open_database(world.settings) as database:
        await prepare(database)
        ground = kind(world, database, lease_time)
        try:
            yield ground
        finally:
            ground.close()


@contextmanager
def new_world(
    server: Callable[[Path], Cluster] = Cluster,
    template: Path = ROOT / "sites.json",
    sites: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[World]:
    """A world in a temporary directory, gone afterwards; `server` makes its database.

    `sites`: further keys of the template's sites, by name.
    """
    with tempfile.TemporaryDirectory(prefix="caxev-faults-") as directory:
        copied = Path(directory) / "template.json"
        entries = json.loads(template.read_text())
        more = sites or {}
        copied.write_text(json.dumps([one | dict(more.get(one["name"], {})) for one in entries]))
        with World(Path(directory), copied, server=server, dsmc=dsmc_faults.PROGRAM) as world:
            yield world


def raw_only(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return further keys of sites with which nothing is processed: a run costs a third. Pure."""
    nothing = {"processing": None, "minitrees": None}
    return {**sites, PROCESSES: {**sites.get(PROCESSES, {}), **nothing}}


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def say_round(what: str, problems: Sequence[Problem], seconds: float) -> None:
    """Print how a round went."""
    say(f"{what}: {'good' if not problems else f'{len(problems)} problems'}, {seconds:.1f} s")
    for problem in problems[:SHOWN]:
        say(f"    {problem.kind}: {problem.what}")


def play(
    campaign: Callable[[Ground], Awaitable[Mapping[str, Any]]],
    *,
    lease_time: float = 2.0,
    server: Callable[[Path], Cluster] = Cluster,
    template: Path = ROOT / "sites.json",
    kind: type[Ground] = Ground,
    sites: Mapping[str, Mapping[str, Any]] | None = None,
    helpers: int = 0,
) -> Mapping[str, Any]:
    """Play a campaign in a world of its own; its figures.

    `sites`: keys of sites in sites.json, by name.
    """

    async def main(world: World) -> Mapping[str, Any]:
        async with ground_in(world, lease_time=lease_time, kind=kind) as ground:
            ground.helpers = helpers
            return await campaign(ground)

    with _ended_by_signals(), new_world(server, template, sites) as world:
        figures: Mapping[str, Any] = run(main, world)
    return figures


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, for which trio unwinds its tasks."""

    def leave(_number: int, _frame: object) -> None:
        signal.raise_signal(signal.SIGINT)

    handlers: dict[int, Any] = {signal.SIGTERM: leave, signal.SIGHUP: leave}
    handlers[signal.SIGINT] = signal.default_int_handler  # a background job ignores it
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


MUST_BE_0: Final = (
    "lost",
    "duplicated",
    "corrupt_accepted",
    "quorum_broken",
    "late",
    "outside",
    "unreadable",
    "grown",
    "handlers_missed",
)


def told(figures: Mapping[str, Any], *, as_json: bool) -> int:
    """Print a campaign's figures; its exit status: 1 where one that must be 0 is not."""
    _print_table(figures)
    if as_json:
        print(json.dumps(figures))
    return 1 if any(figures.get(name) for name in MUST_BE_0) else 0


def _print_table(figures: Mapping[str, Any]) -> None:
    table = Table(*figures)
    table.add_row(*(str(value) for value in figures.values()))
    Console(stderr=True).print(table)
