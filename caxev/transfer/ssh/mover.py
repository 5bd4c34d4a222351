"""Pull and push a copy. The entry points are plain functions that run in a worker process.

Both write to a hidden partial beside the copy's final name, bring it to the disk, and rename it. If
an attempt is killed, the partial stays and the next attempt resumes it; if the rename had happened,
the next attempt finds the copy and returns.

Bytes go through SFTP, over several connections if that is worth it. If the far account can start
``caxev receive``, small files go through that in one stream, and it reads the far disk.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, asynccontextmanager
from functools import partial as bound
from typing import Any, Final, Literal, TypeVar

import asyncssh
from attrs import evolve, field, frozen

from caxev import aio, failpoints
from caxev.core.errors import GiveUp, Retry
from caxev.files import (
    PART,
    Item,
    Manifest,
    Moved,
    Piece,
    Plan,
    Range,
    Report,
    Seen,
    StagedCopy,
    check_expected,
    confine,
    damaged,
    filling_up,
    item_digest,
    known_items,
    look,
    manifest_of,
    partial_path,
    plan,
    printable,
    root_rows,
    shown,
)
from caxev.transfer.receive import (
    STREAMED,
    item_rows,
    manifest_from,
    piece_rows,
    pieces_from,
    seen_from,
    seen_rows,
)
from caxev.transfer.ssh.agent import Agent, agent_on, shaped
from caxev.transfer.ssh.chunks import Handout, Progress, RateMeter
from caxev.transfer.ssh.endpoint import Endpoint, connected, started, translated
from caxev.transfer.ssh.landing import land, only_pusher, publish
from caxev.transfer.ssh.pipeline import Digests, Haul, changed
from caxev.transfer.ssh.plan import Transfer
from caxev.transfer.ssh.pool import Crew, crew_on, merged, weight_of
from caxev.transfer.ssh.remote import GONE, Remote, cancelled
from caxev.transfer.ssh.streams import receive_stream, send_stream

T = TypeVar("T")

_MANY: Final = 16  # small files that make it worth to wait for a receiver
_HANDSHAKE: Final = 8  # round trips until a connection is open
_LOOK_AT_DISK: Final = 5.0  # seconds between two checks of the free space


def pull(transfer: Transfer, *, report: Report) -> Moved:
    """Copy the tree at `remote_path` to `local_path`, which must not be there yet.

    Files keep their times; modes are 0644 and 0755. Raises `GiveUp` if a path leads out of its
    roots, the source is gone or holds what a copy must not, the host or our key is refused, or
    something else is at `local_path`; `Damaged` if the source does not match the manifest; `Retry`
    for all that may pass. The partial stays, and the next call resumes it.
    """
    return aio.run(_run(transfer, _pull, report, _asking(transfer, do="send")))


def push(transfer: Transfer, *, report: Report) -> Moved:
    """Copy the tree at `local_path` to `remote_path`, which must not be there yet. As `pull`."""
    return aio.run(_pushing(transfer, report))


def remote_manifest(transfer: Transfer, *, report: Report) -> Manifest:
    """Return the manifest of the copy at `remote_path`, read from its disk. Raises as `pull`.

    ``caxev receive`` reads the copy there if it can be started; else it is read back.
    """
    request = _asking(transfer, do="digest", max_rate=transfer.max_rate)
    return aio.run(_run(transfer, _remote_manifest, report, request))


def check(endpoint: Endpoint) -> str:
    """Connect, start SFTP; return the server's version and home directory. Raises as `pull`."""
    return aio.run(_check(endpoint))


