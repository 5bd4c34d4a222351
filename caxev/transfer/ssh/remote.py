"""List, prepare and rename a tree at the far end of an SFTP session.

Paths are bytes throughout, and every path that the server returns is checked.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Final, cast

import asyncssh
from asyncssh import SFTPAttrs, SFTPName

from caxev import failpoints
from caxev.core.errors import GiveUp
from caxev.files import (
    DIR_MODE,
    FILE_MODE,
    FarPath,
    Seen,
    check_rows,
    gone,
    join,
    parent,
    printable,
)
from caxev.files.paths import within_tree
from caxev.files.tree import check_links
from caxev.transfer.ssh.session import GONE, NOT_FOR_US, Session, each, naming
from caxev.transfer.ssh.sftp import OPENING

_LONGEST: Final = 4096  # bytes of a path in it, Linux's own limit
_SECOND: Final = 1_000_000_000


class Remote(Session):
    """A session that lists, prepares and renames trees.

    Methods raise asyncssh's SFTPError, with the request and the path in its text; `in_session`
    makes `Retry` and `Denied` of it. Sizes are bytes.
    """

    async def source(self, path: FarPath) -> list[Seen]:
        """List a copy to read. Raises as `look`, and `GiveUp` if it is gone."""
        try:
            return await self.look(path)
        except GONE as exc:
            raise gone(self.shown(path)) from exc

    async def look(self, root: FarPath, *, check: bool = True) -> list[Seen]:
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
        # All directories of a level at once: round trips are what a listing costs.
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

    async def _list(self, root: FarPath, path: bytes, found: list[Seen]) -> None:
        # Closed here, which closes the directory at the far end, also after an error.
        listing = cast("AsyncGenerator[SFTPName]", self.sftp.scandir(join(root, path)))
        with naming("list", join(root, path)):
            async with aclosing(listing):
                async for entry in listing:
                    name = entry.filename
                    assert isinstance(name, bytes)
                    if name not in {b".", b".."}:
                        # As they come: a server that lists forever must not fill our memory.
                        check_rows(len(found), self.shown(root))
                        found.append(self._seen(root, self._listed(path, name), entry.attrs))

    def _listed(self, path: bytes, name: bytes) -> bytes:
        """Return the path of an entry that the server lists in a directory."""
        inner = path + b"/" + name if path else name
        # A server must not be able to lead us out of the tree.
        if not name or b"/" in name or b"\0" in name or len(inner) > _LONGEST:
            shown = printable(name[:_LONGEST])
            raise GiveUp(f"{self.endpoint} listed the impossible name {shown}")
        return inner

    def _seen(self, root: FarPath, path: bytes, attrs: SFTPAttrs) -> Seen:
        mode = attrs.permissions or 0
        if stat.S_ISREG(mode):
            return Seen(path, "file", attrs.size or 0, (attrs.mtime or 0) * _SECOND)
        if stat.S_ISDIR(mode):
            return Seen(path, "dir")
        if stat.S_ISLNK(mode):
            return Seen(path, "link")
        raise GiveUp(f"{self.shown(join(root, path))} is neither a file, a directory nor a link")

    async def _read_link(self, root: FarPath, link: Seen, read: list[Seen]) -> None:
        target = await self.ask("readlink", join(root, link.path))
        assert isinstance(target, bytes)
        if target.startswith(b"/"):
            target = await self._inner(root, link.path, target)
        read.append(Seen(link.path, "link", target=target))

    async def _inner(self, root: FarPath, path: bytes, target: bytes) -> bytes:
        """Return a link's target, relative if it is inside the tree, as `files.look` does."""
        above, name = posixpath.split(target.rstrip(b"/"))
        try:
            real = posixpath.join(await self._real(above), name)
        except GONE:
            return target
        inner = within_tree(await self._real(root), path, real)
        return target if inner == real else inner

    async def exists(self, path: FarPath) -> bool:
        """Return whether anything is there, even a dangling link."""
        try:
            await self.ask("lstat", path)
        except GONE:
            return False
        return True

    async def free(self, path: FarPath) -> int | None:
        """Return the bytes available in the file system of `path`; None without statvfs there."""
        try:
            status = await self.ask("statvfs", path)
        except NOT_FOR_US:
            return None
        return int(status.bavail or 0) * int(status.frsize or 0)

    async def make_parents(self, path: FarPath) -> None:
        """Make the directories above `path` that are missing, and bring them to the disk."""
        above = parent(path)
        if not await self.exists(above):
            await self.make_parents(above)
            await self.make_directory(above)
            await self.fsync_directory(parent(above))

    async def make_directory(self, path: FarPath) -> None:
        """Make one directory, with our mode independent of the server's umask, if it lets us."""
        failpoints.point("ssh.mkdir")
        try:
            await self.ask("mkdir", path, SFTPAttrs(permissions=DIR_MODE))
        except (asyncssh.SFTPFailure, asyncssh.SFTPFileAlreadyExists):
            # Servers also answer "failure" if the directory exists.
            if not stat.S_ISDIR((await self.ask("lstat", path)).permissions or 0):
                raise
        # If the server refuses, its umask decides; the copy is complete all the same.
        with suppress(*NOT_FOR_US):
            await self.ask("setstat", path, SFTPAttrs(permissions=DIR_MODE))

    async def remove(self, root: FarPath, seen: Seen) -> None:
        """Remove one file, link or empty directory from a tree."""
        failpoints.point("ssh.remove")
        await self.ask("rmdir" if seen.kind == "dir" else "remove", join(root, seen.path))

    async def remove_tree(self, root: FarPath) -> None:
        """Remove a whole tree; a missing one is no error."""
        failpoints.point("ssh.remove")
        await self.ask("rmtree", root, True)

    async def remove_all(self, path: FarPath) -> None:
        """Remove the file or directory of that name; a missing one is no error."""
        try:
            await self.ask("remove", path)
        except GONE:
            pass
        except asyncssh.SFTPError:  # servers differ in how they refuse to unlink a directory
            await self.remove_tree(path)

    async def read_small(self, path: FarPath, most: int) -> bytes | None:
        """Return the first bytes of a regular file; None if there is none."""
        try:
            if not stat.S_ISREG((await self.ask("lstat", path)).permissions or 0):
                return None
            async with self.opened(path, asyncssh.FXF_READ) as file:
                return os.fsencode(await file.read(most))
        except GONE:
            return None

    async def write_new(self, path: FarPath, content: bytes) -> None:
        """Write a small file that must not exist; an existing link is not followed."""
        flags = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL
        async with self.opened(path, flags, SFTPAttrs(permissions=FILE_MODE)) as file:
            await file.write(content)

    async def fsync_directory(self, path: FarPath) -> None:
        """Bring a directory's entries to the disk, if the server can open a directory."""
        # Only some servers (OpenSSH on Linux) open a directory as a file. With others a power cut
        # there may lose the name of a copy that is `transferred`; the next reading of that copy
        # shows it.
        with suppress(asyncssh.SFTPError):
            async with self.opened(path, asyncssh.FXF_READ) as directory:
                await directory.fsync()

    @asynccontextmanager
    async def opened(
        self, path: FarPath, flags: int, attrs: SFTPAttrs | None = None
    ) -> AsyncIterator[asyncssh.SFTPClientFile]:
        """Open a file. Raises TimeoutError if the far end blocks, as on a FIFO."""
        with naming("open", path):
            async with asyncio.timeout(OPENING):
                file = await self.sftp.open(
                    path, flags, attrs or SFTPAttrs(), block_size=None, encoding=None
                )
            async with file:
                yield file

    async def withdraw(self, final: FarPath, partial: FarPath) -> None:
        """Rename a copy to repair back to its partial. Repeatable.

        It replaces a partial of another attempt.
        """
        if await self.exists(final):
            # SFTP's rename replaces nothing, and the bad copy holds more of the data than a
            # partial.
            await self.remove_all(partial)
            failpoints.point("ssh.withdraw.rename")
            await self.ask("rename", final, partial)

    async def publish(self, partial: FarPath, final: FarPath) -> None:
        """Rename `partial` to `final`, replacing nothing. Its files must be on the disk already.

        Raises `GiveUp` if `final` exists.
        """
        # SFTP's own rename replaces nothing (OpenSSH links and unlinks a file). The POSIX rename
        # of OpenSSH, which does replace, is not used.
        if await self.exists(final):
            raise GiveUp(f"{self.shown(final)} exists already and is not replaced")
        failpoints.point("ssh.publish.rename")
        await self.ask("rename", partial, final)
        await self.fsync_directory(parent(final))
