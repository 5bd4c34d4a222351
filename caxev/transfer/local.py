"""Serve the method ``local``: both sites on this host, or on a file system that they share."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

from attrs import frozen

from caxev import failpoints
from caxev.config import Site
from caxev.core.errors import GiveUp
from caxev.files import (
    FILE_MODE,
    Confined,
    Manifest,
    Meter,
    Moved,
    Piece,
    Plan,
    RateLimiter,
    Report,
    StagedCopy,
    changed,
    check_expected,
    check_unchanged,
    confine,
    digest_tree,
    is_file,
    join,
    local,
    look,
    look_source,
    opened,
    printable,
    shown,
)
from caxev.files.resolved import link, unlink
from caxev.files.ways import CANNOT, cloned, tried
from caxev.transfer.base import Route, check_content

_CHUNK: Final = 8 << 20
_LEAST: Final = 64 << 10


class Local:
    """Copy on one machine; see `caxev.transfer.base.Mover`.

    Each file is copied the cheapest way that works: a hard link if the site allows it, a reflink, a
    copy inside the kernel, reading and writing. Files of an earlier attempt are kept. A hard link
    keeps the mode of its source; a copy of a single file is never a hard link. Links and reflinks
    move no bytes, so `max_rate` does not slow them.
    """

    def pull(self, route: Route, *, report: Report) -> Moved:
        """Copy from the other site's directory to ours."""
        source = confine(route.remote_path, route.there.roots)
        return _copy(route, source, route.local_path, route.here.roots, report)

    def push(self, route: Route, *, report: Report) -> Moved:
        """Copy from our directory to the other site's."""
        source = confine(route.local_path, route.here.roots)
        return _copy(route, source, route.remote_path, route.there.roots, report)

    def manifest(self, route: Route, *, report: Report) -> Manifest:
        """Read the copy in the other site's directory."""
        path = confine(route.remote_path, route.there.roots)
        look_source(path)
        return digest_tree(path, sha512=False, max_rate=route.max_rate, report=report)

    def check(self, here: Site, there: Site) -> str:
        """Return the site's directories. Raises `GiveUp` naming one that is missing."""
        del here
        for root in there.roots:
            if not os.path.isdir(root):
                raise GiveUp(f"{shown(root)} of site {there.name!r} is not there")
        return ", ".join(map(shown, there.roots)) or "no directories"


def _copy(
    route: Route, path: Confined, target: str, roots: tuple[str, ...], report: Report
) -> Moved:
    tree = look_source(path)
    check_expected(tree, route.expected, printable(path))
    arrival = StagedCopy(
        confine(target, roots),
        roots,
        tree,
        route.expected,
        route.min_free,
        again=route.again,
        whole_files=True,
        origin=route.origin,
        report=report,
    )
    meter = Meter.of(tree, report)
    copying = _TreeCopy(path, arrival.partial, RateLimiter(route.max_rate), meter)
    # A single file is its own lock: a link would replace the locked inode.
    linking = route.there.hard_links and not is_file(tree)

    def fill(todo: Plan) -> None:
        own = [piece for piece in todo.pieces if not (linking and copying.link(piece))]
        for piece in own:
            copying.copy(piece)
            failpoints.point("files.file")

    def check() -> None:
        # A source that changed meanwhile may have given us a mixture, and the second check reads
        # what was written: copies inside the kernel pass no bytes through us.
        if look(path) != tree:
            raise changed(printable(path))
        check_content(arrival.partial, route.expected, printable(path))

    return arrival.made(meter, fill, check)


@frozen
class _TreeCopy:
    """Copy the files of one tree to a partial."""

    source: Confined
    target: Confined
    limiter: RateLimiter
    meter: Meter

    def link(self, piece: Piece) -> bool:
        """Make a hard link to a file if the file system can; return whether it did."""
        old, new = join(self.source, piece.file.path), join(self.target, piece.file.path)
        if piece.left < piece.file.size:
            return False  # the rest of a copy that an earlier attempt began
        with local(new, "write"):
            with suppress(FileNotFoundError):
                unlink(new)
            linked = tried(link, old, new)
        if linked:
            self.meter.shared(piece.left)
        return linked

    def copy(self, piece: Piece) -> None:
        """Copy a piece of a file. Raises `Retry` if the source changes."""
        old, new = join(self.source, piece.file.path), join(self.target, piece.file.path)
        with (
            local(new, "write"),
            opened(old, os.O_RDONLY) as reading,
            opened(new, os.O_WRONLY | os.O_CREAT, FILE_MODE) as writing,
        ):
            check_unchanged(reading, piece.file, old)
            # A reflink replaces all of the target, so it serves to finish an interrupted copy too.
            if cloned(reading, writing):
                self.meter.shared(piece.left)
            else:
                for descriptor in (reading, writing):
                    os.lseek(descriptor, piece.start, os.SEEK_SET)
                if self._bytes(reading, writing, piece.left) != piece.left:
                    raise changed(printable(old))
            # The time marks the file as whole, so it comes after the last byte.
            os.utime(writing, ns=(piece.file.mtime_ns, piece.file.mtime_ns))
            check_unchanged(reading, piece.file, old)

    def _bytes(self, reading: int, writing: int, length: int) -> int:
        """Copy up to `length` bytes; return how many, fewer if the file ends before."""
        done = 0
        step = _in_kernel
        while done < length:
            count = step(reading, writing, min(self.limiter.chunk(_CHUNK, _LEAST), length - done))
            if count is None:  # not in the kernel for these two files: by reads and writes
                step = _by_hand
            elif count == 0:
                break
            else:
                done += count
                self.meter.add(count)
                self.limiter.passed(count)
        return done


def _in_kernel(reading: int, writing: int, length: int) -> int | None:
    """Copy from both current offsets; return the bytes copied, or None to copy by hand."""
    # It returns 0 at the end of a file, but also for some files that have bytes (as in /proc):
    # `or None` has `_by_hand` decide which it is.
    try:
        return os.copy_file_range(reading, writing, length) or None
    except OSError as exc:
        if exc.errno in CANNOT:
            return None
        raise


def _by_hand(reading: int, writing: int, length: int) -> int | None:
    block = os.read(reading, min(length, 1 << 20))
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(writing, rest) :]
    return len(block)