@frozen
class _Work:
    """The state that all steps of a transfer share."""

    transfer: Transfer
    crew: Crew
    starting: asyncio.Task[Agent | None] | None
    report: Report = field(repr=False)
    agent: Agent | None = None
    untimed: set[bytes] = field(factory=set, repr=False)

    @property
    def remote(self) -> Remote:
        return self.crew.remote

    async def with_agent(self) -> _Work:
        """Return the same work with the receiver, if the far account has started one."""
        return evolve(self, agent=None if self.starting is None else await self.starting)

    async def confined(self) -> bytes:
        try:
            return await self.crew.answer()
        except GONE:
            return await self.remote.confine(self.transfer.remote_path, self.transfer.remote_roots)

    async def look(self, path: bytes) -> list[Seen]:
        try:
            return await self.remote.look(path)
        except GONE as exc:
            raise GiveUp(f"source directory gone: {self.remote.shown(path)}") from exc

    def progress(self, todo: Plan, source: Sequence[Seen]) -> Progress:
        total = sum(seen.size for seen in source)
        return Progress(self.report, total, total - todo.left)

    async def move(
        self,
        do: Literal["pull", "push", "read"],
        ends: tuple[bytes, bytes],
        pieces: Sequence[Piece],
        progress: Progress,
        *,
        ordered: bool = False,
        pace: RateMeter | None = None,
    ) -> Digests:
        """Move these pieces of the trees at the two `ends`, here and there, over SFTP."""
        if not pieces:
            return {}
        self.crew.call(weight_of(piece.left for piece in pieces))
        pace = pace or RateMeter(self.transfer.max_rate)
        handout = Handout.of(pieces, ahead=self.transfer.unsure if ordered else None)
        known = {} if do == "read" else known_items(self.transfer.expected)
        # A file that was moved out of order may get its final time, which marks it as whole, only
        # when all are whole: hence `finishing` is `ordered`.
        haul = Haul(do, *ends, handout, pace, progress, ordered, known, self.untimed)
        return await self.crew.move(haul)


async def _run(
    transfer: Transfer,
    function: Callable[[_Work], Awaitable[T]],
    report: Report,
    request: Awaitable[Mapping[str, object]],
    *,
    above: bool = False,
) -> T:
    """Connect to the other side and call `function`; `request` is the receiver's request.

    The real path of the copy there, or with `above` of its directory, is requested at once, so that
    the answer comes while we do other things.
    """
    endpoint, weight, began = transfer.endpoint, _weight(transfer), time.monotonic()
    asking = asyncio.ensure_future(request)  # a coroutine that nobody awaits would warn
    path = os.fsencode(transfer.remote_path)
    first = bound(
        Remote.confine_known,
        path=os.path.dirname(path) if above else path,
        roots=transfer.remote_roots,
        at=above,
    )
    try:
        with translated(endpoint, transfer.remote_path):
            async with connected(endpoint) as connection:
                guess = (time.monotonic() - began) / _HANDSHAKE
                async with (
                    _starting(transfer, connection, asking) as starting,
                    crew_on(
                        connection,
                        endpoint,
                        transfer.nstreams,
                        weight=weight,
                        round_trip=guess,
                        first=first,
                    ) as crew,
                    crew.remote.steady(),
                ):
                    return await function(_Work(transfer, crew, starting, report))
    finally:
        await cancelled([asking])


async def _asking(transfer: Transfer, **request: object) -> Mapping[str, object]:
    place = {"path": transfer.remote_path, "roots": root_rows(transfer.remote_roots)}
    return {**place, **request}


def _weight(transfer: Transfer) -> int:
    """Estimate the work from the manifest, before either side is listed."""
    if transfer.expected is None or transfer.again:
        return 0
    sizes = (item.size for item in transfer.expected.files)
    if transfer.agent is not None:
        sizes = (size for size in sizes if size > STREAMED)
    return weight_of(sizes)


@asynccontextmanager
async def _starting(
    transfer: Transfer,
    connection: asyncssh.SSHClientConnection,
    request: Awaitable[Mapping[str, object]],
) -> AsyncIterator[asyncio.Task[Agent | None] | None]:
    """Start a receiver at the far account during the block; None if the site names none."""
    if transfer.agent is None:
        yield None
        return
    agent = agent_on(connection, transfer.endpoint, transfer.agent, request)
    starting = asyncio.create_task(agent)
    try:
        yield starting
    finally:
        await cancelled([starting])


