"""What a way of moving copies is: the interface that each method of sites.json implements."""

from __future__ import annotations

from typing import Protocol

from attrs import frozen

from caxev.config import Site
from caxev.files import Manifest, Moved, Report


@frozen
class Route:
    """One copy to be moved between this site and another.

    Both paths are absolute and must lie strictly inside one of the directories of their own site
    (`Site.roots`). Either is a directory or a single file. `expected` is what the copy must
    turn out to be, where that is known: with it a broken transfer keeps what is right of what is
    there, and fetches only what is not. `checksum` is the source's checksum by cax: without a
    manifest, what is there is kept only if it came from a source with the same one. `max_rate`:
    bytes a second, None: no limit. `min_free`: bytes that must stay free where the copy goes.

    `again`: a copy that has its name already is known to be bad and is to be repaired: its name is
    taken from it first. `found` is what it was found to be, where that is known.
    """

    here: Site
    there: Site
    local_path: str
    remote_path: str
    expected: Manifest | None = None
    max_rate: float | None = None
    min_free: int = 0
    again: bool = False
    found: Manifest | None = None
    checksum: str | None = None


class Mover(Protocol):
    """A way of moving copies. All methods run in a worker process and may take hours.

    They raise `GiveUp` for what will not change by itself (a path outside of the roots, a source
    that is gone or holds what a copy must not, a refused key, something else under the
    final name) and `Retry` for all that may pass (no connection, disk full, a source that changes).
    They call ``report(done, total)`` (bytes) as they go, a few times a second.

    Whatever is written goes to `caxev.files.partial_path` beside the final name and is renamed
    when it is whole and on the disk; nothing is ever replaced. Killed anywhere, the next call goes
    on, or finds that the copy had its name already and is done.
    """

    def pull(self, route: Route, *, report: Report) -> Moved:
        """Copy the tree at `remote_path` there to `local_path` here."""
        ...

    def push(self, route: Route, *, report: Report) -> Moved:
        """Copy the tree at `local_path` here to `remote_path` there."""
        ...

    def manifest(self, route: Route, *, report: Report) -> Manifest:
        """Read the copy at `remote_path` and return its manifest; `local_path` is not looked at."""
        ...

    def check(self, here: Site, there: Site) -> str:
        """Reach the site and say, in a line, what answered."""
        ...
