"""Method ``rsync``: rsync over OpenSSH moves the bytes of files, SFTP sees to all the rest."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from typing import Final

from attrs import define, field, frozen

from caxev import failpoints
from caxev.config import Site, state_directory
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.files import (
    DIR_MODE,
    FILE_MODE,
    Manifest,
    Moved,
    Report,
    StagedCopy,
    apart,
    bring_in,
    check_expected,
    confine,
    filling_up,
    is_file,
    landing,
    look,
    mirror,
    printable,
    shown,
)
from caxev.transfer import ssh
from caxev.transfer.base import Route
from caxev.transfer.local_side import Meter, changed, check_content, look_here
from caxev.transfer.program import Answer, Ended, Lines, run
from caxev.transfer.sftp import Sftp

_LOOK_AT_DISK: Final = 30.0  # seconds between two looks at the far disk: each is a log-in
_SILENCE: Final = 300  # seconds without a byte after which rsync leaves, at either end
_RSYNC: Final = (
    "rsync",
    "--recursive",
    "--no-links",  # SFTP makes them, when it has seen where they lead
    "--times",
    "--omit-dir-times",
    "--perms",
    f"--chmod=D{DIR_MODE:o},F{FILE_MODE:o}",
    # A file that was cut off is gone on with: rsync compares what is there block by block. Until
    # a file is whole its time is not the source's, so it never passes for it.
    "--inplace",
    "--secluded-args",
    "--no-inc-recursive",
    "--info=progress2",
    "--stats",
    "--no-human-readable",
    "--outbuf=N",
    f"--timeout={_SILENCE}",
)
_PROGRESS: Final = re.compile(r"\s*([0-9]+)\s+[0-9]+%")
_LITERAL: Final = re.compile(r"Literal data: ([0-9]+)")
_WILD: Final = re.compile(r"([*?\[\\])")

_NOT_THERE: Final = 127
_OUR_FAULT: Final = {1, 2, 4, 6}
_MEANING: Final = {
    10: "the connection was lost",
    11: "disk full or failing",
    12: "the connection was lost",
    24: "a file vanished meanwhile",
    30: "no answer in time",
    35: "no answer in time",
    255: "the connection was lost",
}
"""What rsync's exit status says; others are told in its own words."""


class Rsync:
    """Moves copies by rsync; see `caxev.transfer.base.Mover`.

    rsync must be installed at both ends. It goes by names, so here it writes to a private directory
    and finds there what it reads. `manifest` reads the copy back over SFTP. To repair a copy, or to
    go on with one, both ends read all of it, and what differs is sent.
    """

    def pull(self, route: Route, *, report: Report) -> Moved:
        """Fetch a copy from there."""
        endpoint = ssh.endpoint_of(route.here, route.there)
        final = confine(route.local_path, route.here.roots)
        path, source = ssh.look_there(endpoint, route.remote_path, route.there.roots)
        where = f"{endpoint}:{printable(path)}"
        check_expected(source, route.expected, where)
        arrival = StagedCopy(
            final, route.here.roots, source, min_free=route.min_free, again=route.again
        )
        meter = Meter.of(source, report)
        meter.guard = arrival.check_space
        if arrival.stands():
            return meter.moved(source)
        with (
            apart(state_directory(route.here), arrival) as inner,
            inner.opened() as todo,
            ssh.shell(endpoint) as shell,
        ):
            failpoints.point("files.prepare")
            meter.left(todo)
            slash = b"" if is_file(source) else b"/"
            far = _far(endpoint, _plain(path) + slash)
            _Run(route, endpoint, shell, meter).move(far, inner.partial + slash)
            inner.finish(todo)
            if ssh.look_there(endpoint, route.remote_path, route.there.roots) != (path, source):
                raise changed(where)
            made = os.fsdecode(inner.partial)
            check_content(made, route.expected, where)
            bring_in(made, final, route.here.roots, min_free=route.min_free)
        return meter.moved(source)

    def push(self, route: Route, *, report: Report) -> Moved:
        """Bring a copy there."""
        endpoint = ssh.endpoint_of(route.here, route.there)
        here, source = look_here(route.local_path, route.here.roots)
        check_expected(source, route.expected, shown(here))
        meter = Meter.of(source, report)
        name = f"{endpoint}:{route.remote_path}"
        with (
            ssh.only_pusher(str(endpoint), os.fsencode(route.remote_path)),
            ssh.shell(endpoint) as shell,
        ):
            there = ssh.land_there(
                endpoint,
                route.remote_path,
                route.there.roots,
                source,
                min_free=route.min_free,
                again=route.again,
            )
            if there.todo is None:
                return meter.moved(source)
            failpoints.point("ssh.prepare")
            meter.left(there.todo)
            meter.guard = _Room(endpoint, there.final, route.min_free).check
            slash = b"" if is_file(source) else b"/"
            far = _far(endpoint, _plain(there.partial) + slash)
            with landing(state_directory(route.here), name) as private:
                view = os.path.join(private, b"copy")
                with mirror(here, os.fsdecode(view), links=False):
                    _Run(route, endpoint, shell, meter).move(view + slash, far, "--copy-links")
            if look(here) != source:
                raise changed(shown(here))
            check_content(here, route.expected, shown(here))
            ssh.publish_there(endpoint, there, source)
        return meter.moved(source)

    def manifest(self, route: Route, *, report: Report) -> Manifest:
        """Read a copy back from there."""
        return Sftp().manifest(route, report=report)

    def check(self, here: Site, there: Site) -> str:
        """Start SFTP, and rsync at both ends; say who answered."""
        endpoint = ssh.endpoint_of(here, there)
        answer = Sftp().check(here, there)
        ours = _first_line(["rsync", "--version"], endpoint)
        with ssh.shell(endpoint) as shell:
            theirs = _first_line([*shell, ssh.host_name(endpoint), "rsync --version"], endpoint)
        return f"{answer}; {theirs} there, {ours} here"


