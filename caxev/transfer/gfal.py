"""Serve the method ``gfal-copy``: grid storage (XRootD, WebDAV, SRM), by gfal2's command line."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from attrs import evolve, field, frozen

from caxev import failpoints
from caxev.config import Site, state_directory
from caxev.core.errors import GiveUp, Retry
from caxev.files import (
    Confined,
    FarPath,
    Item,
    Manifest,
    Meter,
    Moved,
    PartDigest,
    Plan,
    RateLimiter,
    Report,
    Seen,
    StagedCopy,
    changed,
    check_expected,
    confine,
    damaged,
    is_file,
    item_digest,
    join,
    known_items,
    landing,
    local,
    look,
    look_source,
    manifest_of,
    name_in,
    open_resolved,
    parent,
    partial_path,
    pinned,
    place_file,
    printable,
)
from caxev.program import Answer, Limits, Lines
from caxev.threads import side_by_side
from caxev.transfer import ssh
from caxev.transfer.base import Route
from caxev.transfer.grid import GridStorage, check_url_names, storage_of

Suspects: TypeAlias = Callable[[bytes], bool]

_CHUNK: Final = 1 << 20
# gfal-copy has one time limit for a whole file: a fixed part, and one that grows with its size.
_PATIENCE: Final = 600  # seconds
_SLOWEST: Final = 100_000  # bytes a second; a slower transfer counts as stalled


class Gfal:
    """Move copies to and from grid storage; see `caxev.transfer.base.Mover`.

    The site's `hostname` is the beginning of a URL, to which paths are appended. Four files move at
    once, each by `nstreams` streams. After each, its ADLER32 at the far side is compared with ours.
    Grid storage has no links, and keeps neither our times nor modes: files are compared by size and
    ADLER32. Names are limited to what URLs carry.

    gfal2 has no rate limit, so `max_rate` holds only for `manifest`; `min_free` is not checked at
    the far side. A rename there replaces a file that appears in that very moment.
    """

    def pull(self, route: Route, *, report: Report) -> Moved:
        """Fetch a copy from there."""
        far = storage_of(route.here, route.there)
        path = far.confined(route.remote_path)
        final = confine(route.local_path, route.here.roots)
        source = far.source(path)
        check_expected(source, route.expected, far.shown(path))
        arrival = StagedCopy(
            final,
            route.here.roots,
            source,
            route.expected,
            route.min_free,
            again=route.again,
            whole_files=True,
            report=report,
        )
        meter = Meter.of(source, report)

        def fill(todo: Plan) -> None:
            # gfal2 opens what it writes by name and follows links. It gets a directory that nobody
            # else can write to; `place_file` brings each file from there to the partial.
            with landing(state_directory(route.here), final) as private:
                check_url_names(private, [])
                files = {piece.file.path: piece.file for piece in todo.pieces}
                meter.done = meter.total - sum(seen.size for seen in files.values())
                known = known_items(route.expected)
                copying = _GridCopy(far, arrival.partial, path, meter, known, private=private)
                side_by_side(copying.fetch, files.values())

        def check() -> None:
            if far.source(path) != source:
                raise changed(far.shown(path))

        return arrival.made(meter, fill, check)

    def push(self, route: Route, *, report: Report) -> Moved:
        """Send a copy there."""
        far = storage_of(route.here, route.there)
        here = confine(route.local_path, route.here.roots)
        source = look_source(here)
        check_expected(source, route.expected, printable(here))
        check_url_names(here, source)
        final = far.confined(route.remote_path)
        partial = partial_path(final)
        meter = Meter.of(source, report)
        with ssh.only_pusher(far.prefix, final):
            # An interrupted repair has left no copy, and continues with its partial.
            if route.again and far.stat(final) is not None:
                if far.stat(partial) is not None:  # of another attempt
                    far.remove(partial)
                far.rename(final, partial)
            known = known_items(route.expected)
            standing = _GridCopy(far, here, final, meter, known)
            if far.stands(final, partial, source, standing.is_same):
                return meter.moved(source)
            copying = evolve(standing, far_root=partial)
            files = copying.prepare(source, _suspects(route))
            failpoints.point("files.prepare")
            meter.done = meter.total - sum(seen.size for seen in files)
            side_by_side(copying.send, files)
            if look(here) != source:
                raise changed(printable(here))
            far.publish(partial, final, source)
        return meter.moved(source)

    def manifest(self, route: Route, *, report: Report) -> Manifest:
        """Stream the copy from there, file by file, and compute its BLAKE3 digests."""
        far = storage_of(route.here, route.there)
        path = far.confined(route.remote_path)
        source = far.source(path)
        meter = Meter.of(source, report)
        reading = _GridReading(far, path, meter, RateLimiter(route.max_rate))
        items = side_by_side(reading.digest, [seen for seen in source if seen.kind == "file"])
        if far.source(path) != source:
            raise Retry(f"{far.shown(path)} changed while it was read")
        meter.moved(source)
        return Manifest([*items, *(i for i in manifest_of(source).items if i.kind != "file")])

    def check(self, here: Site, there: Site) -> str:
        """Stat the site's first directory, and return its URL and gfal2's version."""
        far = storage_of(here, there)
        answer = Answer("gfal-copy")
        far.run("gfal-copy", "--version", output=answer)
        path = FarPath(os.fsencode(there.roots[0] if there.roots else "/"))
        if far.stat(path) is None:
            raise GiveUp(f"{far.shown(path)} is not there")
        return f"{far.shown(path)} is there, by {next(iter(answer.lines), 'gfal2')}"


@frozen
class _GridCopy:
    """Move the files of one tree between `here`, its root on this machine, and `far_root`.

    `known`: the digests of the files, if known. gfal2 writes the files that it fetches to the
    directory `private`.
    """

    far: GridStorage
    here: Confined
    far_root: FarPath
    meter: Meter
    known: Mapping[bytes, Item] = field(factory=dict)
    private: Confined | None = None

    def fetch(self, seen: Seen) -> None:
        """Fetch one file."""
        assert self.private is not None
        path, staged = join(self.here, seen.path), name_in(self.private, seen.path)
        self._copy(self.far.url(join(self.far_root, seen.path)), _local_url(staged), seen)
        self._compare(seen, staged)
        with local(path, "write"):
            # The source's time marks a file as whole: set it before the file gets its place.
            os.utime(staged, ns=(seen.mtime_ns, seen.mtime_ns))
            place_file(staged, path, is_lock=not seen.path)
        failpoints.point("files.file")

    def send(self, seen: Seen) -> None:
        """Send one file."""
        path = join(self.here, seen.path)
        # gfal2 gets a name that is tied to the open file: renames cannot make it send another.
        with pinned(path) as name:
            self._copy(_local_url(name), self.far.url(join(self.far_root, seen.path)), seen)
        self._compare(seen, path)
        failpoints.point("ssh.file")

    def _copy(self, source: str, target: str, seen: Seen) -> None:
        seconds = str(_PATIENCE + seen.size // _SLOWEST)
        streams = ["-n", str(self.far.nstreams)] if self.far.nstreams else []
        # `-f` replaces what an earlier attempt left at the target. `-K` compares sums by gfal2
        # itself, which fails early; the comparison that counts is `_compare`, by our own sum.
        options = ["-v", "-f", "-p", "-K", "ADLER32", "-t", seconds, "-T", seconds, *streams]
        done = 0

        def at(count: int) -> None:
            nonlocal done
            more = min(count, seen.size) - done
            if more > 0:
                done += more
                self.meter.add(more)

        def line(text: str) -> None:
            match text.split():
                case ["monitor:", *_, count, _seconds] if count.isdecimal():
                    at(int(count))

        shown = Lines(line, terminal=True)
        limits = Limits(file_size=seen.size)
        self.far.run("gfal-copy", *options, source, target, output=shown, limits=limits)
        at(seen.size)  # small files end before gfal-copy prints a line

    def _compare(self, seen: Seen, here: Confined) -> None:
        if not self.is_same(seen, here):
            where = self.far.shown(join(self.far_root, seen.path))
            raise Retry(f"{where} and its copy differ by their ADLER32: either may have changed")

    def is_same(self, seen: Seen, here: Confined | None = None) -> bool:
        """Return whether a file, by default the copy's, is the same at the far end, by its ADLER32.

        Raises `Damaged` if it is, but does not match the manifest: then both ends are bad.
        """
        item = self.known.get(seen.path)
        ours, parts = _read(here or join(self.here, seen.path))
        if ours != self.far.adler32(join(self.far_root, seen.path)):
            return False
        if item is not None and parts != item.part_digests():
            raise damaged(seen.path, f"{printable(self.here)}, as at the other end,")
        return True

    def prepare(self, source: Sequence[Seen], suspects: Suspects) -> list[Seen]:
        """Make the far partial's directories, remove what is foreign; return the files to send."""

        def is_good(seen: Seen) -> bool:
            sized = present[seen.path].size == seen.size
            return sized and not suspects(seen.path) and self.is_same(seen)

        # Files that are sent below must find their places free, so foreign entries go first;
        # sorted, so that a directory comes before what is in it and goes with one call.
        present = {seen.path: seen for seen in self._present(source)}
        wanted = {seen.path: seen.kind for seen in source}
        gone: list[bytes] = []
        for path, seen in sorted(present.items()):
            below = any(path.startswith(other + b"/") for other in gone)
            if wanted.get(path) != seen.kind and not below:
                self.far.remove(join(self.far_root, path))
                gone.append(path)
        for path in gone:
            present.pop(path)
        directories = [join(self.far_root, s.path) for s in source if s.kind == "dir"]
        top = parent(self.far_root) if is_file(source) else self.far_root
        self.far.make_directories([top, *directories])
        files = [seen for seen in source if seen.kind == "file"]
        there = [seen for seen in files if seen.path in present]
        good = dict(zip(there, side_by_side(is_good, there), strict=True))
        for seen in there:
            if not good[seen]:  # overwriting would not do: the server may keep its old ADLER32
                self.far.remove(join(self.far_root, seen.path))
        return [seen for seen in files if not good.get(seen)]

    def _present(self, source: Sequence[Seen]) -> list[Seen]:
        """List the far partial; remove it if it cannot become this copy."""
        present = self.far.look(self.far_root)
        if present is None:
            return []
        if is_file(present) != is_file(source):
            self.far.remove(self.far_root)
            return []
        return present


