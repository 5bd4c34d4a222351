"""The lab: a few sites on this machine, for tests of handlers."""

from __future__ import annotations

import atexit
import inspect
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from functools import cache, wraps
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeAlias

import trio
from attrs import define, field

from caxev import aio, failpoints
from caxev.config import Settings, Sites, load_sites
from caxev.config.data_types import CAX
from caxev.core.alarms import Alarm
from caxev.core.clock import clock, utcnow
from caxev.core.history import HistoryRow
from caxev.core.ledger import Reaction
from caxev.core.model import TRANSFERRED, CopyKey, Run, RunId
from caxev.core.registry import Handler, HandlerFunction, recorded
from caxev.core.selection import Selection
from caxev.core.update import RunUpdate
from caxev.database import Database, HistorySearch, open_database
from caxev.engine.listener import prepare
from caxev.engine.root_markers import init_roots
from caxev.engine.workers import Workers
from caxev.files import confine_own, digest_tree, to_nobody
from caxev.testing.mongod import ReplicaSet, drop
from caxev.testing.serving import Bench, serve, serve_apart

NAMES: Final = ("lngs", "chicago", "stockholm", "amsterdam", "zurich")
FILES: Final[Mapping[str, bytes]] = {"XENON1T-1.zip": b"events" * 100, "pax_info.json": b"{}"}
"""The files of a copy by default."""
SERVER: Final = "CAXEV_LAB_MONGO_URI"
PATIENCE: Final = 60.0
"""Maximum number of seconds for one site's turn."""
TURNS: Final = 50
"""Turns of all sites after which they count as never coming to rest."""

HandlerLike: TypeAlias = HandlerFunction | Handler | ModuleType
Test: TypeAlias = Callable[..., Coroutine[Any, Any, None]]


