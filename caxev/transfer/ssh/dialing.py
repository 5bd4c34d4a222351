"""Connect to a host by whichever of its addresses answers first (RFC 8305).

asyncssh tries a host's addresses one after the other: a first one that swallows everything, as a
broken route for IPv6 does, would take all the time there is.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import Any, Final

DELAY: Final = 0.25
"""Seconds that an address gets alone before the next one is tried beside it."""

Address = tuple[Any, ...]
"""An address as `socket.getaddrinfo` returns it."""


def in_turn(addresses: Sequence[Address]) -> list[Address]:
    """Return the addresses with their families alternating, each family in its order. Pure."""
    first = [one for one in addresses if one[0] == addresses[0][0]]
    others = [one for one in addresses if one[0] != addresses[0][0]]
    return [one for one in chain(*zip_longest(first, others)) if one is not None]


async def dial(host: str, port: int, patience: float) -> socket.socket:
    """Return a socket that is connected to the host, within so many seconds.

    Raises TimeoutError, or if every address fails the first one's OSError.
    """
    async with asyncio.timeout(patience):
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return await _first_of(in_turn(found))


async def _first_of(addresses: Iterable[Address]) -> socket.socket:
    tries: list[asyncio.Task[socket.socket]] = []
    won: socket.socket | None = None
    try:
        for address in addresses:
            tries.append(asyncio.create_task(_connected(address)))
            await _one_ended(tries, DELAY)
            if (won := _won(tries)) is not None:
                return won
        while not all(one.done() for one in tries):
            await _one_ended(tries, None)
            if (won := _won(tries)) is not None:
                return won
        return tries[0].result()  # raises
    finally:
        # A task may have connected before it was cancelled: its socket must not leak.
        for one in tries:
            one.cancel()
        for left in await asyncio.gather(*tries, return_exceptions=True):
            if isinstance(left, socket.socket) and left is not won:
                left.close()


async def _one_ended(tries: Iterable[asyncio.Task[socket.socket]], wait: float | None) -> None:
    """Wait until one more of the tasks has ended, or for `wait` seconds."""
    going = [one for one in tries if not one.done()]
    if going:
        await asyncio.wait(going, timeout=wait, return_when=asyncio.FIRST_COMPLETED)


def _won(tries: Iterable[asyncio.Task[socket.socket]]) -> socket.socket | None:
    ended = (one for one in tries if one.done())
    return next((one.result() for one in ended if one.exception() is None), None)


async def _connected(address: Address) -> socket.socket:
    family, kind, protocol, _, where = address
    one = socket.socket(family, kind, protocol)
    try:
        one.setblocking(False)
        await asyncio.get_running_loop().sock_connect(one, where)
    except BaseException:
        one.close()
        raise
    return one
