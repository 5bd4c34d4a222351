"""Serve the method ``gfal-copy``: grid storage (XRootD, WebDAV, SRM), by gfal2's command line."""

from __future__ import annotations

import errno
import os
import posixpath
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias, TypeVar

from attrs import define, evolve, field, frozen

from caxev import failpoints
from caxev.config import Site, state_directory
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.files import (
    Item,
    Manifest,
    Moved,
    PartDigest,
    RateLimiter,
    Report,
    Seen,
    StagedCopy,
    check_expected,
    check_names,
    confine,
    damaged,
    inside,
    is_file,
    item_digest,
    join,
    known_items,
    landing,
    local,
    look,
    manifest_of,
    name_in,
    open_resolved,
    partial_path,
    pinned,
    place_file,
    printable,
    shown,
)
from caxev.limited import ROWS
from caxev.transfer import ssh
from caxev.transfer.base import Route
from caxev.transfer.local_side import Meter, changed, look_here
from caxev.transfer.program import Answer, Ended, Lines, run

T = TypeVar("T")
Suspects: TypeAlias = Callable[[bytes], bool]

_PACKAGES: Final = "gfal2-util-scripts, gfal2-plugin-xrootd"
_AT_ONCE: Final = 4
_MANY: Final = 50  # directories in one call: starting a gfal program costs more than a mkdir
_DEEPEST: Final = 64
_CHUNK: Final = 1 << 20
_TAKING = 120.0  # seconds to wait in all for a server that is computing a checksum
_ANSWER = 20.0  # seconds to wait for one call of gfal-sum
_ASK_AGAIN: Final = 0.5  # seconds
# gfal-copy has one time limit for a whole file: a fixed part, and one that grows with its size.
_PATIENCE: Final = 600  # seconds
_SLOWEST: Final = 100_000  # bytes a second; a slower transfer counts as stalled
_PYTHON: Final = "/usr/bin/python3"
_URL: Final = re.compile(r"[a-z][a-z0-9+]*://[^\s/?#]+[^\s#]*")
# In an XRootD URL one slash ends the host's name, and an absolute path has another of its own.
_SLASHED: Final = ("root://", "roots://", "xroot://", "xroots://")
_NAME: Final = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:@-]+")
"""A name that needs no quoting in any of these URLs."""
_LISTED: Final = re.compile(
    r"(?P<kind>[-a-z])[-a-zA-Z]{9}\s+\d+\s+\S+\s+\S+\s+(?P<size>\d+)\s+"
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\.\d+ \+0000 (?P<name>.+)\t"
)
_GONE: Final = {errno.ENOENT, errno.ENOTDIR}
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_REFUSED: Final = {errno.EACCES, errno.EPERM}
_CANNOT: Final = {errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOSYS, 126, 127}


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
        far = _far(route.here, route.there)
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
        meter.guard = arrival.check_space
        if arrival.stands():
            return meter.moved(source)
        # gfal2 opens what it writes by name and follows links. It gets a directory that nobody else
        # can write to; `place_file` brings each file from there to the partial.
        with arrival.opened() as todo, landing(state_directory(route.here), final) as private:
            _check_names(private, [])
            failpoints.point("files.prepare")
            files = {piece.file.path: piece.file for piece in todo.pieces}
            meter.done = meter.total - sum(seen.size for seen in files.values())
            known = known_items(route.expected)
            copying = _Copying(far, arrival.partial, path, meter, known, private=private)
            _side_by_side(copying.fetch, files.values())
            arrival.finish(todo)
            if far.source(path) != source:  # before the rename, or a mixture would be published
                raise changed(far.shown(path))
            arrival.publish()
        return meter.moved(source)

    def push(self, route: Route, *, report: Report) -> Moved:
        """Send a copy there."""
        far = _far(route.here, route.there)
        here, source = look_here(route.local_path, route.here.roots)
        check_expected(source, route.expected, shown(here))
        _check_names(os.fsencode(here), source)
        final = far.confined(route.remote_path)
        partial = os.fsencode(partial_path(os.fsdecode(final)))
        meter = Meter.of(source, report)
        with ssh.only_pusher(far.prefix, final):
            # A partial that is there already comes from an interrupted repair: go on with that one.
            if route.again and far.stat(partial) is None and far.stat(final) is not None:
                far.rename(final, partial)
            known = known_items(route.expected)
            standing = _Copying(far, os.fsencode(here), final, meter, known)
            if far.stands(standing, partial, source):
                return meter.moved(source)
            copying = evolve(standing, far_root=partial)
            files = copying.prepare(source, _suspects(route))
            failpoints.point("files.prepare")
            meter.done = meter.total - sum(seen.size for seen in files)
            _side_by_side(copying.send, files)
            if look(here) != source:
                raise changed(shown(here))
            far.publish(partial, final, source)
        return meter.moved(source)

    def manifest(self, route: Route, *, report: Report) -> Manifest:
        """Stream the copy from there, file by file, and compute its BLAKE3 digests."""
        far = _far(route.here, route.there)
        path = far.confined(route.remote_path)
        source = far.source(path)
        meter, brake = Meter.of(source, report), RateLimiter(route.max_rate)
        reading = _Copying(far, b"", path, meter, brake=brake)
        items = _side_by_side(reading.digest, [seen for seen in source if seen.kind == "file"])
        if far.source(path) != source:
            raise Retry(f"{far.shown(path)} changed while it was read")
        reading.meter.moved(source)
        return Manifest([*items, *(i for i in manifest_of(source).items if i.kind != "file")])

    def check(self, here: Site, there: Site) -> str:
        """Stat the site's first directory, and return its URL and gfal2's version."""
        far = _far(here, there)
        answer = Answer("gfal-copy")
        far.run("gfal-copy", "--version", output=answer)
        path = os.fsencode(there.roots[0] if there.roots else "/")
        if far.stat(path) is None:
            raise GiveUp(f"{far.shown(path)} is not there")
        return f"{far.shown(path)} is there, by {next(iter(answer.lines), 'gfal2')}"