def _first_line(command: Sequence[str], endpoint: ssh.Endpoint) -> str:
    answer = Answer(command[0])
    package = "rsync" if command[0] == "rsync" else "openssh-client"
    ended = run(command, package=package, output=answer)
    _check(ended, endpoint)
    return " ".join(answer.lines[0].split()[:3]) if answer.lines else "rsync"


def _far(endpoint: ssh.Endpoint, path: bytes) -> bytes:
    name = ssh.host_name(endpoint)
    return f"[{name}]:".encode() + path if ":" in name else f"{name}:".encode() + path


def _plain(path: bytes) -> bytes:
    """A far path of which rsync there takes nothing for a pattern.

    Within a component that has no ``*``, ``?`` or ``[`` it takes a backslash as it is.
    """
    return b"/".join(
        _WILD.sub(r"\\\1", part.decode("latin-1")).encode("latin-1")
        if any(mark in part for mark in b"*?[")
        else part
        for part in path.split(b"/")
    )


@frozen
class _Run:
    """One call of rsync."""

    route: Route
    endpoint: ssh.Endpoint
    shell: Sequence[str]
    meter: Meter

    def move(self, source: bytes, target: bytes, *more: str) -> None:
        """Copy the files of a tree into a partial. Raises `Retry` or `GiveUp`."""
        options = [*more]
        if self.route.max_rate is not None:
            options.append(f"--bwlimit={self._kilobytes}")
        before = self.meter.done
        if self.route.again or before:
            # What an earlier attempt brought may be of a source that was damaged then, or has been
            # repaired since, and both have the same size and time.
            options.append("--checksum")
        shell = "--rsh=" + " ".join("'" + word.replace("'", "''") + "'" for word in self.shell)
        command: list[str | bytes] = [*_RSYNC, *options, shell, "--", source, target]
        ended = run(
            command,
            package="rsync",
            output=Lines(_Told(self.meter, before).line),
            environment={"RSYNC_RSH": "", "RSYNC_OLD_ARGS": "", "RSYNC_PROTECT_ARGS": "1"},
        )
        _check(ended, self.endpoint)

    @property
    def _kilobytes(self) -> int:
        """The limit, in units of 1024 bytes a second, as rsync takes it; 0 would be none."""
        return max(1, int((self.route.max_rate or 0) // 1024))


@define
class _Room:
    """What must stay free there, in bytes, while a copy comes to be at `final`."""

    endpoint: ssh.Endpoint
    final: bytes
    min_free: int
    _looked: float = field(init=False, factory=time.monotonic)

    def check(self) -> None:
        """Now and then see whether it still is. Raises `Retry` where it is not."""
        if not self.min_free or time.monotonic() < self._looked + _LOOK_AT_DISK:
            return
        self._looked = time.monotonic()
        try:
            free = ssh.free_there(self.endpoint, os.path.dirname(self.final))
        except Retry:  # that says nothing of the disk, and the bytes may go on
            return
        if free is not None and free < self.min_free:
            where = f"{self.endpoint}:{printable(self.final)}"
            raise Retry(filling_up(where, free, self.min_free))


@define
class _Told:
    """What rsync says while it runs."""

    meter: Meter
    before: int

    def line(self, text: str) -> None:
        """Take one line."""
        if progress := _PROGRESS.match(text):
            self.meter.at(self.before + int(progress[1]))
        elif literal := _LITERAL.match(text):
            self.meter.sent = int(literal[1])


def _check(ended: Ended, endpoint: ssh.Endpoint) -> None:
    """Raise what rsync's status and its complaints mean to us."""
    if ended.status != 0:
        _check_complaints(ended.said, endpoint)
        raise _error(ended, endpoint)


def _check_complaints(said: str, endpoint: ssh.Endpoint) -> None:
    if full := _line(said, "No space left on device", "Disk quota exceeded"):
        raise Denied(f"disk full ({endpoint}): {full}")
    if _line(said, "Failed to exec ssh"):
        raise Denied("ssh is not installed here (Debian: openssh-client)")
    if _line(said, "rsync: command not found", "rsync: not found"):
        raise Denied(f"rsync is not installed there ({endpoint})")
    if refusal := _line(said, "Host key verification failed", "Permission denied"):
        raise Denied(f"{endpoint} or we refused: {refusal}")


def _error(ended: Ended, endpoint: ssh.Endpoint) -> Retry | GiveUp:
    why = _line(ended.said, "vanished", "rsync: ", "ssh: ") or ended.last
    if ended.status == _NOT_THERE:
        return Denied(f"rsync is not installed there ({endpoint})")
    if ended.status in _OUR_FAULT:
        return GiveUp(f"rsync cannot do this with {endpoint}: {why}")
    return Retry(f"{_MEANING.get(ended.status, 'rsync failed')} ({endpoint}): {why}")


def _line(said: str, *marks: str) -> str:
    """The first line that holds one of these."""
    for line in said.splitlines():
        if any(mark in line for mark in marks):
            return " ".join(line.split())
    return ""
