"""A lab: a few sites on this machine, in which a test lets things happen."""

from __future__ import annotations

import atexit
import inspect
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime, timedelta
from functools import cache, wraps
from itertools import count
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final, TypeAlias

import trio
from attrs import define, field

from caxev import aio, failpoints
from caxev.config import Settings, Site, Sites, load_sites
from caxev.core.alarms import Alarm
from caxev.core.clock import clock, utcnow
from caxev.core.ledger import Reaction, State
from caxev.core.model import TRANSFERRED, CopyKey, Run, RunId, RunUpdate
from caxev.core.registry import Handler, HandlerFunction, recorded
from caxev.database import Database, Selection
from caxev.engine.listener import open_database, prepare
from caxev.files import digest_tree
from caxev.testing.mongod import ReplicaSet, drop
from caxev.testing.serving import Bench, serve, serve_apart

NAMES: Final = ("lngs", "chicago", "stockholm", "amsterdam", "zurich")
FILES: Final[Mapping[str, bytes]] = {"XENON1T-1.zip": b"events" * 100, "pax_info.json": b"{}"}
"""What a copy holds unless the test says otherwise."""
SERVER: Final = "CAXEV_LAB_MONGO_URI"
PATIENCE: Final = 60.0
"""Seconds that one site's turn may take."""
TURNS: Final = 50
"""Turns of all sites after which they are taken never to come to rest."""

HandlerLike: TypeAlias = HandlerFunction | Handler | ModuleType
Test: TypeAlias = Callable[..., Coroutine[Any, Any, None]]