# -- pulling ----------------------------------------------------------------------------------


async def _pull(work: _Work) -> Moved:
    began = time.monotonic()
    transfer = work.transfer
    final = confine(transfer.local_path, transfer.local_roots)
    work, there, source = await _listed(work)
    check_expected(source, transfer.expected, _place(work))
    arrival = StagedCopy(
        final,
        transfer.local_roots,
        source,
        transfer.expected,
        transfer.min_free,
        unsure=transfer.unsure,
        again=transfer.again,
        origin=transfer.origin,
        report=work.report,
    )
    if arrival.stands():
        return _stood(source, began)
    with ExitStack() as held:
        # In a thread: existing data may have to be read, and the connection must stay alive.
        todo = await asyncio.to_thread(held.enter_context, arrival.opened())
        failpoints.point("files.prepare")
        progress = work.progress(todo, source)
        digests = await _while_space(
            _fetch_all(work, there, arrival, todo, progress),
            transfer.min_free,
            bound(asyncio.to_thread, arrival.free),
            final,
        )
        _check_digests(digests, transfer.expected, _place(work))
        # The source is listed again while we finish, but the rename waits for the answer.
        looking = asyncio.create_task(_unchanged(work, there, source))
        try:
            await asyncio.to_thread(arrival.finish, todo)
            if not await looking:
                raise changed(_place(work))
        finally:
            await cancelled([looking])
        await asyncio.to_thread(arrival.publish)
    return _moved(source, progress, digests, transfer.expected, began)


def _place(work: _Work) -> str:
    return f"{work.transfer.endpoint}:{printable(os.fsencode(work.transfer.remote_path))}"


async def _listed(work: _Work) -> tuple[_Work, bytes, list[Seen]]:
    """List the source over SFTP or by the receiver, and return the work with the better one.

    A receiver takes time to start, but then needs a single request for the whole tree. If many
    small files are known to come, only the receiver is asked.
    """
    if work.starting is None:
        return work, *await _listed_over_sftp(work)
    expected = work.transfer.expected
    by_agent = asyncio.create_task(_listed_by_agent(work.starting))
    asking: list[asyncio.Task[Any]] = [by_agent]
    try:
        if expected is None or _count_small(expected.items) < _MANY:
            over_sftp = asyncio.create_task(_listed_over_sftp(work))
            asking.append(over_sftp)
            await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            if over_sftp.done() and _count_small((await over_sftp)[1]) < _MANY:
                return work, *over_sftp.result()
        agent = await by_agent
        if agent is None:
            return work, *await _listed_over_sftp(work)
        return evolve(work, agent=agent[0]), os.fsencode(work.transfer.remote_path), agent[1]
    finally:
        await cancelled(asking)


async def _listed_over_sftp(work: _Work) -> tuple[bytes, list[Seen]]:
    path = await work.confined()
    return path, await work.look(path)


async def _listed_by_agent(
    starting: asyncio.Task[Agent | None],
) -> tuple[Agent, list[Seen]] | None:
    agent = await starting
    if agent is None:
        return None
    answer = await agent.answer()
    with shaped(agent.endpoint):
        return agent, seen_from(answer["source"])


def _count_small(source: Iterable[Seen | Item]) -> int:
    return sum(seen.kind == "file" and seen.size <= STREAMED for seen in source)


async def _unchanged(work: _Work, path: bytes, source: list[Seen]) -> bool:
    if work.agent is None:
        return await work.look(path) == source
    await work.agent.ask(check=True)
    return bool((await work.agent.answer()).get("same"))


