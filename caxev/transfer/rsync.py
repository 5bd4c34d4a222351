"""Serve the method ``rsync``: rsync over OpenSSH moves the files' bytes, SFTP does the rest."""

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
    FarPath,
    Meter,
    Moved,
    Report,
    Seen,
    StagedCopy,
    bring_in,
    changed,
    check_expected,
    confine,
    filling_up,
    is_file,
    join,
    landing,
    look,
    look_source,
    mirror,
    parent,
    printable,
)
from caxev.files.incoming import apart
from caxev.program import PLAIN, UNLIMITED, Answer, Limits, Lines, Program, ProgramEnd, run
from caxev.transfer import ssh
from caxev.transfer.base import Route, check_content

_LOOK_AT_DISK: Final = 30.0  # seconds between two checks of the far disk: each is a log-in
_SILENCE: Final = 300  # seconds without a byte after which rsync exits, at either end
_RSYNC: Final = (
    "rsync",
    "--recursive",
    "--no-links",  # SFTP makes them, after checking their targets
    "--times",
    "--omit-dir-times",
    "--perms",
    f"--chmod=D{DIR_MODE:o},F{FILE_MODE:o}",
    # An interrupted file is resumed: rsync compares it block by block. Until a file is whole its
    # time differs from the source's, so that it never counts as whole.
    "--inplace",
    "--secluded-args",  # no shell there expands our paths
    # The whole list first: progress and total are known from the start.
    "--no-inc-recursive",
    "--info=progress2",
    "--stats",
    # Without commas and units, so that the numbers can be read from every version.
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
"""The meaning of rsync's exit status; for all others the error has its last line."""


class Rsync(ssh.SshMover):
    """Move copies by rsync; see `caxev.transfer.base.Mover`.

    rsync must be installed at both ends. It opens files by name, so on this machine it reads from
    and writes to a private directory. `manifest` reads the copy back over SFTP. To repair or resume
    a copy, both ends read all of it, and what differs is sent.
    """

    def pull(self, route: Route, *, report: Report) -> Moved:
        """Fetch a copy from there."""
        endpoint = ssh.endpoint_of(route.here, route.there)
        final = confine(route.local_path, route.here.roots)
        path, source = _listed(endpoint, route)
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
            # The far end might send without an end.
            limits = Limits(file_size=max((seen.size for seen in source), default=0))
            _Run(route, endpoint, shell, meter, limits).move(far, inner.partial + slash)
            inner.finish(todo)
            if _listed(endpoint, route) != (path, source):
                raise changed(where)
            # Check before `bring_in`, so that nothing bad ever has the final name.
            check_content(inner.partial, route.expected, where)
            made, name = inner.partial, os.fsdecode(final)
            bring_in(made, name, route.here.roots, min_free=route.min_free, report=report)
        return meter.moved(source)

    def push(self, route: Route, *, report: Report) -> Moved:
        """Send a copy there."""
        endpoint = ssh.endpoint_of(route.here, route.there)
        here = confine(route.local_path, route.here.roots)
        source = look_source(here)
        check_expected(source, route.expected, printable(here))
        meter = Meter.of(source, report)
        name = f"{endpoint}:{route.remote_path}"
        with (
            ssh.only_pusher(str(endpoint), os.fsencode(route.remote_path)),
            ssh.shell(endpoint) as shell,
        ):
            there = ssh.in_session(
                endpoint, route.remote_path, lambda remote: ssh.land(remote, route, source)
            )
            if there.todo is None:
                return meter.moved(source)
            failpoints.point("ssh.prepare")
            meter.left(there.todo)
            meter.guard = _Room(endpoint, there.final, route.min_free).check
            slash = b"" if is_file(source) else b"/"
            far = _far(endpoint, _plain(there.partial) + slash)
            with landing(state_directory(route.here), os.fsencode(name)) as private:
                view = join(private, b"copy")
                # rsync walks a private tree of links, because anybody who may write to `here` could
                # swap a directory for a link on its way.
                with mirror(here, view, links=False):
                    _Run(route, endpoint, shell, meter).move(view + slash, far, "--copy-links")
            if look(here) != source:
                raise changed(printable(here))
            check_content(here, route.expected, printable(here))
            files = [seen for seen in source if seen.kind == "file"]
            ssh.in_session(
                endpoint,
                route.remote_path,
                lambda remote: ssh.publish(remote, there, source, unsynced=files),
            )
        return meter.moved(source)

    def check(self, here: Site, there: Site) -> str:
        """Start SFTP, and rsync at both ends; return the versions that answered."""
        endpoint = ssh.endpoint_of(here, there)
        answer = super().check(here, there)
        ours = _first_line(["rsync", "--version"], endpoint)
        with ssh.shell(endpoint) as shell:
            theirs = _first_line([*shell, ssh.host_name(endpoint), "rsync --version"], endpoint)
        return f"{answer}; {theirs} there, {ours} here"


def _listed(endpoint: ssh.Endpoint, route: Route) -> tuple[FarPath, list[Seen]]:
    """Return the real path of a copy there, and its listing."""

    async def listed(remote: ssh.Remote) -> tuple[FarPath, list[Seen]]:
        real = await remote.confine(route.remote_path, route.there.roots)
        return real, await remote.source(real)

    return ssh.in_session(endpoint, route.remote_path, listed)


def _first_line(command: Sequence[str], endpoint: ssh.Endpoint) -> str:
    answer = Answer(command[0])
    package = "rsync" if command[0] == "rsync" else "openssh-client"
    ended = run(Program(command, package, PLAIN), output=answer)
    _check(ended, endpoint)
    return " ".join(answer.lines[0].split()[:3]) if answer.lines else "rsync"


def _far(endpoint: ssh.Endpoint, path: bytes) -> bytes:
    name = ssh.host_name(endpoint)
    return f"[{name}]:".encode() + path if ":" in name else f"{name}:".encode() + path


def _plain(path: bytes) -> bytes:
    """Quote a far path so that rsync there takes nothing in it for a pattern.

    In a component without ``*``, ``?`` or ``[`` rsync takes a backslash literally.
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
    limits: Limits = UNLIMITED

    def move(self, source: bytes, target: bytes, *more: str) -> None:
        """Copy the files of a tree into a partial. Raises `Retry` or `GiveUp`."""
        options = [*more]
        if self.route.max_rate is not None:
            # In units of 1024 bytes a second; 0 would mean no limit.
            options.append(f"--bwlimit={max(1, int(self.route.max_rate // 1024))}")
        before = self.meter.done

        def line(text: str) -> None:
            if progress := _PROGRESS.match(text):
                self.meter.at(before + int(progress[1]))
            elif literal := _LITERAL.match(text):
                self.meter.sent = int(literal[1])

        if self.route.again or before:
            # An earlier attempt may have copied from the source before it was repaired, and a
            # repaired file has the same size and time.
            options.append("--checksum")
        # rsync splits this itself and knows no backslash: within quotes a quote is doubled.
        shell = "--rsh=" + " ".join("'" + word.replace("'", "''") + "'" for word in self.shell)
        command: list[str | bytes] = [*_RSYNC, *options, shell, "--", source, target]
        # The operator's own settings for rsync would change how our arguments are read.
        own = {"RSYNC_RSH": "", "RSYNC_OLD_ARGS": "", "RSYNC_PROTECT_ARGS": "1"}
        program = Program(command, "rsync", {**PLAIN, **own})
        ended = run(program, output=Lines(line, terminal=True), limits=self.limits)
        _check(ended, self.endpoint)


@define
class _Room:
    """The free space, in bytes, that a copy to `final` must leave on the far disk."""

    endpoint: ssh.Endpoint
    final: FarPath
    min_free: int
    _looked: float = field(init=False, factory=time.monotonic)

    def check(self) -> None:
        """Check the free space, every 30 s at most. Raises `Retry` if there is too little."""
        if not self.min_free or time.monotonic() < self._looked + _LOOK_AT_DISK:
            return
        self._looked = time.monotonic()
        try:
            where = parent(self.final)
            free = ssh.in_session(
                self.endpoint, os.fsdecode(where), lambda remote: remote.free(where)
            )
        except Retry:  # a failed log-in is no sign of a full disk: let the transfer continue
            return
        if free is not None and free < self.min_free:
            shown = f"{self.endpoint}:{printable(self.final)}"
            raise Retry(filling_up(shown, free, self.min_free))


def _check(ended: ProgramEnd, endpoint: ssh.Endpoint) -> None:
    """Raise the error that rsync's status and standard error amount to."""
    if ended.status != 0:
        # The text first: a full disk, a missing program and a refused key share their status with
        # failures that may pass.
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


def _error(ended: ProgramEnd, endpoint: ssh.Endpoint) -> Retry | GiveUp:
    why = _line(ended.said, "vanished", "rsync: ", "ssh: ") or ended.last
    if ended.status == _NOT_THERE:
        return Denied(f"rsync is not installed there ({endpoint})")
    if ended.status in _OUR_FAULT:
        return GiveUp(f"rsync cannot do this with {endpoint}: {why}")
    return Retry(f"{_MEANING.get(ended.status, 'rsync failed')} ({endpoint}): {why}")


def _line(said: str, *marks: str) -> str:
    """Return the first line that contains one of `marks`; an empty string if none does."""
    for line in said.splitlines():
        if any(mark in line for mark in marks):
            return " ".join(line.split())
    return ""
