"""sites.json: found, read and checked as a whole.

`listener` and the command line call `load_sites` once. A cax.json loads unchanged. A `ConfigError`
reports all mistakes of a file at once.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Final

from attrs import evolve, frozen

from caxev.config.data_types import PROCESSED, DataType
from caxev.config.directories import directory_warnings
from caxev.config.errors import Problems, failed, hint, known_names, shown
from caxev.config.json_file import as_list, read_json, repeats
from caxev.config.own_types import site_class, types_of
from caxev.config.reading import read
from caxev.config.rucio import at
from caxev.config.sites import CORRECTIONS, Site, Sites, acts, is_archive
from caxev.config.values import Kind, check, expanded
from caxev.core.errors import ConfigError
from caxev.core.registry import OWN

PLACES: Final = ("sites.json", "/etc/caxev/sites.json")
"""The files that are tried if neither ``--config`` nor ``CAXEV_SITES`` names one."""
_GRID: Final = frozenset({"gfal-copy", "lcg-cp"})


def find_sites(config: str | None) -> Path:
    """Return the sites.json to load: ``--config``, ``CAXEV_SITES``, or the first of `PLACES`.

    Raises `ConfigError` if none is named and none is there.
    """
    named = config or os.environ.get("CAXEV_SITES")
    if named:
        return expanded(named)
    for place in PLACES:
        # Not Path.exists, which raises in a directory that is closed to the user.
        if os.path.exists(place):  # noqa: PTH110
            return Path(place)
    places = " nor ".join(PLACES)
    raise ConfigError(
        f"no sites.json: neither {places} is there; name one by --config or CAXEV_SITES"
    )


def load_sites(path: str | Path) -> Sites:
    """Read a sites.json. Raises `ConfigError` with everything that is wrong with it."""
    file = Path(path).absolute()
    given = read_sites(file)
    entries = given.sites
    if not entries:
        raise ConfigError(f"{file} holds an empty list: describe at least one site in it")
    try:
        types = types_of(given.types)
    except Problems as error:
        # Which keys sites have depends on the types.
        raise failed(file, [f"types: {line}" for line in error.lines]) from None
    problems = list(_repeated_names(entries))
    sites: list[Site] = []
    warnings: list[str] = []
    for place, entry in enumerate(entries, 1):
        label = _label(entry, place)
        for repeat in repeats(entry, label):
            (warnings if repeat.same else problems).append(str(repeat))
        try:
            site = _resolved(_site(entry, site_class(types)), file.parent)
        except Problems as error:
            problems += (f"{label}: {line}" for line in error.lines)
        else:
            sites.append(site)
            problems += (f"{label}: {line}" for line in _problems(site))
    if problems:
        raise failed(file, problems)
    by_name = {site.name: site for site in sites}
    return Sites(
        file,
        by_name,
        (*warnings, *_warnings(sites)),
        _digest(given.document),
        keys_of(entries, given.types),
    )


def _given(value: Any) -> Any:
    check(isinstance(value, list))
    return value


@frozen
class SitesFile:
    """The content of a sites.json: the entries of its sites, and its ``types``, if any."""

    sites: Annotated[list[Any], Kind("a list of sites", _given)]
    types: Annotated[list[Any] | None, Kind("a list of types of data", _given)] = None

    @property
    def document(self) -> Any:
        """The content of the file: a list of sites, or an object with ``types`` and ``sites``."""
        return self.sites if self.types is None else {"types": self.types, "sites": self.sites}


def read_sites(file: Path) -> SitesFile:
    """Read a sites.json without checking it. Raises `ConfigError`."""
    document = read_json(file, "sites", ": name your sites.json by --config or CAXEV_SITES")
    if not (isinstance(document, dict) and {"sites", "types"} & {*document}):
        return SitesFile(as_list(file, document, "sites"))
    try:
        given: SitesFile = read(SitesFile, document)
    except Problems as error:
        raise failed(file, error.lines) from None
    repeated = [*repeats(document, "the file", inside=False), *repeats(given.types, "types")]
    if differing := [str(repeat) for repeat in repeated if not repeat.same]:
        raise failed(file, differing)
    return given


def _digest(entries: object) -> str:
    """Return a digest of the content, the same however the file is laid out."""
    # Two listeners of a site compare their digests: a new layout must not look like a new file.
    text = json.dumps(entries, sort_keys=True)
    return blake2b(text.encode(), digest_size=6).hexdigest()


def keys_of(entries: Sequence[object], types: object = None) -> dict[str, str]:
    """Return a digest of each key's value, by site and key: ``lngs.purge``; and of ``types``."""
    known = {} if types is None else {"types": _digest(types)[:8]}
    return known | {
        f"{name}.{key}": _digest([value])[:8]
        for entry in entries
        if isinstance(entry, dict) and (name := _name_of(entry))
        for key, value in entry.items()
    }


