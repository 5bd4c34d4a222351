"""Describe a transfer over SSH. Pure."""

from __future__ import annotations

from typing import Final

from attrs import field, frozen

from caxev.files import PART, Manifest, origin_of
from caxev.transfer.ssh.endpoint import Endpoint

STREAMS: Final = 16
ON_ONE: Final = 8
"""Channels on a connection beside the first; OpenSSH allows 10 in all by default."""
BLOCK: Final = 255 * 1024  # bytes; the most that OpenSSH's server takes or gives in one request


@frozen
class Transfer:
    """One copy to be moved between this machine and `endpoint`.

    Both paths are absolute and must lie inside one of the roots of their side. Each is a directory
    or a single file. `nstreams` bounds the channels used for large files. `agent` is the command
    that starts caxev at the far account; None: it offers SFTP only. `expected` is the manifest that
    the copy must match, if known; without it `checksum`, cax's checksum of the source, names its
    content. `max_rate` is in bytes a second. `min_free` is the number of bytes that must stay free
    on the target's disk. `again`: the target exists and is to be repaired; `found` is the manifest
    that was read from it.
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
        """Return how many bytes at the end of an interrupted file may be incomplete."""
        # A pull hands out no span further ahead than this: beyond so many lanes it would only
        # lengthen what an interrupted file must fetch again.
        return PART * min(self.nstreams, ON_ONE)
