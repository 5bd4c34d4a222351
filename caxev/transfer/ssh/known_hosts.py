"""Reading a known_hosts file as OpenSSH does: a line that cannot be used is passed over.

asyncssh refuses the whole file, and with it every host, for one line that it cannot read: a comment
in Latin-1, NUL bytes that a crash has left, a marker of tomorrow.
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
    """Return what stands in a file; each line that is passed over is reported once.

    Raises `Denied` if the file cannot be read.
    """
    try:
        text = read_limited(path, CONFIGURATION).decode(errors="replace")
    except OSError as error:
        raise Denied(f"known_hosts file {shown(path)} cannot be read: {error.strerror}") from error
    known = asyncssh.import_known_hosts("")
    for number, line in enumerate(text.split("\n"), 1):
        try:
            # What else Python takes for the end of a line is none.
            known.load(" ".join(line.split()))
        except _UNUSABLE as error:
            _report(path, number, error)
    return known


def _report(path: str, number: int, error: BaseException) -> None:
    why = escaped(str(error))[:200]
    if (path, number, why) not in _reported:
        _reported.add((path, number, why))
        logger.warning("{}, line {}, is passed over: {}", shown(path), number, why)
