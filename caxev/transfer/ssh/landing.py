"""Make a copy at the far end of an SFTP session, from its partial to its final name.

`in_session` is for movers whose program moves the bytes by itself: it runs in a worker process, and
raises `Retry` and `GiveUp` only.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from secrets import token_hex
from typing import Final, TypeVar

import asyncssh
from attrs import evolve, frozen

from caxev import aio, failpoints
from caxev.core.errors import Retry
from caxev.files import (
    FILE_MODE,
    FarPath,
    Plan,
    Range,
    Seen,
    is_file,
    join,
    parent,
    partial_path,
    plan,
    printable,
    process_lock,
    second,
)
from caxev.files.errors import BUSY_AFTER
from caxev.files.paths import origin_path
from caxev.files.plan import to_the_second
from caxev.files.staging import LONGEST_ORIGIN, check_standing, enough_space
from caxev.transfer.base import Route
from caxev.transfer.ssh.endpoint import Endpoint, sftp_session, translated
from caxev.transfer.ssh.remote import Remote
from caxev.transfer.ssh.session import GONE, NOT_FOR_US, each, naming

T = TypeVar("T")

_LONGEST_NOTE: Final = 2 * LONGEST_ORIGIN
_UNKNOWN: Final = b"?"
"""The origin in the note of a partial that no later attempt may trust."""


@frozen
class Landing:
    """The paths of a copy there, what is left to do in its partial, and our note beside that.

    `todo` is None if the copy has its final name already.
    """

    final: FarPath
    partial: FarPath
    todo: Plan | None
    note: bytes = b""


async def land(
    remote: Remote,
    route: Route,
    source: Sequence[Seen],
    *,
    unsure: int = 0,
    wrong: Mapping[bytes, Sequence[Range]] | None = None,
    origin: str | None = None,
) -> Landing:
    """Prepare the partial of the copy there: make directories, remove what is foreign.

    Only files and links are left to do. If the route says `again`, an existing copy is to be
    repaired and first becomes a partial; `wrong` lists its bad ranges. `origin` names the content
    of the source: a partial of other content is started afresh, because size and time may be equal;
    None: the caller compares what is kept. Raises `GiveUp` if something else than `source` has the
    final name, `Retry` if fewer than the route's `min_free` bytes would stay free.
    """
    final = await remote.confine(route.remote_path, route.there.roots)
    partial = partial_path(final)
    if route.again:
        await remote.withdraw(final, partial)
    if await remote.exists(final):
        await _check_standing(remote, final, partial, source)
        await remote.remove_all(origin_path(final))
        return Landing(final, partial, None)
    await remote.make_parents(final)
    wanted = _UNKNOWN if route.again or origin is None else origin.encode()[:LONGEST_ORIGIN]
    await _keep_same_origin(remote, final, partial, wanted)
    present = await _present(remote, partial, source)
    todo = plan(source, present, unsure=unsure, wrong=wrong)
    free = await remote.free(parent(final))
    enough_space(todo, present, free, route.min_free, remote.shown(final))
    note = await _begin(remote, final, wanted)
    await _prepare(remote, partial, todo, source)
    try:
        sizes = {seen.path: seen.size for seen in source if seen.path in (wrong or {})}
        await _cut(remote, partial, todo, present, sizes)
    except NOT_FOR_US:  # the server cannot truncate: write everything again
        await remote.remove_all(partial)
        todo = plan(source, ())
        await _prepare(remote, partial, todo, source)
    return Landing(final, partial, todo, note)


async def _check_standing(
    remote: Remote, final: FarPath, partial: FarPath, source: Sequence[Seen]
) -> None:
    """Raise `GiveUp` unless an attempt that was killed after its rename has left the copy."""
    # Servers that refuse to set times leave those of the writing, so with them names, kinds and
    # sizes must do.
    found = None if await remote.exists(partial) else await remote.look(final, check=False)
    if found and _timeless(found) == _timeless(source) and await _no_times(remote, final, found):
        found = [*source]
    check_standing(source, found, remote.shown(final))


async def publish(
    remote: Remote, landing: Landing, source: Sequence[Seen], *, unsynced: Iterable[Seen]
) -> None:
    """Make the links, bring the partial there to the disk and rename it, replacing nothing.

    `unsynced`: files whose time is still to be set and that are still to be synced. Raises `Retry`
    if the partial then differs from `source`, or another process has begun to write it; times
    count, to the second, if the server lets us set them.
    """
    for link in landing.todo.links if landing.todo else ():
        failpoints.point("ssh.link")
        path = join(landing.partial, link.path)
        with naming("symlink", path):
            await remote.sftp.symlink(link.target, path)
    untimed: list[Seen] = []
    await each(
        lambda seen: _finish(remote, join(landing.partial, seen.path), seen, untimed), unsynced
    )
    shape, shown = _timeless if untimed else to_the_second, remote.shown(landing.partial)
    looking = remote.look(landing.partial, check=False)
    noted = remote.read_small(origin_path(landing.final), _LONGEST_NOTE)
    found, note = await asyncio.gather(looking, noted)
    if note != landing.note:
        raise Retry(f"{shown} is being written by another process", after=BUSY_AFTER)
    if shape(found) != shape(source):
        raise Retry(f"{shown} is not what was to be written to it")
    # Before the rename, from the inside out: after a power cut the final name must not lead to a
    # directory whose entries were lost.
    if not is_file(source):
        below = [seen.path for seen in source if seen.kind == "dir"]
        paths = [join(landing.partial, inner) for inner in (*below[::-1], b"")]
        await each(remote.fsync_directory, paths)
    await remote.publish(landing.partial, landing.final)
    await remote.remove_all(origin_path(landing.final))  # last: if we die before, `land` removes it


@contextmanager
def only_pusher(where: str, final: bytes) -> Iterator[None]:
    """Keep a second process of this machine from pushing the same copy to `where`.

    `final` is the path as it was given. Raises `Retry` if another process pushes it.
    """
    # SFTP offers no lock at the far end, so the lock is on this machine; see `_begin` for others.
    busy = f"{where}:{printable(final)} is being pushed by another process"
    with process_lock(f"{where}\0".encode() + final, busy):
        yield


def in_session(endpoint: Endpoint, doing: str, function: Callable[[Remote], Awaitable[T]]) -> T:
    """Call a function with an SFTP session of its own; errors name what it was `doing`.

    Raises `Denied` if the host, our key or a request is refused, `RootAway` if a disk there is not
    mounted, and `Retry` for any other trouble; and what `function` raises.
    """

    async def run() -> T:
        with translated(endpoint, printable(os.fsencode(doing))):
            async with sftp_session(endpoint) as sftp:
                remote = Remote(endpoint, sftp)
                async with remote.steady():
                    return await function(remote)

    return aio.run(run())


async def _keep_same_origin(
    remote: Remote, final: FarPath, partial: FarPath, wanted: bytes
) -> None:
    """Remove a partial that may come from a source of other content than its note must name."""
    if wanted != _UNKNOWN:
        there = await remote.read_small(origin_path(final), _LONGEST_NOTE) or b""
        if there.partition(b"\n")[0] != wanted:
            await remote.remove_all(partial)  # before its note goes, which nobody may trust then


async def _begin(remote: Remote, final: FarPath, wanted: bytes) -> bytes:
    """Note that we write the partial, and from which content; return the note."""
    # SFTP has no locks. A process on another machine that began before, and has been replaced since
    # without knowing it, finds another note at its end, and publishes no mixture.
    note = wanted + b"\n" + token_hex(8).encode()
    await remote.remove_all(origin_path(final))
    await remote.write_new(origin_path(final), note)
    return note


async def _present(remote: Remote, partial: FarPath, source: Sequence[Seen]) -> list[Seen]:
    """List the partial there; remove it if it cannot become this copy."""
    try:
        mode = (await remote.ask("lstat", partial)).permissions or 0
    except GONE:
        return []
    if stat.S_ISREG(mode) if is_file(source) else stat.S_ISDIR(mode):
        return await remote.look(partial, check=False)
    if stat.S_ISDIR(mode):
        await remote.remove_tree(partial)
    else:
        failpoints.point("ssh.remove")
        await remote.ask("remove", partial)
    return []


async def _prepare(remote: Remote, partial: FarPath, todo: Plan, source: Sequence[Seen]) -> None:
    for seen in todo.remove:
        await remote.remove(partial, seen)
    if not is_file(source):
        await remote.make_directory(partial)
    elif not await remote.exists(partial):
        flags = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT
        attrs = asyncssh.SFTPAttrs(permissions=FILE_MODE)
        async with remote.opened(partial, flags, attrs):
            pass
    for seen in todo.directories:
        await remote.make_directory(join(partial, seen.path))


async def _cut(
    remote: Remote,
    partial: FarPath,
    todo: Plan,
    present: Iterable[Seen],
    sizes: Mapping[bytes, int],
) -> None:
    """Truncate existing files: to their final `sizes`, else to where they are resumed."""
    ends = {**{piece.file.path: piece.start for piece in todo.pieces}, **sizes}
    for seen in present:
        size = ends.get(seen.path)
        if seen.kind == "file" and size is not None and size < seen.size:
            await remote.ask("setstat", join(partial, seen.path), asyncssh.SFTPAttrs(size=size))


async def _finish(remote: Remote, path: FarPath, seen: Seen, untimed: list[Seen]) -> None:
    when = second(seen)
    attrs = asyncssh.SFTPAttrs(permissions=FILE_MODE, atime=when, mtime=when)
    try:
        await remote.ask("setstat", path, attrs)
    except NOT_FOR_US:
        untimed.append(seen)
    async with remote.opened(path, asyncssh.FXF_READ) as file:
        # Without that extension there is no way to have a file synced there.
        with suppress(*NOT_FOR_US):
            await file.fsync()


async def _no_times(remote: Remote, root: FarPath, found: Iterable[Seen]) -> bool:
    """Return whether the server refuses to set the times of existing files."""
    # Asked with the time that the first file has, which changes nothing if it is granted.
    for seen in found:
        if seen.kind == "file":
            when = second(seen)
            try:
                same = asyncssh.SFTPAttrs(atime=when, mtime=when)
                await remote.ask("setstat", join(root, seen.path), same)
            except NOT_FOR_US:
                return True
            return False
    return False


def _timeless(seen: Iterable[Seen]) -> list[tuple[object, ...]]:
    return to_the_second(evolve(one, mtime_ns=0) for one in seen)
