"""Several sites.json into one, as ``caxev sites merge`` does it.

A host with cax has a file for each of its programs: one to copy, one for tape, one for the
catalogue. caxev has one listener a site, and so one file. By the merged file a site may do all
that it may do by any of the files. On keys with a single value the files must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from caxev.config.errors import shown
from caxev.config.loading import load_sites, read_sites
from caxev.config.sites import Sites, acts, is_archive

Entry = dict[str, Any]
PATHS: Final = ("identity", "known_hosts", "grid_cert")
"""Keys whose paths are relative to their file."""
RUCIO_PATHS: Final = ("ca_cert", "home", "rules")
"""The same inside ``rucio``."""
UNIONS: Final = (
    "upload_options",
    "download_options",
    "data_type",
    "pax_processing_versions",
    "rucio_transfer",
    "rucio_tags",
    "handlers",
    "master",
)
"""Lists of what a site may do: by several files it may do all of it.

By a file without ``data_type`` cax copied nothing at all, so the other files' lists count.
"""
LIMITS: Final = ("task_list", "dataset_list")
"""Lists of all that a site may do: a file without one allows everything."""


@frozen
class Conflict:
    """A key on which files disagree: the files and their values, in order."""

    site: str | None
    key: str
    values: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        files: dict[str, list[str]] = {}
        for file, value in self.values:
            files.setdefault(shown(value), []).append(file)
        found = ", but ".join(f"{value} in {' and '.join(names)}" for value, names in files.items())
        return f"{f'site {self.site!r}: ' if self.site else ''}{self.key} is {found}"


@frozen
class Part:
    """One file: its name, its entries and types as written, and the sites they make."""

    file: str
    entries: Mapping[str, Entry]
    sites: Sites
    types: list[Any] | None

    @classmethod
    def of(cls, path: str | Path) -> Part:
        """Read a file. Raises `ConfigError` if it is no sites.json."""
        sites = load_sites(path)
        given = read_sites(sites.path)
        entries = {entry["name"]: dict(entry) for entry in given.sites}
        return cls(str(path), entries, sites, given.types)


def merge(paths: Sequence[str | Path]) -> tuple[list[Entry] | Entry, list[Conflict]]:
    """Merge files into what one file holds, and list the conflicts.

    In a conflict the first file's value is taken. Raises `ConfigError` for a file that cannot be
    read.
    """
    parts = [Part.of(path) for path in paths]
    conflicts: list[Conflict] = []
    names = dict.fromkeys(name for part in parts for name in part.entries)
    merged = [_site(name, [p for p in parts if name in p.entries], conflicts) for name in names]
    for entry in merged:
        _narrow(entry, parts)
    types = [(part.file, part.types) for part in parts if part.types]
    if len({part.sites.types for part in parts if part.types}) > 1:
        conflicts.append(Conflict(None, "types", tuple(types)))
    return ({"types": types[0][1], "sites": merged} if types else merged), conflicts


def _site(name: str, parts: Sequence[Part], conflicts: list[Conflict]) -> Entry:
    keys = dict.fromkeys(key for part in parts for key in part.entries[name])
    merged: Entry = {}
    for key in keys:
        # Null and empty values leave the decision to the other files.
        given = [part for part in parts if _gives(part, name, key)]
        if key in LIMITS and len(given) < len(parts):
            continue  # by one of the files it may do everything
        if not given:
            continue
        if key in (*UNIONS, *LIMITS):
            merged[key] = [*dict.fromkeys(one for p in given for one in p.entries[name][key])]
            continue
        merged[key] = _written(given[0], name, key)
        # By their representation: not every value is hashable, and 1 equals true.
        if len({*map(repr, (_meant(part, name, key) for part in given))}) > 1:
            values = tuple((part.file, part.entries[name][key]) for part in given)
            conflicts.append(Conflict(name, key, values))
    return merged


def _gives(part: Part, name: str, key: str) -> bool:
    """Whether a file gives a value for a key. The method of its archive is not a site's own."""
    entry = part.entries[name]
    if key == "method" and acts(entry) and is_archive(entry.get("method")):
        return False
    return entry.get(key) not in (None, "", [])


def _meant(part: Part, name: str, key: str) -> object:
    """Return the value of a key as it is understood: two spellings of it are equal."""
    if key.startswith("x_"):
        return part.entries[name][key]
    value = getattr(part.sites.get(name), key)
    return "gfal-copy" if value == "lcg-cp" else value  # what took its place


def _written(part: Part, name: str, key: str) -> object:
    """Return the value to write: the merged file may lie elsewhere, so paths become absolute."""
    given, site = part.entries[name][key], part.sites.get(name)
    if key in PATHS:
        return getattr(site, key)
    if key == "rucio":
        known = {inner: getattr(site.rucio, inner) for inner in RUCIO_PATHS}
        return given | {inner: path for inner, path in known.items() if path is not None}
    return "gfal-copy" if (key, given) == ("method", "lcg-cp") else given


def _narrow(entry: Entry, parts: Iterable[Part]) -> None:
    """Restrict an archive to the types of data that the files brought there."""
    name = entry["name"]
    if entry.get("data_type") or not is_archive(entry.get("method")):
        return
    # cax's file for an archive listed the types in the entry of the site that copied there.
    types = {
        kind
        for part in parts
        for site in part.sites.values()
        if name in (*site.upload_options, *site.download_options)
        for kind in site.data_type
    }
    known = list(dict.fromkeys(one.name for part in parts for one in part.sites.types))
    if types and types != {*known}:
        entry["data_type"] = [kind for kind in known if kind in types]
