"""Read a known_hosts file as OpenSSH does: skip lines that cannot be used.

asyncssh refuses the whole file, and with it every host, for one line that it cannot read: a comment
in Latin-1, NUL bytes that a crash has left, a marker of a later OpenSSH.
"""

from __future__ import annotations

from typing import Final

import asyncssh
from loguru import logger

from caxev.core.errors import UNFORESEEN, Denied
from caxev.core.escapes import escaped
from caxev.files import shown
from caxev.limited import CONFIGURATION, read_limited

_UNUSABLE: Final = (*UNFORESEEN, LookupError, asyncssh.Error)
_reported: Final[set[tuple[str, int, str]]] = set()


def read_known_hosts(path: str) -> asyncssh.SSHKnownHosts:
    """Return the keys in a file; each line that is skipped is logged once.

    Raises `Denied` if the file cannot be read.
    """
    try:
        text = read_limited(path, CONFIGURATION).decode(errors="replace")
    except OSError as error:
        raise Denied(f"known_hosts file {shown(path)} cannot be read: {error.strerror}") from error
    known = asyncssh.import_known_hosts("")
    for number, line in enumerate(text.split("\n"), 1):
        try:
            _load(known, line.split())
        except _UNUSABLE as error:
            _report(path, number, error)
    return known


def _load(known: asyncssh.SSHKnownHosts, words: list[str]) -> None:
    """Add a line. Raises an error if asyncssh cannot use it.

    asyncssh drops a line without an error if it cannot read its key, or if anything after the hosts
    is not ASCII: check the key first, and leave the comment out.
    """
    start = 2 if words and words[0].startswith("@") else 1
    key = words[start : start + 2]
    is_comment = bool(words) and words[0].startswith("#")
    if key and not is_comment and not key[0].startswith("x509v3-"):  # a subject has spaces
        asyncssh.import_public_key(" ".join(key))
        words = [*words[:start], *key]
    # One line only: Python's splitlines knows further line ends.
    known.load(" ".join(words))


def _report(path: str, number: int, error: BaseException) -> None:
    why = escaped(str(error))[:200]
    if (path, number, why) not in _reported:
        _reported.add((path, number, why))
        logger.warning("{}, line {}, is passed over: {}", shown(path), number, why)