@define(eq=False)
class Lab:
    """Some sites with directories of their own, and a database; nothing happens by itself.

    `new_run`, `put`, `tag`, `set`, `change` and `update` make something happen, `settle` lets the
    sites react by the real watcher and dispatcher, `look`, `reactions`, `history`, `alarms` and
    `path` show the result. Faults: `crash_at`, `fail_at`. Time: `now`, `later`.
    """

    database: Database
    bench: Bench
    directory: Path
    _numbers: count[int] = field(init=False, factory=lambda: count(1))
    _crash: dict[str, str] = field(init=False, factory=dict)

    @property
    def sites(self) -> Sites:
        """The sites, as sites.json would give them."""
        return self.bench.sites

    @property
    def names(self) -> list[str]:
        """The sites' names; data is taken at the first."""
        return list(self.sites)

    # -- what happens -----------------------------------------------------------------------

    async def new_run(
        self,
        *,
        files: Mapping[str, bytes] | None = None,
        at: str | None = None,
        tags: Sequence[str] = (),
        **fields: Any,
    ) -> Run:
        """Add a run that was started now; with raw data, good and with digests, if `files` or `at`.

        `files` are contents by relative path; by default some are made up. `at` is the site,
        by default the first. `fields` are added to the document unchanged. Returns the run.
        """
        number, start = next(self._numbers), self.now()
        document = {
            "number": number,
            "name": f"{start:%y%m%d}_{number:04d}",
            "detector": "tpc",
            "start": start,
            "end": start,
            "tags": [{"name": name} for name in tags],
            "data": [],
            **fields,
        }
        if files is None and at is None:
            return await self.look(await self.database.insert_run(document))
        # In the same insert, as the DAQ does it: a handler never sees the run without its data.
        key = _raw(at or self.names[0])
        entry = await self._entry(document["name"], key, FILES if files is None else files)
        document["data"] = [{**entry, "status": TRANSFERRED}]
        return await self.look(await self.database.insert_run(document))

    async def put(
        self,
        run: Run | RunId,
        at: str | CopyKey,
        *,
        status: str = TRANSFERRED,
        files: Mapping[str, bytes] | None = None,
        **fields: Any,
    ) -> Run:
        """Put raw data of a run at a site, or any copy by its key; returns the changed run.

        By default the files are those of another copy of the same data, if there is one.
        """
        run, key = await self.look(run), _raw(at)
        if files is None:
            files = self._files_elsewhere(run, key)
        entry = await self._entry(run.name, key, files)
        return await self.update(RunUpdate.add_copy(run, key, status, **{**entry, **fields}))

    async def tag(self, run: Run | RunId, name: str) -> Run:
        """Give a run a tag."""
        return await self.update(RunUpdate.add_tag(await self.look(run), name))

    async def set(self, run: Run | RunId, **fields: Any) -> Run:
        """Set fields of a run; a dot in a name is written ``__``."""
        named = {name.replace("__", "."): value for name, value in fields.items()}
        return await self.update(RunUpdate.overwrite(await self.look(run), **named))

    async def change(
        self,
        run: Run | RunId,
        at: str | CopyKey,
        status: str,
        **fields: Any,
    ) -> Run:
        """Change a copy's entry."""
        run, key = await self.look(run), _raw(at)
        if (found := run.copy(key)) is None:
            raise LookupError(f"{run} has no {key}")
        return await self.update(RunUpdate.change_copy(run, found, status, **fields))

    async def update(self, update: RunUpdate) -> Run:
        """Write any update, as a person or another program would; returns the changed run.

        Raises LookupError if the run is not what the update expects.
        """
        run = await self.database.update_run(update, self.now())
        if run is None:
            raise LookupError(f"the run is not what this expects: {update.expect}")
        return run

    def _files_elsewhere(self, run: Run, key: CopyKey) -> Mapping[str, bytes]:
        for name in self.names:
            path = self.path(run, key.at(name))
            if path.is_dir():
                return {
                    str(file.relative_to(path)): file.read_bytes()
                    for file in path.rglob("*")
                    if file.is_file()
                }
        return FILES

    async def _entry(self, name: str, key: CopyKey, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Write the files of a copy; returns its entry with digests, as a listener writes it."""
        path = self._path(name, key)
        for file, content in files.items():
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_bytes(content)
        path.mkdir(parents=True, exist_ok=True)
        manifest = digest_tree(
            confine_own(str(path), [str(path.parent)]), sha512=True, report=to_nobody
        )
        # Before the entry, as a listener does it: handlers look up the manifest by its digest.
        await self.database.store_manifest(manifest.digest, manifest.to_rows())
        return {
            "type": key.type,
            "host": key.host,
            "location": str(path),
            "checksum": manifest.cax_checksum(),
            "manifest": manifest.digest,
            "creation_time": self.now(),
            "creation_place": key.host,
        }

    # -- time and faults --------------------------------------------------------------------

    @staticmethod
    def now() -> datetime:
        """Return the lab's time, UTC: the machine's, plus what `later` added."""
        return utcnow()

    @staticmethod
    def later(**much: float) -> None:
        """Let time pass for handlers and due reactions: ``lab.later(days=5)``."""
        clock.ahead += timedelta(**much)

    def crash_at(self, point: str, *, nth: int = 1, site: str | None = None) -> None:
        """Kill a site's listener when it passes a point the nth time, in the next `settle`.

        `points` returns the names of points, such as ``<handler>:database.update.before``. The
        listener is then a real process that is killed by SIGKILL, and the next one takes over.
        """
        self._crash[site or self.names[0]] = f"{point}:{nth}"

    @staticmethod
    def fail_at(point: str, error: Exception) -> None:
        """Raise an error when a point is next passed; an ``...after`` simulates a lost reply.

        Works for listeners in this process, not for their worker processes.
        """
        failpoints.errors[point] = error

    # -- reactions --------------------------------------------------------------------------

    async def settle(self, *sites: str) -> list[Reaction]:
        """Let these sites (or all) react until nothing is left to do; returns unfinished reactions.

        Those wait for their time, or have failed; [] if all are done. Raises AssertionError if a
        requested crash did not happen, or if the reactions never end.
        """
        for _ in range(TURNS):
            # At rest: a turn of all sites changes neither runs nor reactions.
            before = await self._state()
            for name in sites or self.names:
                await self._turn(name)
            if await self._state() == before:
                return await self.reactions()
        raise AssertionError(f"after {TURNS} turns the sites still react to each other")

    async def points(self, site: str | None = None) -> list[str]:
        """Let a site react in a process of its own; returns the crash points that it passed."""
        ended = await serve_apart(self.bench, self.database, site or self.names[0])
        return list(ended.points)

    async def _turn(self, site: str) -> None:
        with trio.fail_after(PATIENCE):
            if site in self._crash:
                await self._killed(site, self._crash.pop(site))
            # Right after a kill, as systemd would: until the site's next listener ends a killed
            # transaction, the others wait for its writes.
            await serve(self.bench, self.database, site)

    async def _killed(self, site: str, wanted: str) -> None:
        ended = await serve_apart(self.bench, self.database, site, wanted)
        if not ended.killed:
            passed = "\n  ".join(ended.points)
            raise AssertionError(f"{site} never passed {wanted}; what it passed:\n  {passed}")

    async def _state(self) -> object:
        selected = await self.database.select(Selection(), self.now())
        runs = await self.database.runs([run.id for run in selected])
        # As text: a NaN in a document is not equal to itself.
        return {id: repr(run.document) for id, run in runs.items()}, await self.reactions()  # noqa: A001

    # -- results ----------------------------------------------------------------------------

    async def look(self, run: Run | RunId) -> Run:
        """Return the current run. Raises LookupError if it is gone."""
        name = run.id if isinstance(run, Run) else run
        found = await self.database.runs([name])
        if name not in found:
            raise LookupError(f"there is no run {name}")
        return found[name]

    async def reactions(
        self, run: Run | None = None, *, handler: str | None = None
    ) -> list[Reaction]:
        """Return the sites' reactions that are not done: state, note, due time, attempts."""
        found = [reaction for reaction, _ in await self.database.reactions(handler=handler)]
        chosen = [reaction for reaction in found if run is None or reaction.run == run.id]
        return sorted(chosen, key=lambda reaction: reaction.id)

    async def history(
        self, run: Run | None = None, *, handler: str | None = None
    ) -> list[HistoryRow]:
        """Return what happened, the latest last: a row for each reaction that did something."""
        search = HistorySearch(runs=None if run is None else [run.id], handler=handler)
        pages = [page async for page in self.database.history_pages(search)]
        return [row for page in pages for row in page][::-1]

    async def alarms(self) -> list[Alarm]:
        """Return the active alarms."""
        return [one.alarm for one in await self.database.alarms() if one.active]

    def path(self, run: Run, at: str | CopyKey) -> Path:
        """Return the path of a site's raw data of a run, or of any copy, whether it exists or not.

        Raises LookupError if the site has no directory for such data.
        """
        return self._path(run.name, _raw(at))

    def _path(self, name: str, key: CopyKey) -> Path:
        directory = self.sites.get(key.host).directory(key.type, key.version)
        if directory is None:
            raise LookupError(f"there is no directory for {key}")
        return Path(directory) / name


def _raw(at: str | CopyKey) -> CopyKey:
    return at if isinstance(at, CopyKey) else CopyKey("raw", at)


# -- opening one ----------------------------------------------------------------------------------


@define(eq=False)
class Opening(AbstractAsyncContextManager[Lab]):
    """A lab to be opened: by ``async with``, or, as a decorator, for each run of a test."""

    _handlers: tuple[Handler, ...]
    _sites: Mapping[str, Mapping[str, Any]]
    _types: Sequence[Mapping[str, Any]]
    _mongo_uri: str | None
    _stack: AsyncExitStack = field(init=False, factory=AsyncExitStack)

    def __call__(self, test: Test) -> Callable[..., None]:
        """Run an async test under trio, with a new lab as its first argument."""

        @wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            async def play() -> None:
                async with self._open() as here:
                    await test(here, *args, **kwargs)

            trio.run(play)

        signature = inspect.signature(test)
        others = list(signature.parameters.values())[1:]
        # pytest would take the lab for a fixture, from the signature or the wrapped function.
        del run.__wrapped__
        run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return run

    async def __aenter__(self) -> Lab:
        return await self._stack.enter_async_context(self._open())

    async def __aexit__(self, *failure: object) -> bool | None:
        return await self._stack.__aexit__(*failure)  # type: ignore[arg-type]  # three, as ours

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Lab]:
        uri = self._mongo_uri or os.environ.get(SERVER)
        if uri is None:
            uri = (await trio.to_thread.run_sync(_server)).uri
        name = f"lab_{secrets.token_hex(6)}"
        settings = Settings.load(mongo_uri=uri, database=name, environ={})
        with tempfile.TemporaryDirectory(prefix="caxev-lab-") as directory:
            sites = _laid_out(Path(directory), self._sites, self._types)
            try:
                async with aio.loop(), open_database(settings) as database, Workers() as workers:
                    await prepare(database)
                    for site in sites.values():
                        if site.listener:
                            await init_roots(database, site, sites, force=False)
                    bench = Bench(settings, sites, self._handlers, workers)
                    yield Lab(database, bench, Path(directory))
            finally:
                # The clock and the errors are global: the next test must not inherit them.
                clock.ahead = timedelta()
                failpoints.errors.clear()
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(drop, uri, name)


