"""Plan what is left to do to complete a copy. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from attrs import frozen

from caxev.files.manifest import PART, Range
from caxev.files.tree import Seen

_SECOND: Final = 1_000_000_000


@frozen
class Piece:
    """A range of one file to move, from the byte `start` to before `stop`."""

    file: Seen
    start: int
    stop: int

    @property
    def left(self) -> int:
        """How many bytes to move."""
        return self.stop - self.start


@frozen
class Plan:
    """The steps from a partial to a copy, in order: remove, make directories, move, make links."""

    # Removed from the inside out, directories made from the outside in; large pieces come first,
    # so that no large one is left to a single channel at the end.
    remove: tuple[Seen, ...]
    directories: tuple[Seen, ...]
    pieces: tuple[Piece, ...]
    links: tuple[Seen, ...]

    @property
    def left(self) -> int:
        """How many bytes to move in all."""
        return sum(piece.left for piece in self.pieces)


def plan(
    source: Iterable[Seen],
    present: Iterable[Seen],
    *,
    unsure: int = 0,
    wrong: Mapping[bytes, Sequence[Range]] | None = None,
) -> Plan:
    """Plan how a partial that holds `present` becomes `source`.

    `wrong` has the bad ranges of the files with known digests. Any other file is kept if it has the
    source's size and time (to the second). If it is shorter, and younger than the source, it is
    resumed at its length less `unsure`: bytes at its end that may not all have arrived. Links are
    always made again.
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


def _pieces(
    wanted: Seen, there: Seen | None, unsure: int, wrong: Sequence[Range] | None
) -> list[Piece]:
    if there is None or wanted.size == 0:
        return [Piece(wanted, 0, wanted.size)]  # an empty file costs nothing to make again
    if wrong is not None:
        return [Piece(wanted, start, stop) for start, stop in wrong]
    age, time = second(wanted), second(there)
    if (there.size, time) == (wanted.size, age):
        return []
    # A partial that is older than the source was made from something else.
    if there.size > wanted.size or time < age:
        return [Piece(wanted, 0, wanted.size)]
    return [Piece(wanted, max(0, there.size - unsure) // PART * PART, wanted.size)]


def to_the_second(seen: Iterable[Seen]) -> list[tuple[object, ...]]:
    """Return what both sides of an SFTP session can compare: times in seconds only."""
    return [(s.path, s.kind, s.size, second(s), s.target) for s in seen]


def second(seen: Seen) -> int:
    """Return the second of a file's time as SFTP version 3 carries it: an unsigned 32-bit number.

    It repeats after 136 years.
    """
    # A file of before 1970 or after 2106 gets another time at the other side, but must be equal.
    return seen.mtime_ns // _SECOND & 0xFFFFFFFF
