"""Pull a copy over SSH.

It is written to a hidden partial beside its final name, brought to the disk, and renamed. If an
attempt is killed, the partial stays and the next attempt resumes it; if the rename had happened,
the next attempt finds the copy and returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Final

from attrs import evolve

from caxev import failpoints
from caxev.files import (
    FarPath,
    Item,
    Meter,
    Moved,
    Plan,
    Seen,
    StagedCopy,
    changed,
    check_expected,
    confine,
)
from caxev.transfer.receive import STREAMED, piece_rows, seen_from
from caxev.transfer.ssh.agent import Agent, shaped
from caxev.transfer.ssh.digests import Digests, assembled, check_digests
from caxev.transfer.ssh.session import cancelled
from caxev.transfer.ssh.work import Work, unsure

_MANY: Final = 16  # small files that make it worth to wait for a receiver


async def pull(work: Work) -> Moved:
    """Copy the tree there to `local_path`; see `SshMover.pull`."""
    route = work.route
    final = confine(route.local_path, route.here.roots)
    work, there, source = await _listed(work)
    check_expected(source, route.expected, work.where)
    arrival = StagedCopy(
        final,
        route.here.roots,
        source,
        route.expected,
        route.min_free,
        unsure=unsure(route),
        again=route.again,
        origin=route.origin,
        report=work.report,
    )
    meter = Meter.of(source, work.report)
    meter.guard = arrival.check_space
    if arrival.stands():
        return meter.moved(source)
    with ExitStack() as held:
        # In a thread: existing data may have to be read, and the connection must stay alive.
        todo = await asyncio.to_thread(held.enter_context, arrival.opened())
        failpoints.point("files.prepare")
        meter.left(todo)
        digests = await _fetch_all(work, there, arrival, todo, meter)
        check_digests(digests, route.expected, work.where)
        # The source is listed again while we finish, but the rename waits for the answer.
        looking = asyncio.create_task(_is_same(work, there, source))
        try:
            await asyncio.to_thread(arrival.finish, todo)
            if not await looking:
                raise changed(work.where)
        finally:
            await cancelled([looking])
        await asyncio.to_thread(arrival.publish)
    return meter.moved(source, assembled(source, digests, route.expected))


async def _listed(work: Work) -> tuple[Work, FarPath | None, list[Seen]]:
    """List the source over SFTP or by the receiver, and return the work with the better one.

    A receiver takes time to start, but then needs a single request for the whole tree. If many
    small files are known to come, only the receiver is asked. It resolves its own paths: then the
    real path there is None.
    """
    if work.starting is None:
        return work, *await _listed_over_sftp(work)
    expected = work.route.expected
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
        return evolve(work, agent=agent[0]), None, agent[1]
    finally:
        await cancelled(asking)


async def _listed_over_sftp(work: Work) -> tuple[FarPath, list[Seen]]:
    path = await work.confined()
    return path, await work.remote.source(path)


async def _listed_by_agent(starting: asyncio.Task[Agent | None]) -> tuple[Agent, list[Seen]] | None:
    agent = await starting
    if agent is None:
        return None
    answer = await agent.answer()
    with shaped(agent.endpoint):
        return agent, seen_from(answer["source"])


def _count_small(source: Iterable[Seen | Item]) -> int:
    return sum(seen.kind == "file" and seen.size <= STREAMED for seen in source)


async def _is_same(work: Work, there: FarPath | None, source: list[Seen]) -> bool:
    if work.agent is None:
        return await work.remote.source(there or await work.confined()) == source
    await work.agent.ask(check=True)
    return bool((await work.agent.answer()).get("same"))


async def _fetch_all(
    work: Work, there: FarPath | None, arrival: StagedCopy, todo: Plan, meter: Meter
) -> Digests:
    if work.agent is not None:
        small, large = work.split(todo.pieces)
        await work.agent.ask(pieces=piece_rows(small, arrival.source))
        there = await work.pool.answer() if large else None
    return await work.move("pull", (arrival.partial, there), todo.pieces, meter)
