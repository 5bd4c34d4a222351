"""Answers of Rucio's server and of a storage are read up to a limit.

Rucio's client library joins the pieces of a line until it ends, and reads an error's text whole: a
server, or a gateway before it, that never stops would fill the memory. `caxev.rucio.connection` has
it use a `limited_session`, and `caxev.rucio.storage` has its WebDAV do so. What the process prints
is limited by `caxev.logs.Relay`, a file that is fetched by `caxev.limited.no_file_over`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Final

from caxev.core.errors import Retry

MOST: Final = 256 << 20
"""Maximum size of an answer in bytes: a list of ten thousand files takes some 10 million."""
LONGEST: Final = 1 << 20
"""Maximum size in bytes of a line, in an answer that is read line by line."""
_BY_LINES: Final = "application/x-json-stream"


def limited_session(*, files: bool = False) -> Any:
    """Make a `requests.Session` that raises `Retry` when an answer goes beyond the limits.

    With `files` what is asked for as a stream is a file, which may be of any size.
    """
    from requests import Session  # not before it is needed: it takes time

    session = Session()
    session.hooks["response"].append(partial(_limited, files=files))
    return session


class LimitedRequests:
    """The module `requests`, with sessions that are limited, for a storage's files."""

    Session = staticmethod(partial(limited_session, files=True))

    def __getattr__(self, name: str) -> Any:
        import requests

        return getattr(requests, name)


def _limited(answer: Any, *, files: bool, stream: bool = False, **_options: Any) -> None:
    if files and stream and answer.ok:
        return
    # `requests` calls this hook after the headers and before it reads the body.
    longest = LONGEST if answer.headers.get("content-type") == _BY_LINES else MOST
    read = answer.raw.stream
    answer.raw.stream = lambda *args, **options: bounded(read(*args, **options), longest)


def bounded(pieces: Iterable[bytes], longest: int) -> Iterator[bytes]:
    """Pass pieces of an answer on, up to `MOST` bytes in all and `longest` in one line."""
    whole = line = 0
    for piece in pieces:
        whole += len(piece)
        _, newline, rest = piece.rpartition(b"\n")
        line = len(rest) if newline else line + len(piece)
        if whole > MOST or line > longest:
            raise Retry(f"the server's answer does not end: {whole:,} bytes of it were read")
        yield piece