@define(eq=False)
class Lab:
    """Some sites with directories of their own, and a database; nothing happens by itself.

    `new_run`, `put`, `tag`, `set`, `change` and `update` make something happen, `settle` lets the
    sites react to it by the real watcher and dispatcher, `look`, `reactions`, `alarms` and `path`
    show what came of it. Faults: `crash_at`, `fail_at`. Time: `now`, `later`.
    """

    database: Database
    bench: Bench
    directory: Path
    _numbers: count[int] = field(init=False, factory=lambda: count(1))
    _crash: dict[str, str] = field(init=False, factory=dict)

    @property
    def sites(self) -> Sites:
        return self.bench.sites

    @property
    def names(self) -> list[str]:
        """The sites' names; the first is where data is born."""
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
        """Add a run that was started now; with `files` or `at`, its raw data stands there too.

        `fields` go into the document as they are.
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
        # Its data is there as soon as the run is: as the DAQ does it.
        document["data"] = [await self._entry(document["name"], at or self.names[0], files)]
        return await self.look(await self.database.insert_run(document))

    async def put(
        self,
        run: Run | RunId,
        at: str,
        *,
        type: str = "raw",  # noqa: A002  # the field's own name
        version: str | None = None,
        status: str = TRANSFERRED,
        files: Mapping[str, bytes] | None = None,
        **fields: Any,
    ) -> Run:
        """Put a copy of a run at a site, with its bytes and its entry; the run as it is then.

        Without `files` they are those of a copy of such data elsewhere, if there is one.
        """
        run = await self.look(run)
        if files is None:
            files = self._files_elsewhere(run, type, version)
        entry = await self._entry(run.name, at, files, type, version)
        key = CopyKey(type, at, version)
        given = {k: v for k, v in entry.items() if k not in {"type", "host", "status"}}
        given.pop("pax_version", None)
        return await self.update(RunUpdate.add_copy(run, key, status, **{**given, **fields}))

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
        at: str,
        status: str,
        *,
        type: str = "raw",  # noqa: A002  # the field's own name
        version: str | None = None,
        **fields: Any,
    ) -> Run:
        """Change a copy's entry."""
        run = await self.look(run)
        found = run.copy(CopyKey(type, at, version))
        if found is None:
            raise LookupError(f"{run} has no {type} {version or ''} at {at}")
        return await self.update(RunUpdate.change_copy(run, found, status, **fields))

    async def update(self, update: RunUpdate) -> Run:
        """Write any update, as a person or another program would; the run as it is then.

        Raises LookupError where the run is not what the update expects.
        """
        run = await self.database.update_run(update, self.now())
        if run is None:
            raise LookupError(f"the run is not what this expects: {update.expect}")
        return run

    def _files_elsewhere(self, run: Run, type: str, version: str | None) -> Mapping[str, bytes]:  # noqa: A002
        for name in self.names:
            path = self.path(run, name, type=type, version=version)
            if path.is_dir():
                return {
                    str(file.relative_to(path)): file.read_bytes()
                    for file in path.rglob("*")
                    if file.is_file()
                }
        return FILES

    async def _entry(
        self,
        name: str,
        at: str,
        files: Mapping[str, bytes] | None,
        type: str = "raw",  # noqa: A002  # the field's own name
        version: str | None = None,
    ) -> dict[str, Any]:
        """Write the bytes of a copy; its entry, with digests, as a listener would leave it."""
        path = self._path(name, at, type, version)
        for file, content in (FILES if files is None else files).items():
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_bytes(content)
        path.mkdir(parents=True, exist_ok=True)
        manifest = digest_tree(str(path), sha512=True, report=lambda _done, _total: None)
        await self.database.store_manifest(manifest.digest, manifest.to_rows())
        entry = {
            "type": type,
            "host": at,
            "status": TRANSFERRED,
            "location": str(path),
            "checksum": manifest.cax_checksum(),
            "manifest": manifest.digest,
            "creation_time": self.now(),
            "creation_place": at,
        }
        return entry if version is None else {**entry, "pax_version": version}

    # -- time and faults --------------------------------------------------------------------

    @staticmethod
    def now() -> datetime:
        """The lab's time, UTC: the machine's, and what `later` added to it."""
        return utcnow()

    @staticmethod
    def later(**much: float) -> None:
        """Let time pass, for handlers and for what is due: ``lab.later(days=5)``."""
        clock.ahead += timedelta(**much)

    def crash_at(self, point: str, *, nth: int = 1, site: str | None = None) -> None:
        """In the next `settle`, kill a site's listener when it passes a point the nth time.

        The point is one of those that `points` tells: ``<handler>:database.update.before``. The
        listener is a real process then, and dies by SIGKILL; the next one takes over from it.
        """
        self._crash[site or self.names[0]] = f"{point}:{nth}"

    @staticmethod
    def fail_at(point: str, error: Exception) -> None:
        """Raise an error when a point is next passed: an ``...after`` is a reply that got lost.

        Holds for what listeners of this process write, not for their worker processes.
        """
        failpoints.errors[point] = error

    # -- reactions --------------------------------------------------------------------------

    async def settle(self, *sites: str) -> list[Reaction]:
        """Let these sites (or all) react until nothing is left to do; what is still owed then.

        That is what waits for its time, and what has failed: [] where all is done. Raises
        AssertionError where a crash that was asked for did not come, or where there is no end.
        """
        for _ in range(TURNS):
            before = await self._state()
            for name in sites or self.names:
                await self._turn(name)
            if await self._state() == before:
                return [
                    reaction
                    for reaction in await self.reactions()
                    if reaction.state is not State.DONE
                ]
        raise AssertionError(f"after {TURNS} turns the sites still react to each other")

    async def points(self, site: str | None = None) -> list[str]:
        """Let a site react in a process of its own; the crash points that it passed."""
        ended = await serve_apart(self.bench, self.database, site or self.names[0])
        return list(ended.points)

    async def _turn(self, site: str) -> None:
        with trio.fail_after(PATIENCE):
            if site in self._crash:
                await self._killed(site, self._crash.pop(site))
            # After a kill at once, as systemd would: a transaction that was killed is ended by the
            # site's next listener, and others wait for what it wrote until then.
            await serve(self.bench, self.database, site)

    async def _killed(self, site: str, wanted: str) -> None:
        ended = await serve_apart(self.bench, self.database, site, wanted)
        if not ended.killed:
            passed = "\n  ".join(ended.points)
            raise AssertionError(f"{site} never passed {wanted}; what it passed:\n  {passed}")

    async def _state(self) -> object:
        runs = await self.database.runs([run.id for run in await self._runs()])
        return {id: run.document for id, run in runs.items()}, await self.reactions()  # noqa: A001

    async def _runs(self) -> list[Run]:
        return await self.database.select(Selection(), self.now())

    # -- what came of it --------------------------------------------------------------------

    async def look(self, run: Run | RunId) -> Run:
        """The run as it is now. Raises LookupError where it is gone."""
        name = run.id if isinstance(run, Run) else run
        found = await self.database.runs([name])
        if name not in found:
            raise LookupError(f"there is no run {name}")
        return found[name]

    async def reactions(
        self, run: Run | None = None, *, handler: str | None = None
    ) -> list[Reaction]:
        """The reactions that the sites owe or have paid: state, note, due time, attempts."""
        found = [reaction for reaction, _ in await self.database.reactions(handler=handler)]
        chosen = [reaction for reaction in found if run is None or reaction.run == run.id]
        return sorted(chosen, key=lambda reaction: reaction.id)

    async def alarms(self) -> list[Alarm]:
        """The alarms that stand."""
        return [one.alarm for one in await self.database.alarms() if one.active]

    def path(
        self,
        run: Run,
        at: str,
        *,
        type: str = "raw",  # noqa: A002  # the field's own name
        version: str | None = None,
    ) -> Path:
        """Where a site keeps its copy of a run, whether it has one or not."""
        return self._path(run.name, at, type, version)

    def _path(self, name: str, at: str, type: str, version: str | None) -> Path:  # noqa: A002
        directory = self.sites.get(at).directory(type, version)
        if directory is None:
            raise LookupError(f"{at} has no directory for {type} data {version or ''}")
        return Path(directory) / name