async def _fetch_all(
    work: _Work, there: bytes, arrival: StagedCopy, todo: Plan, progress: Progress
) -> Digests:
    transfer, partial = work.transfer, arrival.partial
    small, large = _sorted_out(todo.pieces, work.agent)
    ordered = not _is_known(transfer)
    if work.agent is None:
        return await work.move("pull", (partial, there), large, progress, ordered=ordered)
    await work.agent.ask(pieces=piece_rows(small, arrival.source))
    if large:  # the receiver resolves its own paths, SFTP needs the real one
        there = await work.crew.answer()
    pace = RateMeter(transfer.max_rate)
    return await _both(
        receive_stream(work.agent, partial, small, pace, progress),
        work.move("pull", (partial, there), large, progress, ordered=ordered, pace=pace),
    )


def _is_known(transfer: Transfer) -> bool:
    """Return whether files may be moved out of order: digests show which parts have arrived."""
    expected = transfer.expected
    return expected is not None and len(known_items(expected)) == len(expected.files)


def _sorted_out(pieces: Sequence[Piece], agent: Agent | None) -> tuple[list[Piece], list[Piece]]:
    """Return the pieces that go through the agent's stream, and those that go through SFTP."""
    if agent is None:
        return [], list(pieces)
    return (
        [piece for piece in pieces if piece.left <= STREAMED],
        [piece for piece in pieces if piece.left > STREAMED],
    )


async def _both(*moving: Awaitable[Digests]) -> Digests:
    tasks = [asyncio.ensure_future(one) for one in moving]
    try:
        return merged(await asyncio.gather(*tasks))
    finally:
        await cancelled(tasks)


# -- pushing ----------------------------------------------------------------------------------


async def _pushing(transfer: Transfer, report: Report) -> Moved:
    here = confine(transfer.local_path, transfer.local_roots)
    looking = asyncio.create_task(asyncio.to_thread(_as_expected, transfer, here))
    try:
        request = _offer(transfer, looking)
        return await _run(transfer, bound(_push, here, looking), report, request, above=True)
    except Retry:
        await looking  # an error of the source comes first: it may be permanent
        raise
    finally:
        await cancelled([looking])


def _as_expected(transfer: Transfer, here: str) -> list[Seen]:
    source = _look_here(here)
    check_expected(source, transfer.expected, shown(here))
    return source


async def _offer(transfer: Transfer, looking: Awaitable[list[Seen]]) -> Mapping[str, object]:
    source = await asyncio.shield(looking)  # `_push` needs it even if this request is cancelled
    return await _asking(
        transfer,
        do="receive",
        source=seen_rows(source),
        expected=item_rows(transfer.expected) if transfer.expected is not None else None,
        min_free=transfer.min_free,
        unsure=transfer.unsure,
        again=transfer.again,
        origin=transfer.origin,
    )


async def _push(here: str, looking: Awaitable[list[Seen]], work: _Work) -> Moved:
    began = time.monotonic()
    source = await looking
    work = await work.with_agent()
    push = _push_to_agent if work.agent is not None else _push_over_sftp
    moved = await push(work, here, source)
    if moved is None:
        return _stood(source, began)
    progress, digests = moved
    return _moved(source, progress, digests, work.transfer.expected, began)


async def _push_to_agent(
    work: _Work, here: str, source: list[Seen]
) -> tuple[Progress, Digests] | None:
    agent, transfer = work.agent, work.transfer
    assert agent is not None
    answer = await agent.answer(work.report)
    if answer.get("stands"):
        return None
    failpoints.point("ssh.prepare")
    with shaped(agent.endpoint):
        partial = os.fsencode(answer["partial"])
        pieces = pieces_from(answer["pieces"], source)
    todo = Plan((), (), tuple(pieces), ())
    progress = work.progress(todo, source)
    small, large = _sorted_out(pieces, agent)
    if large:
        await _check_partial(work, partial)
    root, pace, ordered = os.fsencode(here), RateMeter(transfer.max_rate), not _is_known(transfer)
    digests = await _while_space(
        _both(
            send_stream(agent, root, small, pace, progress),
            work.move("push", (root, partial), large, progress, ordered=ordered, pace=pace),
        ),
        transfer.min_free,
        bound(work.remote.free, os.path.dirname(partial)),
        _place(work),
    )
    await agent.ask(finish=True)  # it syncs to its disk while we list the source again
    await _check_source(here, source, digests, transfer.expected)
    await agent.ask(publish=True)
    failpoints.point("ssh.publish.rename")
    await agent.answer()
    return progress, digests