def lab(
    *reactions: HandlerLike,
    sites: int | Mapping[str, Mapping[str, Any]] = 1,
    types: Sequence[Mapping[str, Any]] = (),
    mongo_uri: str | None = None,
) -> Opening:
    """Return a lab in which these reactions are enabled at every site; see the package.

    A reaction is a function decorated by ``@on``, or a module with all of its reactions. `sites` is
    their number, or the entry in sites.json of each by its name; each has a directory for every
    type of data, and is reached by ``local``. `types` are the further types of sites.json. The
    server is `mongo_uri`, else that in
    ``CAXEV_LAB_MONGO_URI``, else a mongod that this process starts once and stops when it ends.

    Raises TypeError for anything but reactions, `ConfigError` for invalid sites.
    """
    handlers = tuple(handler for one in reactions for handler in _handlers(one))
    given = {name: {} for name in NAMES[:sites]} if isinstance(sites, int) else sites
    if not given or (isinstance(sites, int) and len(given) < sites):
        raise ValueError(f"sites={sites}: 1 to {len(NAMES)}, or a dict by name")
    return Opening(handlers, given, types, mongo_uri)


def _handlers(reaction: HandlerLike) -> list[Handler]:
    if isinstance(reaction, Handler):
        return [reaction]
    if isinstance(reaction, ModuleType):
        found = [one for one in recorded if one.module == reaction.__name__]
    else:
        found = [one for one in recorded if one.function is reaction]
    if not found:
        raise TypeError(f"{reaction!r} is no reaction: decorate an async function with @on(...)")
    return found


def _laid_out(
    directory: Path, sites: Mapping[str, Mapping[str, Any]], types: Sequence[Mapping[str, Any]]
) -> Sites:
    """Write a sites.json and create the directories in it."""
    kinds = [*CAX.by_name, *(one["name"] for one in types)]
    entries = []
    for name, given in sites.items():
        base = directory / name
        kept = {f"dir_{kind}": str(base / kind) for kind in kinds}
        state = {"state": str(directory / "state")}
        entries.append({"name": name, "method": "local", **kept, **state, **given})
    file = directory / "sites.json"
    file.write_text(json.dumps({"types": list(types), "sites": entries} if types else entries))
    loaded = load_sites(file)
    for root in (root for site in loaded.values() for root in site.marked):
        Path(root).mkdir(parents=True, exist_ok=True)
    return loaded


# One server for all labs of this process, each of which has a database of its own.
@cache
def _server() -> ReplicaSet:
    """Start this process's mongod. Blocks. Raises `ConfigError` if none is installed."""
    directory = Path(tempfile.mkdtemp(prefix="caxev-lab-mongod-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    server = ReplicaSet(directory)
    atexit.register(server.stop)
    server.start()
    return server