def _far(here: Site, there: Site) -> _Far:
    """Return the storage of `there` as `here` reaches it. Raises `GiveUp` if it cannot."""
    if shutil.which("gfal-copy") is None:
        raise Denied(f"gfal-copy is not installed here (Debian: {_PACKAGES})")
    prefix = there.hostname or ""
    if not _URL.fullmatch(prefix) or prefix.startswith("file:"):
        raise GiveUp(f"hostname of site {there.name!r} is not a URL as root://se.example.org/")
    # XRootD's defaults (120 s, 5 times) wait ten minutes for a dead server; our queue retries.
    environment = {"XRD_CONNECTIONWINDOW": "15", "XRD_CONNECTIONRETRY": "2"}
    if os.access(_PYTHON, os.X_OK):  # another one on PATH, as in a venv, would not have gfal2
        environment["GFAL_PYTHONBIN"] = _PYTHON
    # The operator's environment has precedence over our defaults, but not over the site's proxy.
    environment = {k: v for k, v in environment.items() if k not in os.environ}
    if proxy := here.grid_cert or there.grid_cert:
        if not os.access(proxy, os.R_OK):
            raise Denied(f"grid_cert {shown(proxy)} is not there or cannot be read")
        environment["X509_USER_PROXY"] = proxy
    slash = "/" if prefix.startswith(_SLASHED) else ""
    return _Far(prefix.rstrip("/") + slash, there.roots, there.nstreams, environment)


