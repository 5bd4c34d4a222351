"""Define `Mover`, the interface that each method of sites.json implements, and what it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from attrs import frozen

from caxev.files import Confined, Manifest, Moved, Report, damaged, known_items, look, to_nobody
from caxev.files.digest import wrong_below

if TYPE_CHECKING:
    from caxev.config import Site


@frozen
class Route:
    """One copy to be moved between this site and another.

    Both paths are absolute and must lie strictly inside one of the directories of their own site
    (`Site.roots`). Each is a directory or a single file. `expected` is the manifest that the copy
    must match, if known: an interrupted transfer then keeps the bytes that match and fetches the
    rest. `checksum` is the source's checksum by cax: without a manifest, partial data is kept only
    if it came from a source with the same checksum. `max_rate`: bytes a second, None: no limit.
    `min_free`: bytes that must stay free on the target's disk.

    `again`: the target exists, is known to be bad and must be repaired; it is first renamed back
    to a partial. `found` is the manifest read from it, if known.
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

    @property
    def origin(self) -> str:
        """Name the content of the source, by the database; empty if it is unknown.

        A partial with other content is not reused.
        """
        return self.expected.digest if self.expected is not None else self.checksum or ""


class Mover(Protocol):
    """A way of moving copies. All methods run in a worker process and may take hours.

    They raise `GiveUp` for errors that will not pass by themselves (a path outside of the roots, a
    source that is gone or holds what a copy must not, a refused key, something else under the
    final name) and `Retry` for all others (no connection, disk full, a source that changes).
    They call ``report(done, total)`` (bytes) a few times a second.

    Data is written to `caxev.files.partial_path` beside the final name, and renamed when it is
    complete and on the disk; nothing is ever replaced. A call that was killed at any point can be
    repeated: it resumes, or finds the copy under its final name and returns.
    """

    def pull(self, route: Route, *, report: Report) -> Moved:
        """Copy the tree at `remote_path` there to `local_path` here."""
        ...

    def push(self, route: Route, *, report: Report) -> Moved:
        """Copy the tree at `local_path` here to `remote_path` there."""
        ...

    def manifest(self, route: Route, *, report: Report) -> Manifest:
        """Read the copy at `remote_path` and return its manifest; `local_path` is ignored."""
        ...

    def check(self, here: Site, there: Site) -> str:
        """Connect to the site and return a line that describes its server and directories."""
        ...


def check_content(root: Confined, expected: Manifest | None, source: str) -> None:
    """Raise `Damaged` unless the files below `root` match `expected`, if that is known.

    For movers that delegate the copying and never see the bytes: `root` is what they have written,
    or, if that is on another machine, what they have read. The error names `source`.
    """
    items = known_items(expected)
    found = [seen for seen in look(root) if seen.path in items]
    wrong = wrong_below(root, found, items, to_nobody)
    for path, ranges in wrong.items():
        if ranges:
            raise damaged(path, source)
