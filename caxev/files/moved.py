"""Define `Moved`, the summary of a transfer."""

from __future__ import annotations

from attrs import field, frozen

from caxev.files.manifest import Manifest


@frozen
class Moved:
    """The summary of a transfer. `bytes_sent` excludes what an earlier attempt had moved.

    `manifest` has the BLAKE3 of the bytes as they passed; None if some were there before, or if
    another program moved them.
    """

    bytes_total: int
    bytes_sent: int
    files: int
    seconds: float
    manifest: Manifest | None = field(default=None, repr=False)
