"""The far end of a fast transfer: what ``caxev receive`` does at an account that SSH reaches.

`caxev.transfer.ssh.agent` starts it there and speaks with it over standard input and output:
messages, each a line with its length and then a JSON object, and between them the bytes of files,
one after the other with nothing between, as both sides know by then which and how many. It says
hello first, since a login shell may have printed other things before. One request, then it ends:

- ``receive``: take a copy. While what is there of it is read, ``checking`` and ``total`` tell how
  far that is, in bytes. The answer says which stretches of which files are wanted. Those of up
  to `STREAMED` bytes follow at once, in that order; larger ones are written by SFTP sessions
  meanwhile. ``finish`` brings all of it to the disk, ``publish`` gives it its name.
- ``send``: give a copy. The answer says what there is; the stretches that are asked for then are
  sent in their order, and ``check`` asks whether anything has changed meanwhile.
- ``digest``: read a copy, at ``max_rate`` bytes a second, and give its manifest.

What goes wrong is told as the last line on standard error, ``{"error": "retry", "why": ...}`` (or
``giveup``, ``denied``, ``away``), and by exit status 1. Imports little, so that it is there in 0.1
s.
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
    Item,
    Manifest,
    Piece,
    Seen,
    StagedCopy,
    confine,
    digest_tree,
    join,
    local,
    look,
    open_resolved,
    roots_from,
    shown,
    steady,
)

HELLO: Final = b"caxev receive 1\n"
"""The first line of all, and the version of what follows."""
STREAMED: Final = 1 << 20
"""Bytes up to which a stretch goes through this channel."""
CHUNK: Final = 1 << 20
"""Bytes that are handed on at once."""
LONGEST: Final = 64 << 20
"""Bytes of a message: some ten million list a hundred thousand files with their digests."""
LINE: Final = 32
"""Bytes of the line before it."""
_F_SETPIPE_SZ: Final = 1031
MISSHAPEN: Final = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What it comes to where a message is not of the shape that it must have."""

Row = list[Any]


# -- what goes over the line ------------------------------------------------------------------


