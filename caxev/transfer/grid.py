"""Operate grid storage (XRootD, WebDAV, SRM) by gfal2's command line. Used by `gfal`."""

from __future__ import annotations

import errno
import os
import posixpath
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from attrs import evolve, field, frozen

from caxev import failpoints
from caxev.config import Site
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.files import FarPath, Seen, check_names, check_rows, gone, inside, join, printable, shown
from caxev.program import PLAIN, UNLIMITED, Answer, Limits, Output, Program, ProgramEnd, run
from caxev.threads import side_by_side

_PACKAGES: Final = "gfal2-util-scripts, gfal2-plugin-xrootd"
_MANY: Final = 50  # directories in one call: starting a gfal program costs more than a mkdir
_DEEPEST: Final = 64
_TAKING = 120.0  # seconds to wait in all for a server that is computing a checksum
_ANSWER = 20.0  # seconds to wait for one call of gfal-sum
_ASK_AGAIN: Final = 0.5  # seconds
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


def storage_of(here: Site, there: Site) -> GridStorage:
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
    return GridStorage(prefix.rstrip("/") + slash, there.roots, there.nstreams, environment)


@frozen
class GridStorage:
    """Grid storage at a URL prefix, and its operations. Errors are `Retry` and `GiveUp`."""

    prefix: str
    roots: tuple[str, ...]
    nstreams: int | None
    environment: Mapping[str, str] = field(repr=False)

    def url(self, path: bytes) -> str:
        return self.prefix + os.fsdecode(path)

    def shown(self, path: bytes) -> str:
        return self.prefix + printable(path)

    def confined(self, path: str) -> FarPath:
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
        check_url_names(plain, [])
        return FarPath(plain)

    def ended(
        self, *command: str, output: Output = lambda _: None, limits: Limits = UNLIMITED
    ) -> ProgramEnd:
        """Run one of gfal2's programs and return its status."""
        program = Program(command, _PACKAGES, {**PLAIN, **self.environment})
        return run(program, output=output, limits=limits)

    def run(
        self, *command: str, output: Output = lambda _: None, limits: Limits = UNLIMITED
    ) -> None:
        """Run one of gfal2's programs, and raise an error if it fails."""
        ended = self.ended(*command, output=output, limits=limits)
        if ended.status:
            raise _error(ended, command)

    def stat(self, path: FarPath) -> Seen | None:
        """Return what is at `path`, its time to the second; None if there is nothing."""
        listed = self._list(path, "-d")
        return None if listed is None else evolve(listed[0], path=b"")

    def _list(self, path: FarPath, *options: str) -> list[Seen] | None:
        answer = Answer("gfal-ls")
        # With `-a`: a hidden file in a copy would else pass unnoticed.
        command = ["gfal-ls", "-a", "-l", *options, "--time-style", "full-iso", self.url(path)]
        ended = self.ended(*command, output=answer)
        # Its parser of arguments, and Python without a script, end with the number of ENOENT, too.
        if ended.status in _GONE and f" error: {ended.status} (" in ended.said:
            return None
        # gfal-ls dies of such a name with a Python traceback: its status, 1, would read as EPERM.
        if "UnicodeDecodeError" in ended.said:
            raise GiveUp(f"{self.shown(path)} holds a name that no URL can carry")
        if ended.status:
            raise _error(ended, command)
        return [_seen(line, self.shown(path)) for line in answer.lines if line]

    def look(self, path: FarPath) -> list[Seen] | None:
        """List the copy at `path`, sorted by path; None if there is nothing."""
        top = self.stat(path)
        if top is None or top.kind == "file":
            return None if top is None else [top]
        found: list[Seen] = []
        # Level by level: gfal-ls does not recurse, and the directories of one level are listed
        # side by side, as each takes a process and a round trip.
        level = [b""]
        for _ in range(_DEEPEST):
            inner = [seen for below in side_by_side(self._below(path), level) for seen in below]
            found += inner
            check_rows(len(found), self.shown(path))
            level = [seen.path for seen in inner if seen.kind == "dir"]
            if not level:
                return sorted(found, key=lambda seen: seen.path)
        raise GiveUp(f"{self.shown(path)} is nested too deeply")

    def _below(self, root: FarPath) -> Callable[[bytes], list[Seen]]:
        def below(path: bytes) -> list[Seen]:
            listed = self._list(join(root, path))
            if listed is None:
                raise Retry(f"{self.shown(join(root, path))} vanished meanwhile")
            # A server that lists `..` or a slash must not lead us out of the copy.
            for seen in listed:
                check_url_names(seen.path, [])
                if b"/" in seen.path or seen.path in {b".", b".."}:
                    raise GiveUp(f"{self.prefix} listed the impossible {printable(seen.path)}")
            return [evolve(seen, path=path + b"/" + seen.path) if path else seen for seen in listed]

        return below

    def source(self, path: FarPath) -> list[Seen]:
        """List a copy to fetch. Raises `GiveUp` if it is gone."""
        found = self.look(path)
        if found is None:
            raise gone(self.shown(path))
        return found

    def adler32(self, path: FarPath) -> int:
        """Return the far side's ADLER32 of a file. Raises `Retry` if it takes too long."""
        # The server may still be computing it, or hold the file open for a writer whose connection
        # broke. It may then never answer this request, so each one is cut short and repeated.
        until = time.monotonic() + _TAKING
        while True:
            try:
                command = ("gfal-sum", self.url(path), "ADLER32")
                answer = Answer("gfal-sum")
                self.run(*command, output=answer, limits=Limits(_ANSWER))
                break
            except _Unready:
                if time.monotonic() > until:
                    raise
                time.sleep(_ASK_AGAIN)
        try:
            return int(answer.lines[0].split()[-1], 16)
        except (IndexError, ValueError) as exc:
            raise Retry(f"no ADLER32 of {self.shown(path)}: {answer.lines[:1]}") from exc

    def make_directories(self, paths: Sequence[FarPath]) -> None:
        """Make directories, and those above them, unless they exist."""
        for at in range(0, len(paths), _MANY):
            urls = [self.url(path) for path in paths[at : at + _MANY]]
            self.run("gfal-mkdir", "-p", *urls)

    def remove(self, path: FarPath) -> None:
        """Remove a file or a whole tree."""
        self.run("gfal-rm", "-r", self.url(path))

    def stands(
        self,
        final: FarPath,
        partial: FarPath,
        source: Sequence[Seen],
        is_same: Callable[[Seen], bool],
    ) -> bool:
        """Return whether the copy has its final name. Raises `GiveUp` if something else has."""
        found = self.look(final)
        if found is None:
            return False
        files = [seen for seen in source if seen.kind == "file"]
        # Our own rename leaves no partial behind: with one, something else has the final name.
        same = _timeless(found) == _timeless(source) and self.stat(partial) is None
        if not same or not all(side_by_side(is_same, files)):
            raise GiveUp(f"{self.shown(final)} exists already and is not replaced")
        return True

    def publish(self, partial: FarPath, final: FarPath, source: Sequence[Seen]) -> None:
        """Rename the partial to `final` if it matches `source` and the name is free."""
        if _timeless(self.look(partial) or []) != _timeless(source):
            raise Retry(f"{self.shown(partial)} is not what was written to it")
        # A rename on grid storage may replace its target, so this check leaves a short race. Other
        # caxev sites are kept out by the claim of the copy's entry.
        if self.stat(final) is not None:
            raise GiveUp(f"{self.shown(final)} exists already and is not replaced")
        self.rename(partial, final)

    def rename(self, old: FarPath, new: FarPath) -> None:
        """Rename. Raises `GiveUp`, naming the protocol, if it has no rename."""
        failpoints.point("ssh.publish.rename")
        ended = self.ended("gfal-rename", self.url(old), self.url(new))
        if ended.status in _CANNOT:
            scheme = self.prefix.partition(":")[0]
            raise GiveUp(f"{scheme} cannot rename at {self.shown(new)}: {ended.last}")
        if ended.status:
            raise _error(ended, ["gfal-rename", self.url(new)])


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


def check_url_names(root: bytes, seen: Iterable[Seen]) -> None:
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


class _Unready(Retry):
    """The far side has not finished; ask again."""


def _error(ended: ProgramEnd, command: Sequence[str]) -> Retry | GiveUp:
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
