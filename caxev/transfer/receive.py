"""Run the far end of a fast transfer: ``caxev receive``, started over SSH at the other account.

`caxev.transfer.ssh.agent` starts it and exchanges messages over standard input and output: each is
a line with its length, then a JSON object. The bytes of files follow a message without any framing,
as both sides know which pieces come and how long they are. A hello line comes first, because a
login shell may print something before it. The process serves one request and ends:

- ``receive``: take a copy. While existing data is read, ``checking`` and ``total`` report progress
  in bytes. The answer lists the pieces that are wanted. Those of up to `STREAMED` bytes follow at
  once, in that order; SFTP sessions write the larger ones meanwhile. ``finish`` brings everything
  to the disk, ``publish`` renames it to its final name.
- ``send``: give a copy. The answer lists it; then the requested pieces are sent in their order,
  and ``check`` asks whether the source has changed meanwhile.
- ``digest``: read a copy, at ``max_rate`` bytes a second, and return its manifest.

An error is the last line on standard error, ``{"error": "retry", "why": ...}`` (or ``giveup``,
``denied``, ``away``), with exit status 1. This module imports little: it starts in 0.1 s.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Final

from attrs import frozen

from caxev.core.errors import Denied, GiveUp, Retry, RootAway
from caxev.core.paths import Root
from caxev.files import (
    FILE_MODE,
    Confined,
    Item,
    Manifest,
    Piece,
    Seen,
    StagedCopy,
    changed,
    check_unchanged,
    confine,
    digest_tree,
    gone,
    join,
    local,
    look,
    look_source,
    open_resolved,
    opened,
    printable,
    roots_from,
    steady,
)

HELLO: Final = b"caxev receive 1\n"
"""The very first line, with the version of the protocol."""
STREAMED: Final = 1 << 20
"""The longest piece, in bytes, that goes through this channel and not over SFTP."""
CHUNK: Final = 1 << 20
"""Bytes to read or write at once."""
LONGEST: Final = 64 << 20
"""The longest message, in bytes: ten million list a hundred thousand files with digests."""
LINE: Final = 32
"""The longest line with a message's length, in bytes."""
MISSHAPEN: Final = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""Errors that reading a malformed message can raise."""

Row = list[Any]


# -- what goes over the line ------------------------------------------------------------------


def packed(message: Mapping[str, Any]) -> bytes:
    """Return a message as bytes for the channel. Paths in it are as `os.fsdecode` returns them."""
    # JSON has no bytes: ASCII escapes carry the surrogates by which `os.fsdecode` keeps any name.
    body = json.dumps(message, separators=(",", ":")).encode()
    return b"%d\n%b" % (len(body), body)


def seen_rows(seen: Iterable[Seen]) -> list[Row]:
    """Return a listing as it goes over the channel."""
    return [[os.fsdecode(s.path), s.kind, s.size, s.mtime_ns, os.fsdecode(s.target)] for s in seen]


def seen_from(rows: Iterable[Row]) -> list[Seen]:
    """Return the listing of `seen_rows`. `StagedCopy` checks that it is one tree."""
    return [
        Seen(os.fsencode(path), kind, _long(size), _long(mtime), os.fsencode(target))
        for path, kind, size, mtime, target in rows
    ]


def _long(value: Any) -> int:
    """Return a number that fits into 64 bits. Raises ValueError for any other."""
    if not -(2**63) <= (number := int(value)) < 2**63:
        raise ValueError(f"{number} is no size, and no time")
    return number


def item_rows(manifest: Manifest) -> list[Row]:
    """Return a manifest as it goes over the channel."""
    return [
        [
            os.fsdecode(item.path),
            item.kind,
            item.size,
            (item.blake3 or b"").hex(),
            item.parts.hex(),
            os.fsdecode(item.target),
        ]
        for item in manifest.items
    ]


def manifest_from(rows: Iterable[Row]) -> Manifest:
    """Return the manifest of `item_rows`."""
    return Manifest(
        Item(
            os.fsencode(path),
            kind,
            int(size),
            bytes.fromhex(digest) or None,
            target=os.fsencode(target),
            parts=bytes.fromhex(parts),
        )
        for path, kind, size, digest, parts, target in rows
    )


def pieces_from(rows: Iterable[Row], seen: Sequence[Seen]) -> list[Piece]:
    """Return pieces from rows ``[number in the listing, start, stop]``. Raises `GiveUp`."""
    pieces = []
    for number, start, stop in rows:
        if not (0 <= number < len(seen) and 0 <= start <= stop <= seen[number].size):
            raise GiveUp(f"asked for bytes {start} to {stop} of item {number}, which are not there")
        pieces.append(Piece(seen[number], start, stop))
    return pieces


def piece_rows(pieces: Iterable[Piece], seen: Sequence[Seen]) -> list[Row]:
    """Return the rows for `pieces_from`."""
    number = {one.path: n for n, one in enumerate(seen)}
    return [[number[piece.file.path], piece.start, piece.stop] for piece in pieces]


# -- the far end ------------------------------------------------------------------------------


@frozen
class Wire:
    """Standard input and output."""

    incoming: BinaryIO
    outgoing: BinaryIO

    def send(self, **message: Any) -> None:
        """Send a message."""
        self.outgoing.write(packed(message))
        self.outgoing.flush()

    def hear(self) -> dict[str, Any]:
        """Return the next message; empty if the other side has closed the channel."""
        line = self.incoming.readline(LINE)
        message = json.loads(self.exactly(length(line))) if line else {}
        if not isinstance(message, dict):
            raise TypeError(f"a message that is a {type(message).__name__}")
        return message

    def exactly(self, count: int) -> bytes:
        """Read exactly `count` bytes. Raises `Retry` if the channel ends before."""
        data = self.incoming.read(count)
        if len(data) < count:
            raise Retry("the other side closed the connection")
        return data


class TooLong(ValueError):
    """The announced message is longer than either side accepts."""


def length(line: bytes) -> int:
    """Return a message's length in bytes. Raises ValueError; `TooLong` above the limit."""
    count = int(line)
    if not 0 <= count <= LONGEST:
        raise TooLong(f"a message of {count:,} bytes: at most {LONGEST:,} are taken")
    return count


