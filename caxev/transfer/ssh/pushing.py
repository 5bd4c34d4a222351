"""Push a copy over SSH: to the receiver at the far account, or over SFTP alone.

It is written there as `caxev.transfer.ssh.pulling` writes one here, and can be resumed like one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial as bound
from typing import Final, TypeVar

from caxev import failpoints
from caxev.core.errors import GiveUp, Retry
from caxev.files import (
    PART_PREFIX,
    Confined,
    FarPath,
    Meter,
    Moved,
    Plan,
    Range,
    Report,
    Seen,
    changed,
    check_expected,
    confine,
    filling_up,
    join,
    known_items,
    look_source,
    parent,
    printable,
    safe_name,
)
from caxev.files.manifest import wrong_ranges
from caxev.transfer.base import Route
from caxev.transfer.receive import item_rows, pieces_from, seen_rows
from caxev.transfer.ssh.agent import shaped
from caxev.transfer.ssh.digests import Digests, assembled, check_digests
from caxev.transfer.ssh.landing import land, only_pusher, publish
from caxev.transfer.ssh.session import GONE, cancelled
from caxev.transfer.ssh.work import Work, asking, run, unsure

T = TypeVar("T")

_LOOK_AT_DISK: Final = 5.0  # seconds between two checks of the free space


async def push(route: Route, report: Report) -> Moved:
    """Copy the tree here to `remote_path`; see `SshMover.push`."""
    here = confine(route.local_path, route.here.roots)
    looking = asyncio.create_task(asyncio.to_thread(_as_expected, route, here))
    try:
        return await run(
            route, bound(_push, here, looking), report, _offer(route, looking), above=True
        )
    except Retry:
        await looking  # an error of the source comes first: it may be permanent
        raise
    finally:
        await cancelled([looking])


def _as_expected(route: Route, here: Confined) -> list[Seen]:
    source = look_source(here)
    check_expected(source, route.expected, printable(here))
    return source


async def _offer(route: Route, looking: Awaitable[list[Seen]]) -> Mapping[str, object]:
    source = await asyncio.shield(looking)  # `_push` needs it even if this request is cancelled
    return await asking(
        route,
        do="receive",
        source=seen_rows(source),
        expected=item_rows(route.expected) if route.expected is not None else None,
        min_free=route.min_free,
        unsure=unsure(route),
        again=route.again,
        origin=route.origin,
    )


async def _push(here: Confined, looking: Awaitable[list[Seen]], work: Work) -> Moved:
    source = await looking
    meter = Meter.of(source, work.report)
    work = await work.with_agent()
    push = _push_to_agent if work.agent is not None else _push_over_sftp
    digests = await push(work, here, source, meter)
    if digests is None:
        return meter.moved(source)
    return meter.moved(source, assembled(source, digests, work.route.expected))


async def _push_to_agent(
    work: Work, here: Confined, source: list[Seen], meter: Meter
) -> Digests | None:
    """Push to the receiver; return the digests of the sent bytes, None if the copy exists."""
    agent, route = work.agent, work.route
    assert agent is not None
    answer = await agent.answer(work.report)
    if answer.get("stands"):
        return None
    failpoints.point("ssh.prepare")
    with shaped(agent.endpoint):
        pieces = pieces_from(answer["pieces"], source)
        partial = os.fsencode(answer["partial"])
    meter.left(Plan((), (), tuple(pieces), ()))
    there = None
    if work.split(pieces)[1]:
        there = await _partial(work, partial)
    elif route.min_free:  # only to ask how full the disk is, which SFTP may not see
        with suppress(GiveUp):
            there = await _partial(work, partial)
    moving = work.move("push", (here, there), pieces, meter)
    digests = await moving if there is None else await _while_space(work, there, moving)
    await agent.ask(finish=True)  # it syncs to its disk while we list the source again
    await _check_source(here, source, digests, route)
    await agent.ask(publish=True)
    failpoints.point("ssh.publish.rename")
    await agent.answer()
    return digests


async def _partial(work: Work, reported: bytes) -> FarPath:
    """Return the partial that the receiver reports, confined over SFTP, too."""
    # A receiver may run in another root directory (chroot) than the SFTP server, or lie.
    directory, name = os.path.split(reported)
    wanted = PART_PREFIX + safe_name(work.route.remote_path)
    real: FarPath | None
    try:
        real = await work.pool.answer()
    except (*GONE, GiveUp):
        real = None
    if real != directory:  # it did not exist yet, or the copy's path is a link
        real = await work.remote.confine_known(directory, work.route.there.roots, at=True)
    if name != os.fsencode(wanted) or real != directory:
        raise GiveUp(f"{work.where} is another place over SFTP than where commands run")
    return join(real, name)


async def _check_source(here: Confined, source: list[Seen], digests: Digests, route: Route) -> None:
    """Raise an error if what was sent does not match the manifest, or the source has changed."""
    check_digests(digests, route.expected, printable(here))
    if await asyncio.to_thread(look_source, here) != source:
        raise changed(printable(here))


async def _push_over_sftp(
    work: Work, here: Confined, source: list[Seen], meter: Meter
) -> Digests | None:
    """Push over SFTP; return the digests of the sent bytes, None if the copy exists."""
    route, remote = work.route, work.remote
    wrong = _wrong(route, source)
    with only_pusher(str(remote.endpoint), os.fsencode(route.remote_path)):
        landing = await land(
            remote, route, source, unsure=unsure(route), wrong=wrong, origin=route.origin
        )
        todo = landing.todo
        if todo is None:
            return None
        failpoints.point("ssh.prepare")
        meter.left(todo)
        moving = work.move("push", (here, landing.partial), todo.pieces, meter, ordered=True)
        digests = await _while_space(work, landing.partial, moving)
        await _check_source(here, source, digests, route)
        # Files of a repair that were sent nothing; the others are finished already.
        sent = {piece.file.path for piece in todo.pieces}
        unfinished = (wrong.keys() - sent) | work.untimed
        unsynced = [seen for seen in source if seen.path in unfinished]
        await publish(remote, landing, source, unsynced=unsynced)
    return digests


def _wrong(route: Route, source: Sequence[Seen]) -> Mapping[bytes, Sequence[Range]]:
    """Return the bad ranges of a copy to repair: all, unless it was read back."""
    if not route.again:
        return {}
    wrong: dict[bytes, Sequence[Range]] = {
        seen.path: [(0, seen.size)] for seen in source if seen.kind == "file"
    }
    good, found = known_items(route.expected), known_items(route.found)
    for path in wrong.keys() & good.keys() & found.keys():
        digests = (one[path].part_digests() or () for one in (good, found))
        wrong[path] = wrong_ranges(good[path].size, *digests)
    return wrong


async def _while_space(work: Work, partial: FarPath, moving: Awaitable[T]) -> T:
    """Await `moving` while `min_free` bytes stay free there; else raise `Retry`."""
    min_free = work.route.min_free
    if not min_free:
        return await moving
    # Other programs write to that disk too, so the check before the transfer is not enough.
    free = bound(work.remote.free, parent(partial))
    mover = asyncio.ensure_future(moving)
    watch = asyncio.create_task(_until_full(min_free, free, work.where))
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