async def _check_partial(work: _Work, partial: bytes) -> None:
    """Check that the partial that the far end reports is inside the roots over SFTP, too."""
    # A receiver may run in another root directory (chroot) than the SFTP server, or lie.
    directory, name = os.path.split(partial)
    wanted = os.path.basename(partial_path(work.transfer.remote_path))
    try:
        real = await work.crew.answer()
    except (*GONE, GiveUp):
        real = b""
    if real != directory:  # it did not exist yet, or the copy's path is a link
        real = await work.remote.confine_known(directory, work.transfer.remote_roots, at=True)
    if name != os.fsencode(wanted) or real != directory:
        raise GiveUp(f"{_place(work)} is another place over SFTP than where commands run")


async def _check_source(
    here: str, source: list[Seen], digests: Digests, expected: Manifest | None
) -> None:
    """Raise an error if what was sent does not match the manifest, or the source has changed."""
    _check_digests(digests, expected, shown(here))
    if await asyncio.to_thread(_look_here, here) != source:
        raise changed(shown(here))


async def _push_over_sftp(
    work: _Work, here: str, source: list[Seen]
) -> tuple[Progress, Digests] | None:
    transfer, remote = work.transfer, work.remote
    wrong = _wrong(transfer, source)
    with only_pusher(str(transfer.endpoint), os.fsencode(transfer.remote_path)):
        landing = await land(
            remote,
            transfer.remote_path,
            transfer.remote_roots,
            source,
            min_free=transfer.min_free,
            again=transfer.again,
            unsure=transfer.unsure,
            wrong=wrong,
            origin=transfer.origin,
        )
        todo = landing.todo
        if todo is None:
            return None
        failpoints.point("ssh.prepare")
        progress = work.progress(todo, source)
        ends = os.fsencode(here), landing.partial
        digests = await _while_space(
            work.move("push", ends, todo.pieces, progress, ordered=True),
            transfer.min_free,
            bound(remote.free, os.path.dirname(landing.final)),
            remote.shown(landing.final),
        )
        await _check_source(here, source, digests, transfer.expected)
        unsynced = _unsynced(source, todo, wrong)
        untimed = [seen for seen in source if seen.path in work.untimed and seen not in unsynced]
        await publish(remote, landing, source, unsynced=[*unsynced, *untimed])
    return progress, digests


def _unsynced(
    source: Sequence[Seen], todo: Plan, wrong: Mapping[bytes, Sequence[Range]]
) -> list[Seen]:
    """Return the files of a repair that were sent nothing; the others are finished already."""
    sent = {piece.file.path for piece in todo.pieces}
    return [seen for seen in source if seen.path in wrong.keys() - sent]


def _wrong(transfer: Transfer, source: Sequence[Seen]) -> Mapping[bytes, Sequence[Range]]:
    """Return the bad ranges of a copy that is to be repaired: all, unless it was read back."""
    if not transfer.again:
        return {}
    wrong: dict[bytes, Sequence[Range]] = {
        seen.path: [(0, seen.size)] for seen in source if seen.kind == "file"
    }
    good, found = known_items(transfer.expected), known_items(transfer.found)
    for path in wrong.keys() & good.keys() & found.keys():
        wrong[path] = good[path].wrong_in(found[path])
    return wrong


def _look_here(path: str) -> list[Seen]:
    if not os.path.lexists(path):
        raise GiveUp(f"source directory gone: {shown(path)}")
    return look(path)


# -- both ways --------------------------------------------------------------------------------