def _name_of(entry: object) -> str | None:
    name = entry.get("name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None


def _label(entry: object, place: int) -> str:
    name = _name_of(entry)
    return f"site {name!r}" if name else f"site no. {place}"


def _repeated_names(entries: Iterable[object]) -> Iterator[str]:
    for name, times in Counter(map(_name_of, entries)).items():
        if name and times > 1:
            yield f"site {name!r}: stands {times} times in the list; rename or remove one"


def _site(entry: object, kind: type[Site]) -> Site:
    if isinstance(entry, dict) and acts(entry) and is_archive(entry.get("method")):
        # In cax's tape and Rucio files, this is how the site reaches the archive.
        entry = {key: value for key, value in entry.items() if key != "method"}
    site: Site = read(kind, entry)
    return site


def _problems(site: Site) -> Iterator[str]:
    for key in site.types.directories:
        path = getattr(site, key)
        # On grid storage it is a part of a URL, which has neither the one nor the other meaning.
        if path is None or site.method in _GRID:
            continue
        if not path.startswith("/"):
            yield f"{key} must be an absolute path or null, not {shown(path)}"
        elif path.strip("/") == "":
            yield f"{key} is '/', the whole machine: name a directory in it"
    for kind in map(site.types.by_name.__getitem__, site.made):
        if kind.name not in site.directories:
            yield f"{kind.making} needs {kind.directory}, where the results go"
        elif kind.name in site.types.groups[OWN] and not _has_version(kind, site):
            yield f"{kind.making} needs version: such data has one, and its source has none"
    yield from _shared(site)
    for name in site.purge_versions:
        if name not in (known := sorted(site.types.versioned - {PROCESSED})):
            names = known_names(name, known)
            yield f"purge_versions: {name!r} must be a type that has versions {names}"


def _has_version(kind: DataType, site: Site) -> bool:
    how = site.processing_of(kind.name)
    given = how is not None and how.version is not None
    return given or not kind.versioned or kind.source in site.types.versioned


def _shared(site: Site) -> Iterator[str]:
    """Report types of the file's own that have the directory of another; of cax's, see warnings."""
    for one in site.types.own:
        path = site.directories.get(one.name)
        for key in site.types.directories:
            if path is not None and key != one.directory and getattr(site, key) == path:
                yield f"{one.directory} is {key} as well, {path}: give each type its own directory"


def _resolved(site: Site, base: Path) -> Site:
    # The listener may be started in any directory: paths are those of the file.
    return evolve(
        site,
        identity=at(base, site.identity),
        known_hosts=at(base, site.known_hosts),
        grid_cert=at(base, site.grid_cert),
        rucio=site.rucio.resolved(base),
    )


def _warnings(sites: Sequence[Site]) -> Iterator[str]:
    names = [site.name for site in sites]
    for site in sites:
        yield from (f"site {site.name!r}: {line}" for line in _doubts(site, names))
    yield from directory_warnings(sites, sites[0].types.directories)


def _doubts(site: Site, names: Sequence[str]) -> Iterator[str]:
    """Report what cax's files may have and no site can serve."""
    for key in ("upload_options", "download_options", "links"):
        for name in getattr(site, key):
            if name not in names:
                guess = hint(name, names, "add it or take it out")
                yield f"{key} names {name!r}, which is no site of this file ({guess})"
    for name in CORRECTIONS:
        if name in site.task_list and name not in {one.name for one in site.corrections}:
            yield f"task_list names {name!r}, but corrections does not"
    if site.method == "lcg-cp":
        yield "method 'lcg-cp' no longer exists: use 'gfal-copy'"
    yield from _type_doubts(site)


def _type_doubts(site: Site) -> Iterator[str]:
    for key in ("data_type", "master"):
        for name in getattr(site, key):
            if name not in site.types.known:
                known = known_names(name, site.types.by_name)
                yield f"{key} names {name!r}, which is no type of data {known}"
    for kind, how in site.made.items():
        if how.system != "local" and not (how.directory or site.state):
            yield (
                f"{site.types.by_name[kind].making} names no directory, where jobs of {how.system}"
                " keep their files: the nodes must see it"
            )
