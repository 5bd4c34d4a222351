"""sites.json: found, read and checked as a whole.

`listener` and the command line call `load_sites` once. A cax.json loads unchanged. A `ConfigError`
reports all mistakes of a file at once.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from attrs import evolve

from caxev.config.directories import directory_warnings
from caxev.config.errors import Problems, failed, hint, shown
from caxev.config.json_file import read_list, repeats
from caxev.config.processing import Processing
from caxev.config.reading import read
from caxev.config.rucio import at
from caxev.config.sites import CORRECTIONS, DIRECTORIES, Site, Sites, acts, is_archive
from caxev.core.errors import ConfigError

PLACES: Final = ("sites.json", "/etc/caxev/sites.json")
"""The files that are tried if neither ``--config`` nor ``CAXEV_SITES`` names one."""
_GRID: Final = frozenset({"gfal-copy", "lcg-cp"})


def find_sites(config: str | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """Return the sites.json to load: ``--config``, ``CAXEV_SITES``, or the first of `PLACES`.

    Raises `ConfigError` if none is named and none is there.
    """
    named = config or (os.environ if environ is None else environ).get("CAXEV_SITES")
    if named:
        return Path(named).expanduser()
    for place in PLACES:
        if Path(place).exists():
            return Path(place)
    places = " nor ".join(PLACES)
    raise ConfigError(
        f"no sites.json: neither {places} is there; name one by --config or CAXEV_SITES"
    )


def load_sites(path: str | Path) -> Sites:
    """Read a sites.json. Raises `ConfigError` with everything that is wrong with it."""
    file = Path(path).absolute()
    entries = read_sites(file)
    if not entries:
        raise ConfigError(f"{file} holds an empty list: describe at least one site in it")
    problems = list(_repeated_names(entries))
    sites: list[Site] = []
    warnings: list[str] = []
    for place, entry in enumerate(entries, 1):
        label = _label(entry, place)
        for repeat in repeats(entry, label):
            (warnings if repeat.same else problems).append(str(repeat))
        try:
            site = _resolved(_site(entry), file.parent)
        except Problems as error:
            problems += (f"{label}: {line}" for line in error.lines)
        else:
            sites.append(site)
            problems += (f"{label}: {line}" for line in _problems(site))
    if problems:
        raise failed(file, problems)
    by_name = {site.name: site for site in sites}
    return Sites(file, by_name, (*warnings, *_warnings(sites)), _digest(entries), keys_of(entries))


def read_sites(file: Path) -> list[Any]:
    """Read the entries of a sites.json as they stand there. Raises `ConfigError`."""
    return read_list(file, "sites", ": name your sites.json by --config or CAXEV_SITES")


def _digest(entries: Sequence[object]) -> str:
    """Return a digest of the content, the same however the file is laid out."""
    # Two listeners of a site compare their digests: a new layout must not look like a new file.
    text = json.dumps(entries, sort_keys=True)
    return blake2b(text.encode(), digest_size=6).hexdigest()


def keys_of(entries: Sequence[object]) -> dict[str, str]:
    """Return a digest of each key's value, by site and key: ``lngs.purge``."""
    return {
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


def _site(entry: object) -> Site:
    if isinstance(entry, dict) and acts(entry) and is_archive(entry.get("method")):
        # In cax's tape and Rucio files, this is how the site reaches the archive.
        entry = {key: value for key, value in entry.items() if key != "method"}
    site: Site = read(Site, entry)
    return site


def _problems(site: Site) -> Iterator[str]:
    for key in DIRECTORIES:
        path = getattr(site, key)
        # On grid storage it is a part of a URL, which has neither the one nor the other meaning.
        if path is None or site.method in _GRID:
            continue
        if not path.startswith("/"):
            yield f"{key} must be an absolute path or null, not {shown(path)}"
        elif path.strip("/") == "":
            yield f"{key} is '/', the whole machine: name a directory in it"
    for key, directory in (("processing", "dir_processed"), ("minitrees", "dir_minitrees")):
        if getattr(site, key) is not None and getattr(site, directory) is None:
            yield f"{key} needs {directory}, where the results go"


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
    yield from directory_warnings(sites, DIRECTORIES)


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
    for key in ("processing", "minitrees"):
        how: Processing | None = getattr(site, key)
        if how is not None and how.system != "local" and not (how.directory or site.state):
            yield (
                f"{key} names no directory, where jobs of {how.system} keep their files: the nodes"
                " must see it"
            )
