"""What is left to do where a copy is being made. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from attrs import frozen

from caxev.files.manifest import PART
from caxev.files.tree import Seen

_SECOND: Final = 1_000_000_000

Ranges = Sequence[tuple[int, int]]
"""Stretches of a file, in bytes: first, and first after."""


@frozen
class Piece:
    """A stretch of one file to be moved, from the byte `start` to before `stop`."""

    file: Seen
    start: int
    stop: int

    @property
    def left(self) -> int:
        return self.stop - self.start


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


def plan(
    source: Iterable[Seen],
    present: Iterable[Seen],
    *,
    unsure: int = 0,
    wrong: Mapping[bytes, Ranges] | None = None,
) -> Plan:
    """What is left to do where the partial holds `present` and must become `source`.

    `wrong` says for files of known digests which stretches are not as they must be. Of other files
    one of the source's size and time (to the second) is kept, and one that was not finished, and
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
    pieces = [
        piece
        for seen in wanted.values()
        if seen.kind == "file"
        for piece in _pieces(seen, stays.get(seen.path), unsure, (wrong or {}).get(seen.path))
    ]
    return Plan(
        remove=tuple(there[path] for path in sorted(there.keys() - stays.keys(), reverse=True)),
        directories=tuple(
            s for s in _by_path(wanted.values()) if s.kind == "dir" and s.path not in stays
        ),
        pieces=tuple(sorted(pieces, key=lambda p: (-p.left, p.file.path, p.start))),
        links=tuple(s for s in _by_path(wanted.values()) if s.kind == "link"),
    )


def _by_path(seen: Iterable[Seen]) -> list[Seen]:
    return sorted(seen, key=lambda s: s.path)


def _pieces(wanted: Seen, there: Seen | None, unsure: int, wrong: Ranges | None) -> list[Piece]:
    if there is None or wanted.size == 0:
        return [Piece(wanted, 0, wanted.size)]  # an empty file costs nothing to make anew
    if wrong is not None:
        return [Piece(wanted, start, stop) for start, stop in wrong]
    age, time = second(wanted), second(there)
    if (there.size, time) == (wanted.size, age):
        return []
    if there.size > wanted.size or time < age:
        return [Piece(wanted, 0, wanted.size)]
    return [Piece(wanted, max(0, there.size - unsure) // PART * PART, wanted.size)]


def to_the_second(seen: Iterable[Seen]) -> list[tuple[object, ...]]:
    """What two sides of an SFTP session can compare: path, kind, size, time (s) and target."""
    return [(s.path, s.kind, s.size, second(s), s.target) for s in seen]


def second(seen: Seen) -> int:
    """Return the second of a file's time as SFTP carries it: in 32 bits, so modulo 136 years.

    A file of before 1970 or after 2106 gets another time at the other side, and is the same file.
    """
    return seen.mtime_ns // _SECOND & 0xFFFFFFFF