@frozen
class _Far:
    """Grid storage at a URL prefix, and its operations. Errors are `Retry` and `GiveUp`."""

    prefix: str
    roots: tuple[str, ...]
    nstreams: int | None
    environment: Mapping[str, str] = field(repr=False)

    def url(self, path: bytes) -> str:
        return self.prefix + os.fsdecode(path)

    def shown(self, path: bytes) -> str:
        return self.prefix + printable(path)

    def confined(self, path: str) -> bytes:
        """Return the path if it is strictly inside a root; by its text, as links are invisible."""
        wanted = os.fsencode(path)
        if not wanted.startswith(b"/") or b".." in wanted.split(b"/"):
            raise GiveUp(f"{printable(wanted) or 'an empty path'} is not a plain absolute path")
        plain = b"/" + posixpath.normpath(wanted).lstrip(b"/")
        roots = [root for root in self.roots if root.startswith("/")]
        if not any(inside(plain, os.fsencode(posixpath.normpath(root))) for root in roots):
            listed = " or ".join(roots) or "any directory"
            raise GiveUp(f"{self.shown(plain)} is not inside {listed}")
        check_names(plain, self.shown(plain))
        _check_names(plain, [])
        return plain

    def ended(
        self,
        *command: str,
        output: Callable[[bytes], object] = lambda _chunk: None,
        limit: float | None = None,
    ) -> Ended:
        """Run one of gfal2's programs and return its status; `limit` as in `program.run`."""
        environment = self.environment
        return run(command, package=_PACKAGES, output=output, environment=environment, limit=limit)

    def run(
        self,
        *command: str,
        output: Callable[[bytes], object] = lambda _chunk: None,
        limit: float | None = None,
    ) -> None:
        """Run one of gfal2's programs, and raise an error if it fails."""
        ended = self.ended(*command, output=output, limit=limit)
        if ended.status:
            raise _error(ended, command)

    def stat(self, path: bytes) -> Seen | None:
        """Return what is at `path`, its time to the second; None if there is nothing."""
        listed = self._list(path, "-d")
        return None if listed is None else evolve(listed[0], path=b"")

    def _list(self, path: bytes, *options: str) -> list[Seen] | None:
        answer = Answer("gfal-ls")
        command = ["gfal-ls", "-a", "-l", *options, "--time-style", "full-iso", self.url(path)]
        ended = self.ended(*command, output=answer)
        if ended.status in _GONE:
            return None
        # gfal-ls dies of such a name with a Python traceback: its status, 1, would read as EPERM.
        if "UnicodeDecodeError" in ended.said:
            raise GiveUp(f"{self.shown(path)} holds a name that no URL can carry")
        if ended.status:
            raise _error(ended, command)
        return [_seen(line, self.shown(path)) for line in answer.lines if line]

    def look(self, path: bytes) -> list[Seen] | None:
        """List the copy at `path`, sorted by path; None if there is nothing."""
        top = self.stat(path)
        if top is None or top.kind == "file":
            return None if top is None else [top]
        found: list[Seen] = []
        # Level by level: gfal-ls does not recurse, and the directories of one level are listed
        # side by side, as each takes a process and a round trip.
        level = [b""]
        for _ in range(_DEEPEST):
            inner = [seen for below in _side_by_side(self._below(path), level) for seen in below]
            found += inner
            if len(found) > ROWS:
                raise GiveUp(f"{self.shown(path)} holds more than {ROWS:,} files")
            level = [seen.path for seen in inner if seen.kind == "dir"]
            if not level:
                return sorted(found, key=lambda seen: seen.path)
        raise GiveUp(f"{self.shown(path)} is nested too deeply")

    def _below(self, root: bytes) -> Callable[[bytes], list[Seen]]:
        def below(path: bytes) -> list[Seen]:
            listed = self._list(join(root, path))
            if listed is None:
                raise Retry(f"{self.shown(join(root, path))} vanished meanwhile")
            # A server that lists `..` or a slash must not lead us out of the copy.
            for seen in listed:
                _check_names(seen.path, [])
                if b"/" in seen.path or seen.path in {b".", b".."}:
                    raise GiveUp(f"{self.prefix} listed the impossible {printable(seen.path)}")
            return [evolve(seen, path=join(path, seen.path)) if path else seen for seen in listed]

        return below

    def source(self, path: bytes) -> list[Seen]:
        """List a copy that is to be fetched. Raises `GiveUp` if it is gone."""
        found = self.look(path)
        if found is None:
            raise GiveUp(f"source directory gone: {self.shown(path)}")
        return found

    def adler32(self, path: bytes) -> int:
        """Return the far side's ADLER32 of a file. Raises `Retry` if it takes too long."""
        # The server may still be computing it, or hold the file open for a writer whose connection
        # broke. It may then never answer this request, so each one is cut short and repeated.
        until = time.monotonic() + _TAKING
        while True:
            try:
                command = ("gfal-sum", self.url(path), "ADLER32")
                answer = Answer("gfal-sum")
                self.run(*command, output=answer, limit=_ANSWER)
                break
            except _Unready:
                if time.monotonic() > until:
                    raise
                time.sleep(_ASK_AGAIN)
        try:
            return int(answer.lines[0].split()[-1], 16)
        except (IndexError, ValueError) as exc:
            raise Retry(f"no ADLER32 of {self.shown(path)}: {answer.lines[:1]}") from exc

    def make_directories(self, paths: Sequence[bytes]) -> None:
        """Make directories, and those above them, unless they exist."""
        for at in range(0, len(paths), _MANY):
            urls = [self.url(path) for path in paths[at : at + _MANY]]
            self.run("gfal-mkdir", "-p", *urls)

    def remove(self, path: bytes) -> None:
        """Remove a file or a whole tree."""
        self.run("gfal-rm", "-r", self.url(path))

    def stands(self, final: _Copying, partial: bytes, source: Sequence[Seen]) -> bool:
        """Return whether the copy has its final name. Raises `GiveUp` if something else has."""
        found = self.look(final.far_root)
        if found is None:
            return False
        files = [seen for seen in source if seen.kind == "file"]
        # Our own rename leaves no partial behind: with one, something else has the final name.
        same = _timeless(found) == _timeless(source) and self.stat(partial) is None
        if not same or not all(_side_by_side(final.is_same, files)):
            raise GiveUp(f"{self.shown(final.far_root)} exists already and is not replaced")
        return True

    def publish(self, partial: bytes, final: bytes, source: Sequence[Seen]) -> None:
        """Rename the partial to `final` if it matches `source` and the name is free."""
        if _timeless(self.look(partial) or []) != _timeless(source):
            raise Retry(f"{self.shown(partial)} is not what was written to it")
        if self.stat(final) is not None:
            raise GiveUp(f"{self.shown(final)} exists already and is not replaced")
        self.rename(partial, final)

    def rename(self, old: bytes, new: bytes) -> None:
        """Rename. Raises `GiveUp`, naming the protocol, if it has no rename."""
        failpoints.point("ssh.publish.rename")
        ended = self.ended("gfal-rename", self.url(old), self.url(new))
        failpoints.point("ssh.publish.rename")
        if ended.status in _CANNOT:
            scheme = self.prefix.partition(":")[0]
            raise GiveUp(f"{scheme} cannot rename at {self.shown(new)}: {ended.last}")
        if ended.status:
            raise _error(ended, ["gfal-rename", self.url(new)])


