"""What each listening process reports of itself, and in what their configurations differ. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from attrs import field, frozen


@frozen
class Process:
    """A process that acts for a site, or stands by.

    `configuration` is the digest of its sites.json, `keys` has one for each key (``lngs.purge``),
    and `handlers` is that of the names of the handlers that its site uses. `seen` is when it
    reported last, UTC.
    """

    owner: str
    site: str
    version: str = ""
    configuration: str = ""
    handlers: str = ""
    keys: Mapping[str, str] = field(factory=dict, repr=False)
    seen: datetime | None = None


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
    """Return, by site, in which keys of sites.json the processes of other sites differ from one.

    Those that report no digest, as an older version does, are left out.
    """
    found: dict[str, list[str]] = {}
    for one in others:
        comparable = one.site != mine.site and one.configuration and mine.configuration
        if comparable and one.configuration != mine.configuration:
            keys = differing(mine.keys, one.keys) or ["the order of sites"]
            found[one.site] = sorted({*found.get(one.site, ()), *keys})
    return found
