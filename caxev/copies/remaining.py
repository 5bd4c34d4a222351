"""How many good copies remain elsewhere, as expectations of the write that deletes one. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from attrs import evolve

from caxev.config import Site, Sites
from caxev.copies.quorum import same_data
from caxev.copies.storage import same_bytes
from caxev.core.model import Copy, CopyKey, Run
from caxev.core.update import CopiesAtLeast, Fresh, NobodyReads

EVER: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""A reading since then may have been at any time."""


def others(
    run: Run, key: CopyKey, sites: Sites, fresh: Fresh | None = None
) -> dict[str, Fresh | None]:
    """Return the other hosts whose copies count, each with the reading that it needs.

    With `fresh` a copy that can be read again must have such a reading, and one in a catalogue must
    have been compared at any time. A copy on tape was compared before it became good, and counts by
    its entry. Copies that share their bytes count as one, and those that share this copy's bytes
    not at all.
    """
    mine, same = run.copy(key), same_bytes(sites)
    found = [] if mine is None else [mine]
    for one in run.copies:
        known = same_data(one, key) and one.host != key.host and one.host in sites
        if known and not any(same(one, other) for other in found):
            found.append(one)
    return {
        one.host: None if fresh is None else _reading(sites.get(one.host), fresh)
        for one in found
        if one.host != key.host
    }


def _reading(site: Site, fresh: Fresh) -> Fresh | None:
    if site.readable:
        return fresh
    return evolve(fresh, since=EVER) if site.method == "rucio" else None


def good(run: Run, like: Copy, key: CopyKey, sites: Sites) -> list[Copy]:
    """Return the good copies elsewhere, including archives."""
    test = CopiesAtLeast(1, key, like.manifest, like.checksum, others(run, key, sites))
    found = {one.host: one for one in reversed(run.copies) if test.counts(one)}
    return [one for one in run.copies if found.get(one.host) is one]


def enough(
    run: Run,
    key: CopyKey,
    keep: int,
    like: Copy,
    sites: Sites,
    *,
    fresh: Fresh | None = None,
) -> tuple[CopiesAtLeast, ...]:
    """Return the expectations that `keep` good copies remain, with the readings of `others`.

    At least one of them must be readable: archives never count alone.
    """
    # As expectations of the write, not only checked before it: two sites that delete at the same
    # time cannot both count on each other's copy.
    if keep == 0:
        return ()
    hosts = others(run, key, sites, fresh)
    readable = {name: at for name, at in hosts.items() if sites.get(name).readable}
    digests = (like.manifest, like.checksum)
    return CopiesAtLeast(keep, key, *digests, hosts), CopiesAtLeast(1, key, *digests, readable)


def unread(key: CopyKey, sites: Sites, now: datetime) -> NobodyReads:
    """Return the expectation that nobody reads this copy.

    Old programs do not record their source, so every unfinished entry of theirs counts as a
    reader, until it is old enough to be given up as stalled.
    """
    longest = max((site.stalled.retry for site in sites.values()), default=0.0)
    return NobodyReads(key, now - timedelta(hours=longest))