@frozen
class _Copying:
    """Move the files of one tree between `here`, its root on this machine, and `far_root`.

    `known`: the digests of the files, if known. `brake` limits the rate of reading back. gfal2
    writes the files that it fetches to the directory `private`.
    """

    far: _Far
    here: bytes
    far_root: bytes
    meter: Meter
    known: Mapping[bytes, Item] = field(factory=dict)
    brake: RateLimiter = field(factory=lambda: RateLimiter(None))
    private: bytes = b""

    def fetch(self, seen: Seen) -> None:
        """Fetch one file."""
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
        options = ["-v", "-f", "-p", "-K", "ADLER32", "-t", seconds, "-T", seconds, *streams]
        progress = _Progress(self.meter, seen.size)
        self.far.run("gfal-copy", *options, source, target, output=Lines(progress.line))
        progress.rest()

    def _compare(self, seen: Seen, here: bytes) -> None:
        if not self._is_same(seen, here):
            where = self.far.shown(join(self.far_root, seen.path))
            raise Retry(f"{where} and its copy differ by their ADLER32: either may have changed")

    def is_same(self, seen: Seen) -> bool:
        """Return whether a file is the same at both ends; see `_is_same`."""
        return self._is_same(seen, join(self.here, seen.path))

    def _is_same(self, seen: Seen, here: bytes) -> bool:
        """Return whether the file `here` is the same at the far end, by its ADLER32.

        Raises `Damaged` if it is, but does not match the manifest: then both ends are bad.
        """
        item = self.known.get(seen.path)
        ours, parts = _read(here)
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

        # Whatever is sent below must find its place free, so foreign entries go first; sorted, so
        # that a directory comes before what is in it and goes with one call.
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
        top = posixpath.dirname(self.far_root) if is_file(source) else self.far_root
        self.far.make_directories([top, *directories])
        files = [seen for seen in source if seen.kind == "file"]
        there = [seen for seen in files if seen.path in present]
        for seen, good in zip(there, _side_by_side(is_good, there), strict=True):
            if good:
                files.remove(seen)
            else:  # overwriting it would not do: the server may keep the old bytes' ADLER32
                self.far.remove(join(self.far_root, seen.path))
        return files

    def _present(self, source: Sequence[Seen]) -> list[Seen]:
        """List the far partial; remove it if it cannot become this copy."""
        present = self.far.look(self.far_root)
        if present is None:
            return []
        if is_file(present) != is_file(source):
            self.far.remove(self.far_root)
            return []
        return present

    def digest(self, seen: Seen) -> Item:
        """Read one file from there and compute its BLAKE3."""
        path = join(self.far_root, seen.path)
        digest = PartDigest()
        count = 0

        def take(chunk: bytes) -> None:
            nonlocal count
            digest.update(chunk)
            count += len(chunk)
            self.meter.add(len(chunk))
            self.brake.passed(len(chunk))

        self.far.run("gfal-cat", "-b", self.far.url(path), output=take)
        if count != seen.size:
            raise Retry(f"{self.far.shown(path)} changed while it was read")
        whole, parts = item_digest(digest.parts())
        return Item(seen.path, "file", seen.size, whole, parts=parts)


