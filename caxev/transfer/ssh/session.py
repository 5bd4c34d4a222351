"""One SFTP session, and the paths at the far end that may be touched.

Paths are bytes throughout; every path that the server returns is checked.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, TypeVar

import asyncssh
from asyncssh import SFTPClient
from attrs import define, field

from caxev.core.errors import GiveUp, Retry, RootAway
from caxev.core.paths import Root
from caxev.files import FarPath, check_names, inside, printable
from caxev.files.roots import marker_path, missing
from caxev.transfer.ssh.endpoint import Endpoint

T = TypeVar("T")

_AT_ONCE: Final = 32  # requests in flight while a tree is listed or prepared
GONE: Final = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath, asyncssh.SFTPNotADirectory)
"""Errors for a path that does not exist."""

NOT_FOR_US: Final = (asyncssh.SFTPPermissionDenied, asyncssh.SFTPOpUnsupported)
"""Errors of a server that does not support a request, or does not allow it."""


async def each(function: Callable[[T], Awaitable[object]], items: Iterable[T]) -> None:
    """Await `function(item)` for every item, `_AT_ONCE` at a time; items are taken lazily.

    The first error, or cancellation, ends the others and is raised.
    """
    remaining = iter(items)  # shared by all workers, so that each item is taken once

    async def worker() -> None:
        for item in remaining:
            await function(item)

    tasks = [asyncio.create_task(worker()) for _ in range(_AT_ONCE)]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancelled(tasks)


@contextmanager
def naming(request: str, path: bytes) -> Iterator[None]:
    """Add the request and the path to an SFTP error: the server's text has neither."""
    try:
        yield
    except asyncssh.SFTPError as exc:
        exc.reason = f"{request} {printable(path)}: {exc.reason}"
        exc.args = (exc.reason,)
        raise


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel the tasks that still run and wait for their ends; ignore their errors."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@define
class Session:
    """One SFTP session at `endpoint`."""

    endpoint: Endpoint
    sftp: SFTPClient
    _entered: set[str] = field(init=False, factory=set)

    async def ask(self, request: str, path: bytes, *args: Any) -> Any:
        """Send the request of that name; its errors name the request and the path."""
        with naming(request, path):
            return await getattr(self.sftp, request)(path, *args)

    def shown(self, path: bytes) -> str:
        """Return a path at the far end as messages show it."""
        return f"{self.endpoint}:{printable(path)}"

    async def confine(self, path: str, roots: Iterable[str]) -> FarPath:
        """Return the real path of `path`, which need not exist, strictly inside one of `roots`.

        Raises `GiveUp` if it is outside, not absolute, or contains ``..``; `RootAway` if the root's
        disk is not mounted.
        """
        wanted = self._plain(os.fsencode(path))
        return await self._held(self._resolved(posixpath.normpath(wanted)), roots)

    async def confine_known(
        self, path: bytes, roots: Iterable[str], *, at: bool = False
    ) -> FarPath:
        """`confine` in one round trip, for a path that must exist. Raises the same.

        With `at` it may also be one of the roots itself.
        """
        return await self._held(self._real(self._plain(path)), roots, at=at)

    async def _held(
        self, resolving: Awaitable[bytes], roots: Iterable[str], *, at: bool = False
    ) -> FarPath:
        # Everything is asked at the same time, needed or not: round trips are what it costs.
        named = [root for root in roots if root.startswith("/")]
        (real,), tops, markers = await asyncio.gather(
            asyncio.gather(resolving, return_exceptions=True),
            asyncio.gather(*(self._real(_text(root)) for root in named), return_exceptions=True),
            asyncio.gather(*map(self._check_marker, named), return_exceptions=True),
        )
        if isinstance(real, BaseException):
            raise real
        for root, top, why in zip(named, tops, markers, strict=True):
            self._check_root(real, root, top, why)
        there = [top for top in tops if isinstance(top, bytes)]
        if at and real in there:
            return FarPath(real)
        holding = [top for top in there if inside(real, top)]
        if holding:
            check_names(real[len(max(holding, key=len)) :], self.shown(real))
            return FarPath(real)
        for top in tops:
            if isinstance(top, BaseException) and not isinstance(top, GONE):
                raise top  # it may be inside that one
        raise GiveUp(f"{self.shown(real)} is not inside {' or '.join(named) or 'any directory'}")

    def _check_root(
        self, real: bytes, root: str, top: bytes | BaseException, why: BaseException | None
    ) -> None:
        """Raise `RootAway` if the root would hold the path, and its disk is not mounted.

        `top` is its real path, `why` what is wrong with its marker.
        """
        if isinstance(top, bytes):
            if top == real or inside(real, top):
                if why is not None:
                    raise why
                self._entered.add(root)
        elif isinstance(top, GONE) and isinstance(root, Root) and inside(real, _text(root)):
            raise self._away(root) from top

    async def _check_marker(self, root: str) -> None:
        """Raise `RootAway` if the root has a known marker and it is missing."""
        if not isinstance(root, Root) or root.marker is None:
            return
        try:
            found = await self.ask("lstat", os.fsencode(marker_path(root, root.marker)))
        except GONE as exc:
            raise self._away(root) from exc
        if not stat.S_ISREG(found.permissions or 0):
            raise self._away(root)

    def _away(self, root: Root) -> RootAway:
        return RootAway(
            f"{self.endpoint}: {missing(root)}", root=str(root), host=self.endpoint.host
        )

    @asynccontextmanager
    async def steady(self) -> AsyncIterator[None]:
        """Raise `RootAway` at the end if a root used in the block is away; see `files.steady`."""
        try:
            yield
        except RootAway:
            raise
        except (Retry, GiveUp, asyncssh.SFTPError):
            await self._check_entered()
            raise
        await self._check_entered()

    async def _check_entered(self) -> None:
        for root in self._entered.copy():
            await self._check_marker(root)

    def _plain(self, path: bytes) -> bytes:
        if not path.startswith(b"/") or b"\0" in path or b".." in path.split(b"/"):
            raise GiveUp(f"{self.shown(path)} is not a plain absolute path")
        return path

    async def _real(self, path: bytes) -> bytes:
        return posixpath.normpath(bytes(await self.ask("realpath", path)))

    async def _resolved(self, path: bytes) -> bytes:
        """Return the real path; missing components at its end stay as they are."""
        # Not every server resolves a path that does not exist.
        try:
            await self.ask("lstat", path)
            return await self._real(path)
        except GONE:
            above, name = posixpath.split(path)
            return path if path == above else posixpath.join(await self._resolved(above), name)


def _text(root: str) -> bytes:
    return posixpath.normpath(os.fsencode(root))
