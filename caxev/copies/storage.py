"""Which sites look after a copy, and which copies may be the same bytes. Pure.

Two sites can have one storage, and two entries can name the same files. In doubt two entries share
their bytes: a deletion then counts one copy too few, never one too many.
"""

from __future__ import annotations

from collections.abc import Collection

from caxev.config import Site, Sites
from caxev.config.directories import are_near
from caxev.copies.quorum import Same, agree, at_one_host
from caxev.core.model import Copy
from caxev.core.paths import UNKNOWN, plain


def sites_sharing_storage(site: Site, sites: Sites) -> frozenset[str]:
    """Return the sites that may have the same directories, including this one; see `are_near`."""
    return frozenset({site.name, *(one.name for one in sites.values() if are_near(one, site))})


def can_be_read(one: Copy, sites: Sites, mute: Collection[str] = ()) -> bool:
    """Return whether any site answers a request for a reading; at `mute` hosts none listens."""
    site = sites.find(one.host)
    if site is None or not site.readable:
        return False
    if site.listener:
        return one.host not in mute
    # Without a listener its source reads it over the link, by the manifest alone.
    return one.manifest is not None and one.source in sites


def same_bytes(sites: Sites) -> Same:
    """Return the test whether two entries of the same data share their bytes.

    They do at one host, at the same location of two sites that may have the same directories, and
    at the same path below one marker, even if the sites have different paths for that directory.
    Equal copies of two such sites may share them if one of the sites allows hard links.
    """
    # In doubt they share: a deletion then counts one copy too few, never one too many.

    def same(one: Copy, other: Copy) -> bool:
        here, there = sites.find(one.host), sites.find(other.host)
        if at_one_host(one, other) or here is None or there is None:
            return at_one_host(one, other)
        places = [place and plain(place) for place in (one.location, other.location)]
        may_be_linked = (here.hard_links or there.hard_links) and agree(one, other)
        is_one = are_near(here, there) and (places[0] == places[1] or may_be_linked)
        return is_one or not _on_disk(one, here).isdisjoint(_on_disk(other, there))

    return same


def _on_disk(copy: Copy, site: Site) -> set[tuple[str, str]]:
    """Return the copy's location relative to its site's markers: (marker's id, path below)."""
    place = plain(copy.location or "")
    return {
        (root.marker, place.removeprefix(top))
        for root in site.roots
        if root.marker not in {None, UNKNOWN}
        and place.startswith(top := plain(root).rstrip("/") + "/")
    }


def custodian(copy: Copy, sites: Sites) -> str | None:
    """Return the site that looks after a copy and deletes it: its own, if that has a listener.

    In a catalogue it is the site that uploaded the copy or, for an entry without that (cax's), the
    first that uploads to this catalogue.
    """
    there = sites.find(copy.host)
    if there is None or there.listener:
        return copy.host
    if there.method != "rucio":
        return None
    bringing = [one.name for one in sites.values() if copy.host in one.upload_options]
    source = sites.find(copy.source or "")
    if source is not None and source.listener and (source.name in bringing or not bringing):
        return source.name
    return next((name for name in bringing if sites.get(name).listener), None)
