"""What a transfer did."""

from __future__ import annotations

from attrs import field, frozen

from caxev.files.manifest import Manifest


@frozen
class Moved:
    """What a transfer did. `bytes_sent` leaves out what an earlier attempt had brought over.

    `manifest` has the BLAKE3 of the bytes as they passed; None where some were there before, or
    where another program moved them.
    """

    bytes_total: int
    bytes_sent: int
    files: int
    seconds: float
    manifest: Manifest | None = field(default=None, repr=False)