def packed(message: Mapping[str, Any]) -> bytes:
    """A message as it goes over the channel. Paths in it are as `os.fsdecode` gives them."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return b"%d\n%b" % (len(body), body)


def seen_rows(seen: Iterable[Seen]) -> list[Row]:
    """A listing, as it goes over the channel."""
    return [[os.fsdecode(s.path), s.kind, s.size, s.mtime_ns, os.fsdecode(s.target)] for s in seen]


def seen_from(rows: Iterable[Row]) -> list[Seen]:
    """The inverse of `seen_rows`. Whether that can be a tree of one copy, `Arrival` says."""
    return [
        Seen(os.fsencode(path), kind, _long(size), _long(mtime), os.fsencode(target))
        for path, kind, size, mtime, target in rows
    ]


def _long(value: Any) -> int:
    """A number as the system takes it. Raises ValueError for any other."""
    if not -(2**63) <= (number := int(value)) < 2**63:
        raise ValueError(f"{number} is no size, and no time")
    return number


def item_rows(manifest: Manifest) -> list[Row]:
    """A manifest, as it goes over the channel."""
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
    """The inverse of `item_rows`."""
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
    """Stretches, each ``[number in the listing, start, stop]``. Raises `GiveUp` for any other."""
    pieces = []
    for number, start, stop in rows:
        if not (0 <= number < len(seen) and 0 <= start <= stop <= seen[number].size):
            raise GiveUp(f"asked for bytes {start} to {stop} of item {number}, which are not there")
        pieces.append(Piece(seen[number], start, stop))
    return pieces


def piece_rows(pieces: Iterable[Piece], seen: Sequence[Seen]) -> list[Row]:
    """The inverse of `pieces_from`."""
    number = {one.path: n for n, one in enumerate(seen)}
    return [[number[piece.file.path], piece.start, piece.stop] for piece in pieces]


# -- the far end ------------------------------------------------------------------------------


@frozen
class Channel:
    """Standard input and output."""

    incoming: BinaryIO
    outgoing: BinaryIO

    def tell(self, **message: Any) -> None:
        """Send a message."""
        self.outgoing.write(packed(message))
        self.outgoing.flush()

    def hear(self) -> dict[str, Any]:
        """The next message; empty where the other side is gone."""
        line = self.incoming.readline(LINE)
        message = json.loads(self.exactly(length(line))) if line else {}
        if not isinstance(message, dict):
            raise TypeError(f"a message that is a {type(message).__name__}")
        return message

    def exactly(self, count: int) -> bytes:
        """So many bytes. Raises `Retry` where there are no more."""
        data = self.incoming.read(count)
        if len(data) < count:
            raise Retry("the other side went away")
        return data


class TooLong(ValueError):
    """A message is announced that neither side would take."""


def length(line: bytes) -> int:
    """How long a message is, in bytes. Raises ValueError, and `TooLong` if none may be so long."""
    count = int(line)
    if not 0 <= count <= LONGEST:
        raise TooLong(f"a message of {count:,} bytes: at most {LONGEST:,} are taken")
    return count


def main(arguments: Sequence[str]) -> int:
    """``caxev receive``: serve one request over standard input and output; the exit status."""
    parser = argparse.ArgumentParser(
        prog="caxev receive",
        description="The far end of a transfer. Started over SSH by the caxev of another site.",
    )
    parser.add_argument(
        "--root", action="append", default=[], help="act only inside this directory (repeatable)"
    )
    return serve(parser.parse_args(arguments).root)


def serve(roots: Sequence[str]) -> int:
    """Serve one request; the exit status. `roots`: where alone it may act, if any are given."""
    os.umask(0o022)
    for descriptor in (0, 1):
        with suppress(OSError):
            fcntl.fcntl(descriptor, _F_SETPIPE_SZ, CHUNK)
    channel = Channel(os.fdopen(0, "rb", CHUNK), os.fdopen(1, "wb", CHUNK))
    os.write(1, HELLO)
    try:
        with steady():
            _serve(channel, channel.hear(), roots)
    except (Retry, GiveUp) as error:
        return _told(kind_of(error), error.why)
    except MISSHAPEN as error:
        return _told("giveup", f"a message of the wrong shape: {type(error).__name__}: {error}")
    except BrokenPipeError:
        os._exit(1)
    return 0


_KINDS: Final[Mapping[str, type[Retry | GiveUp]]] = {
    "away": RootAway,
    "denied": Denied,
    "giveup": GiveUp,
    "retry": Retry,
}


def kind_of(error: Retry | GiveUp) -> str:
    """How an error is named to the other side."""
    return next(name for name, kind in _KINDS.items() if isinstance(error, kind))


def error_of(kind: str, why: str) -> Retry | GiveUp:
    """The error that the other side named."""
    return _KINDS.get(kind, Retry)(why)


def _told(kind: str, why: str) -> int:
    sys.stderr.write(json.dumps({"error": kind, "why": why}) + "\n")
    return 1


def _serve(channel: Channel, request: Mapping[str, Any], roots: Sequence[str]) -> None:
    if not request:
        return
    allowed = roots_from(request["roots"])
    path = confine(request["path"], allowed)
    if roots:
        confine(path, roots)
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
    channel: Channel, request: Mapping[str, Any], final: str, roots: Sequence[Root]
) -> None:
    source = seen_from(request["source"])
    expected = manifest_from(request["expected"]) if request.get("expected") else None

    def checking(done: int, total: int) -> None:
        channel.tell(checking=done, total=total)

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
        channel.tell(stands=True)
        return
    with arrival.opened() as todo:
        channel.tell(partial=os.fsdecode(arrival.partial), pieces=piece_rows(todo.pieces, source))
        for piece in todo.pieces:
            if piece.left <= STREAMED:
                write_piece(
                    join(arrival.partial, piece.file.path), piece, channel.exactly(piece.left)
                )
        if not channel.hear().get("finish"):
            return
        arrival.finish(todo)
        if channel.hear().get("publish"):
            arrival.publish()
            channel.tell(published=True)


def write_piece(path: bytes, piece: Piece, data: bytes | memoryview) -> None:
    """Write a whole stretch of a file, which is made if it is not there."""
    with local(path, "write"):
        flags = os.O_WRONLY | os.O_CREAT
        descriptor = open_resolved(path, flags, FILE_MODE)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.pwrite(descriptor, rest, piece.stop - len(rest)) :]
        finally:
            os.close(descriptor)


def _send(channel: Channel, path: str) -> None:
    if not os.path.lexists(path):
        raise GiveUp(f"source directory gone: {shown(path)}")
    source = look(path)
    channel.tell(source=seen_rows(source))
    asked = channel.hear()
    for piece in pieces_from(asked.get("pieces", ()), source):
        for block in read_piece(join(os.fsencode(path), piece.file.path), piece):
            channel.outgoing.write(block)
    channel.outgoing.flush()
    if channel.hear().get("check"):
        channel.tell(same=look(path) == source)


def read_piece(path: bytes, piece: Piece) -> Iterator[bytes]:
    """The bytes of a stretch. Raises `Retry` where the file is not as it was seen."""
    with local(path, "read"):
        descriptor = open_resolved(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            at = piece.start
            while at < piece.stop:
                block = os.pread(descriptor, min(CHUNK, piece.stop - at), at)
                if not block:
                    break
                at += len(block)
                yield block
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    if (at, status.st_size, status.st_mtime_ns) != (
        piece.stop,
        piece.file.size,
        piece.file.mtime_ns,
    ):
        raise Retry(f"{shown(os.fsdecode(path))} changed while it was copied")


def _digest(channel: Channel, path: str, max_rate: float | None) -> None:
    if not os.path.lexists(path):
        raise GiveUp(f"source directory gone: {shown(path)}")

    def report(done: int, total: int) -> None:
        channel.tell(done=done, total=total)

    found = digest_tree(path, sha512=False, max_rate=max_rate, report=report)
    channel.tell(manifest=item_rows(found))
