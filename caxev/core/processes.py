"""The report of each process of a site on itself, and how their configurations differ. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from attrs import field, frozen


@frozen
class Process:
    """A process that acts for a site, stands by, or helps with `lanes`.

    `configuration` is the digest of its sites.json, `keys` has one for each key (``lngs.purge``),
    and `handlers` is that of the handlers that its site uses. `began` is when it was started,
    `seen` when it reported last, UTC.
    """

    owner: str
    site: str
    version: str = ""
    configuration: str = ""
    handlers: str = ""
    keys: Mapping[str, str] = field(factory=dict, repr=False)
    lanes: tuple[str, ...] = ()
    began: datetime | None = None
    seen: datetime | None = None

    @property
    def helps(self) -> bool:
        """Whether it is a helper: it never acts for the site."""
        return bool(self.lanes)

    def role(self, leader: str | None) -> str:
        """Return what it does, given the owner of the site's lease."""
        if self.helps:
            return f"helps with {', '.join(self.lanes)}"
        return "listens" if self.owner == leader else "stands by"


def host_of(owner: str) -> str:
    """Return the host of a process by its name, such as ``node1:4711:3f9ac0d1``."""
    return owner.partition(":")[0]


def unlike_listener(mine: Process, others: Iterable[Process]) -> str:
    """Return in what else a helper differs from the listeners of its site; "" if in nothing."""
    listeners = [one for one in others if one.site == mine.site and mine.helps and not one.helps]
    versions = {one.version for one in listeners if one.version != mine.version}
    found = [f"version {mine.version}, and not {', '.join(sorted(versions))}"] if versions else []
    if any(one.handlers != mine.handlers for one in listeners):
        found.append("other handlers")
    return "; ".join(found)


def differing(keys: Mapping[str, str], others: Mapping[str, str]) -> list[str]:
    """Return the keys of two sites.json that do not have the same value in both, sorted.

    If a whole site is in one only, that is one entry: its name.
    """
    names = {one for one in {*keys, *others} if keys.get(one) != others.get(one)}
    sites, other_sites = _sites(keys), _sites(others)
    alone = sites ^ other_sites
    return sorted({site if (site := one.partition(".")[0]) in alone else one for one in names})


def _sites(keys: Iterable[str]) -> set[str]:
    return {one.partition(".")[0] for one in keys}


def disagreements(mine: Process, others: Iterable[Process]) -> dict[str, list[str]]:
    """Return, by site, in which keys of sites.json other processes differ from one.

    A helper compares itself with the listeners of its site, and they not with it. Those that report
    no digest, as an older version does, are left out.
    """
    found: dict[str, list[str]] = {}
    for one in others:
        concerned = one.site != mine.site or not one.helps
        comparable = one.configuration and mine.configuration
        if concerned and comparable and one.configuration != mine.configuration:
            keys = differing(mine.keys, one.keys) or ["the order of sites"]
            found[one.site] = sorted({*found.get(one.site, ()), *keys})
    return found