@frozen
class _GridReading:
    """Read the files below a path there, at a limited rate."""

    far: GridStorage
    root: FarPath
    meter: Meter
    limiter: RateLimiter

    def digest(self, seen: Seen) -> Item:
        """Read one file from there and compute its BLAKE3."""
        path = join(self.root, seen.path)
        digest = PartDigest()
        count = 0

        def take(chunk: bytes) -> None:
            nonlocal count
            digest.update(chunk)
            count += len(chunk)
            if count > seen.size:  # it need not end
                raise Retry(f"{self.far.shown(path)} changed while it was read")
            self.meter.add(len(chunk))
            self.limiter.passed(len(chunk))

        self.far.run("gfal-cat", "-b", self.far.url(path), output=take)
        if count != seen.size:
            raise Retry(f"{self.far.shown(path)} changed while it was read")
        whole, parts = item_digest(digest.parts())
        return Item(seen.path, "file", seen.size, whole, parts=parts)


def _suspects(route: Route) -> Suspects:
    """Return a test for the files that a repair must send even if their ADLER32 is right.

    A server may return the ADLER32 that it stored when the file was written, not that of its bytes.
    """
    if not route.again:
        return lambda _path: False
    if route.expected is None or route.found is None:
        return lambda _path: True
    bad = {difference.path for difference in route.expected.differences(route.found)}
    return bad.__contains__


def _local_url(path: bytes) -> str:
    return "file://" + os.fsdecode(path)


def _read(path: Confined) -> tuple[int, list[bytes]]:
    """Return the ADLER32 of a file here and the BLAKE3 of its parts, from one read."""
    value, parts = 1, PartDigest()
    with local(path, "read"), os.fdopen(open_resolved(path, os.O_RDONLY), "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.adler32(chunk, value)
            parts.update(chunk)
    return value, parts.parts()
