"""What a transfer is, and what is left to do of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from attrs import frozen

from caxev.files import Manifest, Seen
from caxev.ssh.endpoint import Endpoint

BLOCK: Final = 255 * 1024  # bytes; the most that OpenSSH's server takes or gives in one request
_SECOND: Final = 1_000_000_000


@frozen
class Transfer:
    """One copy to be moved between this machine and `endpoint`.

    Both paths are absolute and must lie inside one of the roots of their side. Either is
    a directory or a single file. `nstreams` bounds the connections used.
    """

    endpoint: Endpoint
    remote_path: str
    remote_roots: tuple[str, ...]
    local_path: str
    local_roots: tuple[str, ...]
    nstreams: int = 4


@frozen
class Moved:
    """What a transfer did. `bytes_sent` leaves out what an earlier attempt had brought over.

    `manifest` has the BLAKE3 of the bytes as they passed; None where some were there before.
    """

    bytes_total: int
    bytes_sent: int
    files: int
    seconds: float
    manifest: Manifest | None = None


@frozen
class Piece:
    """One file to be moved, from the byte `start` on."""

    file: Seen
    start: int = 0

    @property
    def left(self) -> int:
        return self.file.size - self.start


@frozen
class Plan:
    """What makes a partial into a copy: remove, then make directories, move pieces, make links.

    In the order given: what is removed inside out, directories outside in, large pieces first.
    """

    remove: tuple[Seen, ...]
    directories: tuple[Seen, ...]
    pieces: tuple[Piece, ...]
    links: tuple[Seen, ...]

    @property
    def left(self) -> int:
        return sum(piece.left for piece in self.pieces)


def plan(source: Iterable[Seen], present: Iterable[Seen], *, unsure: int = 0) -> Plan:
    """What is left to do where the partial holds `present` and must become `source`.

    A file of the source's size and time (to the second) is kept. One that was not finished, and
    that was written to after the source was last changed, goes on at its length less `unsure`:
    that many bytes at its end may not all have arrived. Links are always made anew.
    """
    wanted = {seen.path: seen for seen in source}
    there = {seen.path: seen for seen in present}
    stays = {
        path: seen
        for path, seen in there.items()
        if seen.kind != "link" and path in wanted and wanted[path].kind == seen.kind
    }
    pieces = (_piece(s, stays.get(s.path), unsure) for s in wanted.values() if s.kind == "file")
    return Plan(
        remove=tuple(there[path] for path in sorted(there.keys() - stays.keys(), reverse=True)),
        directories=tuple(
            s for s in _by_path(wanted.values()) if s.kind == "dir" and s.path not in stays
        ),
        pieces=tuple(sorted(filter(None, pieces), key=lambda p: (-p.left, p.file.path))),
        links=tuple(s for s in _by_path(wanted.values()) if s.kind == "link"),
    )


def _by_path(seen: Iterable[Seen]) -> list[Seen]:
    return sorted(seen, key=lambda s: s.path)


def _piece(wanted: Seen, there: Seen | None, unsure: int) -> Piece | None:
    if there is None or wanted.size == 0:
        return Piece(wanted)  # an empty file costs nothing to make anew
    age, time = wanted.mtime_ns // _SECOND, there.mtime_ns // _SECOND
    if (there.size, time) == (wanted.size, age):
        return None
    if there.size > wanted.size or time < age:
        return Piece(wanted)
    return Piece(wanted, max(0, there.size - unsure) // BLOCK * BLOCK)


def to_the_second(seen: Iterable[Seen]) -> list[Seen]:
    """As the other side of an SFTP session would see it."""
    return [Seen(s.path, s.kind, s.size, s.mtime_ns // _SECOND, s.target) for s in seen]
