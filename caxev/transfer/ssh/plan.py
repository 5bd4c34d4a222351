"""What a transfer over SSH is. Pure."""

from __future__ import annotations

from typing import Final

from attrs import field, frozen

from caxev.files import PART, Manifest, origin_of
from caxev.transfer.ssh.endpoint import Endpoint

STREAMS: Final = 16
ON_ONE: Final = 8
"""Channels on a connection beside the first; OpenSSH allows 10 in all unless told otherwise."""
BLOCK: Final = 255 * 1024  # bytes; the most that OpenSSH's server takes or gives in one request


@frozen
class Transfer:
    """One copy to be moved between this machine and `endpoint`.

    Both paths are absolute and must lie inside one of the roots of their side. Either is
    a directory or a single file. `nstreams` bounds the channels used for large files. `agent` is
    the command that starts caxev at the far account, None where only SFTP is to be had. `expected`
    is what the copy must turn out to be, where that is known; `checksum`, which cax took of the
    source, names its content if there is no manifest. `max_rate` is in bytes a second,
    `min_free` in bytes: what must stay free where the copy goes. `again`: a copy that is pushed has
    its name there already and is to be repaired; `found` is what it was found to be.
    """

    endpoint: Endpoint
    remote_path: str
    remote_roots: tuple[str, ...]
    local_path: str
    local_roots: tuple[str, ...]
    nstreams: int = STREAMS
    agent: str | None = None
    expected: Manifest | None = field(default=None, repr=False)
    max_rate: float | None = None
    min_free: int = 0
    again: bool = False
    found: Manifest | None = field(default=None, repr=False)
    checksum: str | None = None

    @property
    def origin(self) -> str:
        """Name the content of the source: a partial with other content is not reused."""
        return origin_of(self.expected, self.checksum)

    @property
    def unsure(self) -> int:
        """Bytes at the end of a file of unknown digests, cut off, that may not all be there."""
        return PART * min(self.nstreams, ON_ONE)
