"""Move copies between sites: one mover for each method of sites.json.

`pull`, `push`, `manifest` and `check` are plain functions that run in a worker process; they choose
the mover by the method of the site at the other end. To add a mover, register its class under the
method's name in the entry point group ``caxev.transfer``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from caxev.core.errors import GiveUp
from caxev.files import Manifest, Moved, Report
from caxev.transfer.base import Mover, Route

if TYPE_CHECKING:
    from caxev.config import Site

__all__ = ["Mover", "Route", "check", "manifest", "methods", "mover", "pull", "push", "unserved"]

# Import paths and not classes: a worker process imports only the mover that it runs. Nor is what
# reads sites.json imported here: `receive`, for whose start another site waits, needs none of it.
_OURS: Final = {
    "sftp": "caxev.transfer.ssh:SshMover",
    "scp": "caxev.transfer.ssh:SshMover",
    "rsync": "caxev.transfer.rsync:Rsync",
    "local": "caxev.transfer.local:Local",
    "gfal-copy": "caxev.transfer.gfal:Gfal",
}
_REPLACED: Final = "lcg-cp"
_ADVICE: Final = "is no longer to be had anywhere: write gfal-copy in sites.json"
_GROUP: Final = "caxev.transfer"


def methods() -> frozenset[str]:
    """Return the methods of sites.json that have a mover, including third parties'."""
    from caxev.config.plugins import installed

    return frozenset(_OURS) | installed(_GROUP)


def unserved(method: str) -> str | None:
    """Return the method and why no mover serves it; None if one does."""
    if method == _REPLACED:
        return f"{method}, which {_ADVICE}"
    return None if method in methods() else f"{method}, which this reaction does not serve"


def mover(method: str) -> Mover:
    """Return a mover for `method`. Raises `GiveUp` if there is none."""
    if method == _REPLACED:
        raise GiveUp(f"{_REPLACED} {_ADVICE}")
    from caxev.config.plugins import found

    kind: type[Mover] | None = found(method, _OURS, _GROUP)
    if kind is None:
        raise GiveUp(f"nothing moves copies by {method!r} (known: {', '.join(sorted(methods()))})")
    return kind()


def pull(route: Route, *, report: Report) -> Moved:
    """Fetch a copy from there; see `Mover.pull`."""
    return mover(route.there.method).pull(route, report=report)


def push(route: Route, *, report: Report) -> Moved:
    """Send a copy there; see `Mover.push`."""
    return mover(route.there.method).push(route, report=report)


def manifest(route: Route, *, report: Report) -> Manifest:
    """Read a copy back from there; see `Mover.manifest`."""
    return mover(route.there.method).manifest(route, report=report)


def check(here: Site, there: Site) -> str:
    """Reach a site and return a line that describes it; see `Mover.check`."""
    return mover(there.method).check(here, there)