# -- opening one ----------------------------------------------------------------------------------


@define(eq=False)
class Opening(AbstractAsyncContextManager[Lab]):
    """A lab to be opened: by ``async with``, or, as a decorator, for each run of a test."""

    _handlers: tuple[Handler, ...]
    _sites: Mapping[str, Mapping[str, Any]]
    _mongo_uri: str | None
    _opened: AbstractAsyncContextManager[Lab] | None = field(init=False, default=None)

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
        del run.__wrapped__  # pytest must not see the lab
        run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return run

    async def __aenter__(self) -> Lab:
        self._opened = self._open()
        return await self._opened.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        assert self._opened is not None
        return await self._opened.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Lab]:
        uri = self._mongo_uri or os.environ.get(SERVER)
        if uri is None:
            uri = (await trio.to_thread.run_sync(_server)).uri
        name = f"lab_{secrets.token_hex(6)}"
        settings = Settings.load(mongo_uri=uri, database=name, environ={})
        with tempfile.TemporaryDirectory(prefix="caxev-lab-") as directory:
            sites = _laid_out(Path(directory), self._sites)
            try:
                async with aio.loop(), open_database(settings) as database:
                    await prepare(database)
                    yield Lab(database, Bench(settings, sites, self._handlers), Path(directory))
            finally:
                clock.ahead = timedelta()
                failpoints.errors.clear()
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(drop, uri, name)


def lab(
    *reactions: HandlerLike,
    sites: int | Mapping[str, Mapping[str, Any]] = 1,
    mongo_uri: str | None = None,
) -> Opening:
    """Return a lab in which these reactions are enabled at every site; see the package.

    A reaction is a function decorated by ``@on``, or a module for all of its. `sites` are so many,
    or what stands in sites.json for each by its name; each has a directory for every type of data,
    and is reached by ``local``. The server is `mongo_uri`, else what ``CAXEV_LAB_MONGO_URI`` names,
    else a mongod that this process starts once and takes along when it ends.

    Raises TypeError for what is no reaction, `ConfigError` for what no site can have.
    """
    handlers = tuple(handler for one in reactions for handler in _handlers(one))
    given = {name: {} for name in NAMES[:sites]} if isinstance(sites, int) else sites
    if not given or (isinstance(sites, int) and len(given) < sites):
        raise ValueError(f"sites={sites}: 1 to {len(NAMES)}, or a dict by name")
    return Opening(handlers, given, mongo_uri)


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


def _laid_out(directory: Path, sites: Mapping[str, Mapping[str, Any]]) -> Sites:
    """Write a sites.json and make the directories that stand in it."""
    entries = []
    for name, given in sites.items():
        base = directory / name
        kept = {f"dir_{kind}": str(base / kind) for kind in ("raw", "processed", "minitrees")}
        state = {"state": str(directory / "state")}
        entries.append({"name": name, "method": "local", **kept, **state, **given})
    file = directory / "sites.json"
    file.write_text(json.dumps(entries))
    loaded = load_sites(file)
    for site in loaded.values():
        _make_directories(site)
    return loaded


def _make_directories(site: Site) -> None:
    for root in site.marked:
        Path(root).mkdir(parents=True, exist_ok=True)


@cache
def _server() -> ReplicaSet:
    """Start this process's mongod. Blocks. Raises `ConfigError` where there is none to start."""
    directory = Path(tempfile.mkdtemp(prefix="caxev-lab-mongod-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    server = ReplicaSet(directory)
    atexit.register(server.stop)
    server.start()
    return server
