"""List, prepare and rename a tree at the far end of an SFTP session.

Paths are bytes throughout, and every path that the server returns is checked.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final, TypeVar

import asyncssh
from asyncssh import SFTPAttrs, SFTPClient
from attrs import define, field

from caxev import failpoints
from caxev.core.errors import GiveUp, Retry, RootAway
from caxev.core.paths import Root
from caxev.files import (
    DIR_MODE,
    FILE_MODE,
    Seen,
    check_links,
    check_names,
    inside,
    join,
    printable,
    within_tree,
)
from caxev.files.roots import marker_path, missing
from caxev.transfer.ssh.endpoint import Endpoint
from caxev.transfer.ssh.sftp import OPENING

T = TypeVar("T")

MOST: Final = 1_000_000
"""Files, directories and links of one tree that a far end may list."""
_LONGEST: Final = 4096  # bytes of a path in it, Linux's own limit
_AT_ONCE: Final = 32  # requests in flight while a tree is listed or prepared
_SECOND: Final = 1_000_000_000
GONE: Final = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath, asyncssh.SFTPNotADirectory)
"""Errors for a path that does not exist."""

NOT_FOR_US: Final = (asyncssh.SFTPPermissionDenied, asyncssh.SFTPOpUnsupported)
"""Errors of a server that does not support a request, or does not allow it."""


async def each(
    function: Callable[[T], Awaitable[object]], items: Iterable[T], at_once: int = _AT_ONCE
) -> None:
    """Await `function(item)` for every item, `at_once` at a time; items are taken lazily.

    The first error, or cancellation, ends the others and is raised.
    """
    remaining = iter(items)

    async def worker() -> None:
        for item in remaining:
            await function(item)

    tasks = [asyncio.create_task(worker()) for _ in range(at_once)]
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
class Remote:
    """One SFTP session at `endpoint`."""

    endpoint: Endpoint
    sftp: SFTPClient
    _entered: set[Root] = field(init=False, factory=set)

    async def ask(self, request: str, path: bytes, *args: Any) -> Any:
        """Send the request of that name; its errors name the request and the path."""
        with naming(request, path):
            return await getattr(self.sftp, request)(path, *args)

    def shown(self, path: bytes) -> str:
        """Return a path at the far end as messages show it."""
        return f"{self.endpoint}:{printable(path)}"

    async def confine(self, path: str, roots: Iterable[str]) -> bytes:
        """Return the real path of `path`, which need not exist, strictly inside one of `roots`.

        Raises `GiveUp` if it is outside, not absolute, or contains ``..``; `RootAway` if the root's
        disk is not mounted.
        """
        wanted = os.fsencode(path)
        self._check_plain(wanted)
        real = await self._resolved(posixpath.normpath(wanted))
        roots = [root for root in roots if root.startswith("/")]
        tops = {root: await self._top_above(root, real) for root in roots}
        held = {root: top for root, top in tops.items() if top is not None}
        for root in held:
            await self._check_marker(root)
        if held:
            check_names(real[len(max(held.values(), key=len)) :], self.shown(real))
            return real
        raise self._outside(real, roots)

    async def _top_above(self, root: str, real: bytes) -> bytes | None:
        """Return the real path of a root if `real` is inside it."""
        named = posixpath.normpath(os.fsencode(root))
        try:
            top = await self._real(named)
        except GONE as exc:
            if isinstance(root, Root) and inside(real, named):
                raise self._away(root) from exc
            return None
        return top if inside(real, top) else None

    async def confine_known(self, path: bytes, roots: Iterable[str], *, at: bool = False) -> bytes:
        """`confine` in one round trip, for a path that must exist. Raises the same.

        With `at` it may also be one of the roots itself.
        """
        # Everything is asked at the same time, needed or not: round trips are what it costs.
        self._check_plain(path)
        named = [root for root in roots if root.startswith("/")]
        asked = (self._real(path), *(self._real(os.fsencode(root)) for root in named))
        (real, *tops), markers = await asyncio.gather(
            asyncio.gather(*asked, return_exceptions=True),
            asyncio.gather(*map(self._check_marker, named), return_exceptions=True),
        )
        if isinstance(real, BaseException):
            raise real
        found = zip(tops, markers, strict=True)
        there = {one: why for one, why in found if isinstance(one, bytes)}
        for known, why in there.items():
            if why is not None and (known == real or inside(real, known)):
                raise why
        if at and real in tops:
            return real
        holding = [known for known in there if inside(real, known)]
        if holding:
            check_names(real[len(max(holding, key=len)) :], self.shown(real))
            return real
        for top in tops:
            if isinstance(top, BaseException) and not isinstance(top, GONE):
                raise top  # it may be inside that one
        raise self._outside(real, roots)

    async def _check_marker(self, root: str) -> None:
        """Raise `RootAway` if the root has a known marker and it is missing."""
        if not isinstance(root, Root) or root.marker is None:
            return
        try:
            mode = (
                await self.ask("lstat", os.fsencode(marker_path(root, root.marker)))
            ).permissions
        except GONE as exc:
            raise self._away(root) from exc
        if not stat.S_ISREG(mode or 0):
            raise self._away(root)
        self._entered.add(root)

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

    def _outside(self, real: bytes, roots: Iterable[str]) -> GiveUp:
        return GiveUp(f"{self.shown(real)} is not inside {' or '.join(roots) or 'any directory'}")

    def _check_plain(self, path: bytes) -> None:
        if not path.startswith(b"/") or b"\0" in path or b".." in path.split(b"/"):
            raise GiveUp(f"{self.shown(path)} is not a plain absolute path")

    async def _real(self, path: bytes) -> bytes:
        return posixpath.normpath(bytes(await self.ask("realpath", path)))

    async def _resolved(self, path: bytes) -> bytes:
        """Return the real path; missing components at its end stay as they are."""
        # Not every server resolves a path that does not exist.
        try:
            await self.ask("lstat", path)
            return await self._real(path)
        except GONE:
            parent, name = posixpath.split(path)
            return path if path == parent else join(await self._resolved(parent), name)

    async def look(self, root: bytes, *, check: bool = True) -> list[Seen]:
        """List the tree at `root`, sorted by path, times to the second; links are not followed.

        Raises one of `GONE` if there is nothing, `GiveUp` for what a copy must not hold; without
        `check`, links are listed wherever they lead.
        """
        top = self._seen(root, b"", await self.ask("lstat", root))
        if top.kind == "file":
            return [top]
        if top.kind != "dir":
            raise GiveUp(f"{self.shown(root)} is neither a directory nor a file")
        found: list[Seen] = []
        level = [b""]
        while level:
            before = len(found)
            await each(lambda path: self._list(root, path, found), level)
            level = [seen.path for seen in found[before:] if seen.kind == "dir"]
        links = [seen for seen in found if seen.kind == "link"]
        read: list[Seen] = []
        await each(lambda link: self._read_link(root, link, read), links)
        rest = (seen for seen in found if seen.kind != "link")
        if check:
            check_links(read)
        return sorted((*rest, *read), key=lambda seen: seen.path)

    async def _list(self, root: bytes, path: bytes, found: list[Seen]) -> None:
        with naming("list", join(root, path)):
            entries = [entry async for entry in self.sftp.scandir(join(root, path))]
        for entry in entries:
            name = entry.filename
            assert isinstance(name, bytes)
            if name in {b".", b".."}:
                continue
            inner = join(path, name) if path else name
            # A server must not be able to lead us out of the tree, or to fill our memory.
            if not name or b"/" in name or b"\0" in name or len(inner) > _LONGEST:
                shown = printable(name[:_LONGEST])
                raise GiveUp(f"{self.endpoint} listed the impossible name {shown}")
            if len(found) >= MOST:
                raise GiveUp(f"{self.shown(root)} holds more than {MOST:,} files")
            found.append(self._seen(root, inner, entry.attrs))

    def _seen(self, root: bytes, path: bytes, attrs: SFTPAttrs) -> Seen:
        mode = attrs.permissions or 0
        if stat.S_ISREG(mode):
            return Seen(path, "file", attrs.size or 0, (attrs.mtime or 0) * _SECOND)
        if stat.S_ISDIR(mode):
            return Seen(path, "dir")
        if stat.S_ISLNK(mode):
            return Seen(path, "link")
        raise GiveUp(f"{self.shown(join(root, path))} is neither a file, a directory nor a link")

    async def _read_link(self, root: bytes, link: Seen, read: list[Seen]) -> None:
        target = await self.ask("readlink", join(root, link.path))
        assert isinstance(target, bytes)
        if target.startswith(b"/"):
            target = await self._inner(root, link.path, target)
        read.append(Seen(link.path, "link", target=target))

    async def _inner(self, root: bytes, path: bytes, target: bytes) -> bytes:
        """Return a link's target, relative if it is inside the tree, as `files.look` does."""
        above, name = posixpath.split(target.rstrip(b"/"))
        try:
            real = join(await self._real(above), name)
        except GONE:
            return target
        inner = within_tree(await self._real(root), path, real)
        return target if inner == real else inner

    async def exists(self, path: bytes) -> bool:
        """Return whether anything is there, even a dangling link."""
        try:
            await self.ask("lstat", path)
        except GONE:
            return False
        return True

    async def free(self, path: bytes) -> int | None:
        """Return the bytes available in the file system of `path`; None without statvfs there."""
        try:
            status = await self.ask("statvfs", path)
        except NOT_FOR_US:
            return None
        return int(status.bavail or 0) * int(status.frsize or 0)

    async def make_parents(self, path: bytes) -> None:
        """Make the directories above `path` that are missing."""
        parent = posixpath.dirname(path)
        if not await self.exists(parent):
            await self.make_parents(parent)
            await self.make_directory(parent)

    async def make_directory(self, path: bytes) -> None:
        """Make one directory, with our mode whatever the server's umask, if it lets us."""
        failpoints.point("ssh.mkdir")
        try:
            await self.ask("mkdir", path, SFTPAttrs(permissions=DIR_MODE))
        except (asyncssh.SFTPFailure, asyncssh.SFTPFileAlreadyExists):
            # Servers also answer "failure" if the directory exists.
            if not stat.S_ISDIR((await self.ask("lstat", path)).permissions or 0):
                raise
        with suppress(*NOT_FOR_US):
            await self.ask("setstat", path, SFTPAttrs(permissions=DIR_MODE))

    async def remove(self, root: bytes, seen: Seen) -> None:
        """Remove one file, link or empty directory from a tree."""
        failpoints.point("ssh.remove")
        await self.ask("rmdir" if seen.kind == "dir" else "remove", join(root, seen.path))

    async def remove_tree(self, root: bytes) -> None:
        """Remove a whole tree; a missing one is no error."""
        failpoints.point("ssh.remove")
        await self.ask("rmtree", root, True)

    async def remove_all(self, path: bytes) -> None:
        """Remove whatever has that name; a missing one is no error."""
        try:
            await self.ask("remove", path)
        except GONE:
            pass
        except asyncssh.SFTPError:  # servers differ in how they refuse to unlink a directory
            await self.remove_tree(path)

    async def read_small(self, path: bytes, most: int) -> bytes | None:
        """Return the first bytes of a regular file; None if there is none."""
        try:
            if not stat.S_ISREG((await self.ask("lstat", path)).permissions or 0):
                return None
            async with self.opened(path, asyncssh.FXF_READ) as file:
                return os.fsencode(await file.read(most))
        except GONE:
            return None

    async def write_new(self, path: bytes, content: bytes) -> None:
        """Write a small file that must not exist; an existing link is not followed."""
        flags = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL
        async with self.opened(path, flags, SFTPAttrs(permissions=FILE_MODE)) as file:
            await file.write(content)

    async def fsync_directory(self, path: bytes) -> None:
        """Bring a directory's entries to the disk, if the server can open a directory."""
        with suppress(asyncssh.SFTPError):
            async with self.opened(path, asyncssh.FXF_READ) as directory:
                await directory.fsync()

    @asynccontextmanager
    async def opened(
        self, path: bytes, flags: int, attrs: SFTPAttrs | None = None
    ) -> AsyncIterator[asyncssh.SFTPClientFile]:
        """Open a file. Raises TimeoutError if the far end blocks, as on a FIFO."""
        with naming("open", path):
            async with asyncio.timeout(OPENING):
                file = await self.sftp.open(
                    path, flags, attrs or SFTPAttrs(), block_size=None, encoding=None
                )
            async with file:
                yield file

    async def withdraw(self, final: bytes, partial: bytes) -> None:
        """Rename a copy that is to be repaired back to its partial. Repeatable.

        It replaces a partial of another attempt.
        """
        if await self.exists(final):
            await self.remove_all(partial)
            failpoints.point("ssh.withdraw.rename")
            await self.ask("rename", final, partial)
            failpoints.point("ssh.withdraw.rename")

    async def publish(self, partial: bytes, final: bytes) -> None:
        """Rename `partial` to `final`, replacing nothing. Its files must be on the disk already.

        Raises `GiveUp` if `final` exists.
        """
        # SFTP's own rename replaces nothing (OpenSSH links and unlinks a file). The POSIX rename
        # of OpenSSH, which does replace, is not used.
        if await self.exists(final):
            raise GiveUp(f"{self.shown(final)} exists already and is not replaced")
        failpoints.point("ssh.publish.rename")
        await self.ask("rename", partial, final)
        failpoints.point("ssh.publish.rename")
        await self.fsync_directory(posixpath.dirname(final))