async def _while_space(
    moving: Awaitable[T], min_free: int, free: Callable[[], Awaitable[int | None]], where: str
) -> T:
    """Await `moving` while `min_free` bytes stay free; else raise `Retry`."""
    if not min_free:
        return await moving
    # Other programs write to that disk too, so the check before the transfer is not enough.
    mover = asyncio.ensure_future(moving)
    watch = asyncio.create_task(_until_full(min_free, free, where))
    try:
        await asyncio.wait([mover, watch], return_when=asyncio.FIRST_COMPLETED)
        if mover.done():
            return mover.result()
        raise watch.result()
    finally:
        await cancelled([mover, watch])


async def _until_full(
    min_free: int, free: Callable[[], Awaitable[int | None]], where: str
) -> Retry:
    while True:
        await asyncio.sleep(_LOOK_AT_DISK)
        found = await free()
        if found is not None and found < min_free:
            return Retry(filling_up(where, found, min_free))


def _stood(source: list[Seen], began: float) -> Moved:
    total = sum(seen.size for seen in source)
    return Moved(total, 0, _count(source), time.monotonic() - began)


def _count(source: list[Seen]) -> int:
    return sum(seen.kind == "file" for seen in source)


def _check_digests(digests: Digests, expected: Manifest | None, where: str) -> None:
    """Raise `Damaged` if the bytes that passed do not match the manifest."""
    items = known_items(expected)
    for path, stretches in digests.items():
        wanted = (path in items and items[path].part_digests()) or None
        for start, parts in stretches.items():
            first = start // PART
            if wanted and list(parts) != list(wanted[first : first + len(parts)]):
                raise damaged(path, where)


def _moved(
    source: list[Seen],
    progress: Progress,
    digests: Digests,
    expected: Manifest | None,
    began: float,
) -> Moved:
    manifest = _assembled(source, digests, known_items(expected))
    seconds = time.monotonic() - began
    return Moved(progress.total, progress.sent, _count(source), seconds, manifest)


def _assembled(
    source: list[Seen], digests: Digests, known: Mapping[bytes, Item]
) -> Manifest | None:
    """Return the manifest of the copy; None if it has earlier bytes whose digest is unknown."""
    items: list[Item] = []
    for item in manifest_of(source).items:
        if item.kind != "file":
            items.append(item)
        elif item.path in known:
            items.append(known[item.path])
        elif (parts := _all_parts(item.size, digests.get(item.path, {}))) is not None:
            digest, several = item_digest(parts)
            items.append(Item(item.path, "file", item.size, digest, parts=several))
        else:
            return None
    return Manifest(items)


def _all_parts(size: int, stretches: Mapping[int, list[bytes]]) -> list[bytes] | None:
    parts: list[bytes] = []
    for start in sorted(stretches):
        if start != len(parts) * PART:
            return None
        parts += stretches[start]
    return parts if stretches and len(parts) == -(-size // PART) else None


async def _remote_manifest(work: _Work) -> Manifest:
    work = await work.with_agent()
    if work.agent is not None:
        while "manifest" not in (answer := await work.agent.answer()):
            with shaped(work.agent.endpoint):
                work.report(int(answer["done"]), int(answer["total"]))
        with shaped(work.agent.endpoint):
            return manifest_from(answer["manifest"])
    path = await work.confined()
    source = await work.look(path)
    todo = plan(source, ())
    progress = work.progress(todo, source)
    digests = await work.move("read", (b"", path), todo.pieces, progress)
    if await work.look(path) != source:
        raise Retry(f"{work.remote.shown(path)} changed while it was read")
    manifest = _assembled(source, digests, {})
    assert manifest is not None
    return manifest


async def _check(endpoint: Endpoint) -> str:
    async with connected(endpoint) as connection:
        sftp = await started(endpoint, connection)
        with translated(endpoint):
            home = await sftp.realpath(b".")
        return f"{connection.get_extra_info('server_version')}, in {printable(home)}"