def main(arguments: Sequence[str]) -> int:
    """Run ``caxev receive``: serve one request, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="caxev receive",
        description="The far end of a transfer. Started over SSH by the caxev of another site.",
    )
    parser.add_argument(
        "--root", action="append", default=[], help="act only inside this directory (repeatable)"
    )
    return serve(parser.parse_args(arguments).root)


def serve(roots: Sequence[str]) -> int:
    """Serve one request inside `roots` (none: anywhere allowed), and return the exit status."""
    os.umask(0o022)  # copies must be readable for others, independent of this account's umask
    # A pipe of a whole chunk, not of 64 KiB: fewer turns between sshd and us.
    for descriptor in (0, 1):
        with suppress(OSError):  # sshd may give us sockets in place of pipes
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, CHUNK)
    channel = Wire(os.fdopen(0, "rb", CHUNK), os.fdopen(1, "wb", CHUNK))
    # Before the request is read: the other side takes silence for an account without caxev.
    os.write(1, HELLO)
    try:
        # Checked at the end as well: what fails while a disk vanishes is no fault of the copy.
        with steady():
            _serve(channel, channel.hear(), roots)
    except (Retry, GiveUp) as error:
        return _failed(kind_of(error), error.why)
    except MISSHAPEN as error:
        return _failed("giveup", f"a message of the wrong shape: {type(error).__name__}: {error}")
    except BrokenPipeError:
        os._exit(1)  # a regular exit would flush the same pipe, and fail with a traceback
    return 0


KINDS: Final[Mapping[str, type[Retry | GiveUp]]] = {
    "away": RootAway,
    "denied": Denied,
    "giveup": GiveUp,
    "retry": Retry,
}


def kind_of(error: Retry | GiveUp) -> str:
    """Return the name under which an error goes over the channel."""
    # The order of `KINDS` matters: RootAway and Denied are also Retry.
    return next(name for name, kind in KINDS.items() if isinstance(error, kind))


def _failed(kind: str, why: str) -> int:
    sys.stderr.write(json.dumps({"error": kind, "why": why}) + "\n")
    return 1


def _serve(channel: Wire, request: Mapping[str, Any], roots: Sequence[str]) -> None:
    if not request:
        return
    allowed = roots_from(request["roots"])
    path = confine(request["path"], allowed)
    # The request's roots are the peer's claim; --root is what this account's owner allows.
    if roots:
        confine(os.fsdecode(path), roots)
    match request["do"]:
        case "receive":
            _receive(channel, request, path, allowed)
        case "send":
            _send(channel, path)
        case "digest":
            _digest(channel, path, request.get("max_rate"))
        case other:
            raise GiveUp(f"caxev receive does not know {other!r}")


def _receive(
    channel: Wire, request: Mapping[str, Any], final: Confined, roots: Sequence[Root]
) -> None:
    source = seen_from(request["source"])
    expected = manifest_from(request["expected"]) if request.get("expected") else None

    def checking(done: int, total: int) -> None:
        channel.send(checking=done, total=total)

    arrival = StagedCopy(
        final,
        roots,
        source,
        expected,
        request["min_free"],
        unsure=int(request.get("unsure", 0)),
        again=bool(request.get("again")),
        origin=request.get("origin"),
        report=checking,
    )
    if arrival.stands():
        channel.send(stands=True)
    else:
        _make(channel, arrival)


def _make(channel: Wire, arrival: StagedCopy) -> None:
    """Make a copy of what the peer sends: small pieces here, the others over SFTP."""
    with arrival.opened() as todo:
        pieces = piece_rows(todo.pieces, arrival.source)
        channel.send(partial=os.fsdecode(arrival.partial), pieces=pieces)
        for piece in todo.pieces:
            if piece.left <= STREAMED:
                write_piece(
                    join(arrival.partial, piece.file.path), piece, channel.exactly(piece.left)
                )
        # A peer that is gone sends nothing more: leave the partial to the next attempt.
        if not channel.hear().get("finish"):
            return
        arrival.finish(todo)
        # The peer sends `publish` after it has found its source unchanged, while we synced.
        if channel.hear().get("publish"):
            arrival.publish()
            channel.send(published=True)


def write_piece(path: Confined, piece: Piece, data: bytes | memoryview) -> None:
    """Write a whole piece to a file, and create the file if necessary."""
    with local(path, "write"), opened(path, os.O_WRONLY | os.O_CREAT, FILE_MODE) as descriptor:
        rest = memoryview(data)
        # A disk that fills up takes a part first, and fails with the next write.
        while rest:
            rest = rest[os.pwrite(descriptor, rest, piece.stop - len(rest)) :]


def _send(channel: Wire, path: Confined) -> None:
    source = look_source(path)
    channel.send(source=seen_rows(source))
    asked = channel.hear()
    for piece in pieces_from(asked.get("pieces", ()), source):
        for block in read_piece(join(path, piece.file.path), piece):
            channel.outgoing.write(block)
    channel.outgoing.flush()
    if channel.hear().get("check"):
        channel.send(same=look(path) == source)


def read_piece(path: Confined, piece: Piece) -> Iterator[bytes]:
    """Yield the bytes of a piece. Raises `Retry` if the file is not as it was listed."""
    # Not by `opened`, which is a generator more for each of many small files.
    with local(path, "read"):
        descriptor = open_resolved(path, os.O_RDONLY)
        try:
            at = piece.start
            while at < piece.stop:
                block = os.pread(descriptor, min(CHUNK, piece.stop - at), at)
                if not block:
                    break
                at += len(block)
                yield block
            # After the last byte: it vouches for all of them.
            check_unchanged(descriptor, piece.file, path)
        finally:
            os.close(descriptor)
    if at != piece.stop:
        raise changed(printable(path))


def _digest(channel: Wire, path: Confined, max_rate: float | None) -> None:
    if not os.path.lexists(path):
        raise gone(printable(path))

    def report(done: int, total: int) -> None:
        channel.send(done=done, total=total)

    found = digest_tree(path, sha512=False, max_rate=max_rate, report=report)
    channel.send(manifest=item_rows(found))