@define
class _Progress:
    """The progress of one file, from the output of gfal-copy."""

    meter: Meter
    size: int
    done: int = 0

    def line(self, text: str) -> None:
        """Take one line; a progress line ends with the bytes done and the seconds."""
        words = text.split()
        if words[:1] == ["monitor:"] and words[-2].isdecimal():
            self._at(int(words[-2]))

    def rest(self) -> None:
        """Count what is left of the file: small ones end before gfal-copy prints a line."""
        self._at(self.size)

    def _at(self, done: int) -> None:
        more = min(done, self.size) - self.done
        if more > 0:
            self.done += more
            self.meter.add(more)


def _suspects(route: Route) -> Suspects:
    """Return a test for the files that a repair must send whatever their ADLER32 there.

    A server may return the ADLER32 that it stored when the file was written, not that of its bytes.
    """
    if not route.again:
        return lambda _path: False
    if route.expected is None or route.found is None:
        return lambda _path: True
    bad = {difference.path for difference in route.expected.differences(route.found)}
    return bad.__contains__


def _side_by_side(function: Callable[[T], Any], items: Iterable[T]) -> list[Any]:
    """Call `function` for every item, a few at once; results in order. The first error ends it."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures: list[Future[Any]] = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        finally:  # leaving the pool waits for all that is queued, after an error too
            for future in futures:
                future.cancel()
    return [future.result() for future in futures]


def _seen(line: str, where: str) -> Seen:
    match = _LISTED.fullmatch(line)
    if match is None:
        raise GiveUp(f"{where} holds what a URL cannot name: {printable(os.fsencode(line))}")
    name = os.fsencode(match["name"])
    if match["kind"] == "d":
        return Seen(name, "dir")
    if match["kind"] != "-":
        raise GiveUp(f"{printable(name)} in {where} is neither a file nor a directory")
    time = datetime.strptime(match["time"], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    return Seen(name, "file", int(match["size"]), int(time.timestamp()) * 1_000_000_000)


def _check_names(root: bytes, seen: Iterable[Seen]) -> None:
    """Raise `GiveUp`, naming the culprit, if grid storage cannot hold the tree."""
    for item in seen:
        if item.kind == "link":
            raise GiveUp(f"grid storage has no links, and {printable(item.path)} is one")
    for path in (root, *(item.path for item in seen)):
        for name in path.split(b"/"):
            if name and not _NAME.fullmatch(name):
                raise GiveUp(f"a URL cannot carry the name {printable(name)}, in {printable(path)}")


def _timeless(seen: Iterable[Seen]) -> list[Seen]:
    return [evolve(item, mtime_ns=0) for item in seen]


def _local_url(path: bytes) -> str:
    return "file://" + os.fsdecode(path)


def _read(path: bytes) -> tuple[int, list[bytes]]:
    """Return the ADLER32 of a file here and the BLAKE3 of its parts, from one read."""
    value, parts = 1, PartDigest()
    with local(path, "read"), os.fdopen(open_resolved(path, os.O_RDONLY), "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.adler32(chunk, value)
            parts.update(chunk)
    return value, parts.parts()


class _Unready(Retry):
    """The far side has not finished; ask again."""


def _error(ended: Ended, command: Sequence[str]) -> Retry | GiveUp:
    # gfal's programs exit with an errno.
    what = f"{command[0]} {printable(os.fsencode(command[-1]))}"
    if ended.status in _FULL:
        return Denied(f"disk full ({what}): {ended.last}")
    if ended.status in {errno.EINPROGRESS, errno.ETIMEDOUT}:
        return _Unready(f"the far side is not ready ({what}): {ended.last}")
    if ended.status in _GONE:
        return Retry(f"something vanished meanwhile ({what}): {ended.last}")
    if ended.status in _REFUSED:
        return Denied(f"we are refused ({what}): {ended.last}")
    if ended.status in _CANNOT:
        return GiveUp(f"that cannot be done ({what}): {ended.last}")
    return Retry(f"failed ({what}): {ended.last}")
