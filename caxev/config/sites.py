"""The sites of a collaboration, as cax knew them and with caxev's additions.

`caxev.config.loading` makes them from sites.json; handlers see `Site` and `Sites` through their
job. Each field of `Site` that is annotated with a `Kind` is a key, and the docstring below it is
that key's documentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Final

from attrs import Factory, field, frozen

from caxev.config.alarms import Sink, read_alarms
from caxev.config.archive import ARCHIVES, ArchiveOptions
from caxev.config.corrections import Correction, read_corrections
from caxev.config.data_types import CAX, PROCESSED, DataTypes
from caxev.config.errors import hint, known_names
from caxev.config.links import Link
from caxev.config.permissions import Permission, read_permissions
from caxev.config.plugins import installed
from caxev.config.processing import Directory, Processing
from caxev.config.reading import read
from caxev.config.retention import Deletion, Patrol, Stalled
from caxev.config.rucio import Catalogue
from caxev.config.values import (
    Amount,
    Count,
    Days,
    Flag,
    Kind,
    Name,
    Names,
    Rate,
    Text,
    check,
    filled,
    mapped,
    match,
    matching,
    read_name,
    read_text,
    whole,
)
from caxev.core.errors import ConfigError
from caxev.core.paths import Root
from caxev.core.registry import OWN, Handler, Here

METHODS: Final = (
    "sftp",
    "scp",
    "rsync",
    "local",
    "gfal-copy",
    "lcg-cp",
    "tsm",
    "directory",
    "rucio",
)
"""How a site can be reached. ``scp`` is served as ``sftp``."""
MOVERS: Final = "caxev.transfer"
"""The entry point group in which others name methods of their own; see `caxev.transfer`."""
WITHOUT_LISTENER: Final = frozenset({"gfal-copy", "lcg-cp", "tsm", "directory", "rucio"})
UNREADABLE: Final = frozenset({"tsm", "directory", "rucio"})
"""Methods of what keeps copies without letting their files be read."""
CORRECTIONS: Final = (
    "AddGains",
    "AddDriftVelocity",
    "AddElectronLifetime",
    "SetNeuralNetwork",
    "SetFieldDistortion",
    "SetLightCollectionEfficiency",
    "SetS2xyMap",
)
"""The tasks of cax that are ``corrections`` here."""


def acts(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is one of a site that copies data by itself, and not only keeps it."""
    return any(entry.get(key) for key in ("upload_options", "download_options"))


def is_archive(method: object) -> bool:
    """Whether that is the method of what keeps copies without letting their files be read."""
    # It is asked of entries that have not been checked yet.
    if not isinstance(method, str):
        return False
    return method in UNREADABLE or (method not in METHODS and method in installed(ARCHIVES))


def _listens(site: Site) -> bool:
    """Whether a caxev process serves a site, unless its entry decides."""
    if site.upload_options or site.download_options:
        return True
    return site.method not in WITHOUT_LISTENER and not is_archive(site.method)


def _method(value: Any) -> str:
    check(value in METHODS or any(value in installed(one) for one in (MOVERS, ARCHIVES)))
    return str(value)


def _base(value: Any) -> str | None:
    path = read_text(value)
    check(".." not in PurePosixPath(path).parts)
    return (path.rstrip("/") or "/") if path else None


def _line(value: Any) -> str | None:
    return match(r"[^\0\r\n]*", value).string or None


def _links(value: Any) -> Any:
    check(all(value))
    return read(Mapping[str, Link], value)


Base = Annotated[str | None, Kind("a path without '..'", _base)]


@frozen
class Site:
    """One site of sites.json. An empty text counts as null.

    If the file has ``types``, its sites are of the class that `caxev.config.own_types` makes.
    """

    types: ClassVar[DataTypes] = CAX
    name: Name
    """The site's name: ``host`` in the database's entries."""
    method: Annotated[str, Kind(f"one of {', '.join(METHODS)}", _method, METHODS)] = "sftp"
    """How others reach it: ``sftp``, ``scp`` (served by SFTP), ``rsync``, ``local``, ``gfal-copy``;
    ``tsm`` and ``directory`` are tape archives, ``rucio`` is a catalogue. ``lcg-cp`` no longer
    exists: use ``gfal-copy``. In cax's tape and Rucio files a site has the method of the archive
    that it copies to or from; such a site is reached by ``sftp``."""
    hostname: Text = None
    """The host that SSH reaches; for ``gfal-copy`` the beginning of a URL, as
    ``root://se.example.org:1094/``. Sites that share directories must have one hostname, or one of
    them the method ``local``: else each takes the files of the other for its own."""
    username: Text = None
    """The user that SSH logs in as; null: the local user."""
    dir_raw: Base = None
    """The base directory of raw data, absolute; null: the site holds none."""
    dir_processed: Base = None
    """The base directory of processed data, which lies in ``pax_<version>/`` below it."""
    dir_minitrees: Base = None
    """The base directory of minitrees, which lie in ``pax_<version>/`` below it."""
    dir_tsm: Base = None
    """The directory in which data for tape is staged, best on the file system of ``dir_raw``,
    outside of the data directories; nobody else may write there. Names on tape lie below it."""
    data_type: Names = field(default=Factory(lambda self: (*self.types.by_name,), takes_self=True))
    """The types of data that it moves; by default all."""
    upload_options: Names = ()
    """Names of the sites that it pushes to."""
    download_options: Names = ()
    """Names of the sites that it pulls from, the best first."""
    purge: Days | None = None
    """Days after a run's start when raw data is deleted here, if enough other copies are good.
    Older data is not pulled. Null: never."""
    pax_version_purge: Text = None
    """The version whose processed data is deleted here, and no longer made."""
    purge_versions: Annotated[
        Mapping[str, str],
        Kind('versions by type, as {"minitrees": "v6.8.0"}', mapped(read_name, read_name)),
    ] = field(default=Factory(dict), hash=False)
    """The same for other types that have versions."""
    nstreams: Count | None = None
    """How many SSH connections one transfer with the site may have, by default 16; for
    ``gfal-copy``, the streams for each file."""
    grid_cert: Text = None
    """The proxy certificate for ``gfal-copy``, this site's or else the other's; relative to
    sites.json."""
    pax_processing_versions: Names = ()
    """The versions that raw data is processed with, and the only versions of processed data that
    are pulled or pushed here. By default raw data is processed with the version that ``processing``
    names, and every version is pulled and pushed."""
    task_list: Names = ()
    """Only these reactions are enabled, by their names, cax's task names or those of
    ``corrections``; by default all. ``purge``, ``purge_processed`` and ``make_room`` enable
    ``prove`` and ``erase``, too. ``caxev sites check`` and the listener report unknown names."""
    dataset_list: Names = ()
    """Only the runs of these names are acted on; by default all."""
    rucio_account: Text = None
    """The account, of a catalogue."""
    rucio_upload_rse: Text = None
    """The entrance RSE of a catalogue, to which data is uploaded."""
    rucio_download_rse: Text = None
    """The RSE that this site downloads from if it has the data; ``caxev rucio get --rse`` overrides
    it. Null: the replica that Rucio puts first."""
    rucio_transfer: Names = ()
    """The RSEs of a catalogue that everything is replicated to."""
    rucio_config_p2: Text = None
    """A set-up script of old clients: accepted, unused."""
    rucio_config_p3: Text = None
    """The same."""
    rucio_tags: Names = ()
    """Runs with one of these tags are downloaded here from a catalogue."""
    rucio: Annotated[Catalogue, Kind('an object, as {"auth_type": "userpass"}')] = field(
        default=Catalogue()
    )
    """How a catalogue is reached and arranged."""
    listener: Flag = field(default=Factory(_listens, takes_self=True))
    """Whether a caxev listens for the site; if none does, the site that pushed verifies. By default
    true, but false for ``gfal-copy``, ``lcg-cp``, ``tsm``, ``directory`` and ``rucio`` unless the
    site has ``upload_options`` or ``download_options``."""
    port: Annotated[int, Kind("a port, 1 to 65535", whole(1, 65535))] = 22
    """The port of SSH."""
    known_hosts: Text = None
    """The host keys that this site trusts, relative to sites.json; by default
    ``~/.ssh/known_hosts``."""
    identity: Text = None
    """The private key with which this site reaches others, relative to sites.json; by default those
    in ``~/.ssh``."""
    host_key: Annotated[
        str | None,
        Kind("a host key's fingerprint (SHA256:...)", matching(r"SHA256:[^\0]*")),
    ] = None
    """The fingerprint of the site's SSH host key; it overrides ``known_hosts``."""
    lanes: Annotated[
        Mapping[str, int],
        Kind('numbers of workers, as {"transfer": 2}', mapped(read_name, whole())),
    ] = field(default=Factory(dict), hash=False)
    """How many reactions run side by side in each lane."""
    handlers: Names = ()
    """Names of further handler modules that this site loads."""
    master: Names = ()
    """Types of data whose master copy is at this site; other copies are compared with it
    if their own source is gone."""
    max_rate: Rate | None = None
    """The most bytes a second with this site, of all that one listener moves, as ``"200MB/s"``
    (B/s, kB/s to PB/s, KiB/s to PiB/s)."""
    min_free: Amount = 0
    """The space that must stay free here, as ``"500GB"`` (B, kB to PB, KiB to PiB)."""
    receiver: Annotated[str | None, Kind("a command in one line", _line)] = None
    """The command that starts caxev at this site's SSH account, as ``/opt/caxev/bin/caxev``:
    transfers to it are faster."""
    links: Annotated[
        Mapping[str, Link], Kind('limits by site, as {"chicago": {"max_rate": "200MB/s"}}', _links)
    ] = field(default=Factory(dict), hash=False)
    """Limits of the links to other sites, as seen from here. Keys that a link does not name are
    those of the site; if both ends name a number, the smaller counts."""
    priority: Names = ()
    """Names of tags, the most urgent first: data of runs with such a tag is moved first, then that
    of the newest. Low-priority runs can starve."""
    hard_links: Flag = False
    """Whether a copy by ``local`` may be hard links to its source, if both are on one file system.
    Two links are one copy: what harms one harms both. Deletions count equal copies of two such
    sites as one."""
    processing: Annotated[
        Processing | None, Kind('an object, as {"command": ["pax", "{input}"]}')
    ] = None
    """How processed data is made here; null: it is not."""
    minitrees: Annotated[
        Processing | None, Kind('an object, as {"command": ["hax", "{input}"]}')
    ] = None
    """How minitrees are made here; null: they are not."""
    permissions: Annotated[
        Mapping[str, Permission],
        Kind('an object, as {"mode": "0750", "group": "xenon"}', read_permissions),
    ] = field(default=Factory(dict), hash=False)
    """Mode, group and ACL that copies get here once they are good. Nothing depends on the umask."""
    corrections: Annotated[
        tuple[Correction, ...],
        Kind('a list, as [{"name": ..., "field": ..., "table": ...}]', read_corrections),
    ] = ()
    """Fields of runs that are computed here."""
    alarms: Annotated[
        tuple[Sink, ...],
        Kind('addresses of people, as [{"email": {"to": ["shift@example.org"]}}]', read_alarms),
    ] = field(default=(), hash=False)
    """People and services that are notified of alarms."""
    patrol: Annotated[Patrol | None, Kind('an object, as {"days": 90, "max_rate": "50MB/s"}')] = (
        None
    )
    """How often each copy is read again; null: never."""
    deletion: Annotated[Deletion, Kind('an object, as {"copies": 3, "protect": ["keep"]}')] = field(
        factory=Deletion
    )
    """Conditions under which a copy may be deleted here."""
    stalled: Annotated[Stalled, Kind('an object, as {"warn": 2, "retry": 24}')] = field(
        factory=Stalled
    )
    """When a copy on which nobody works raises an alarm, and when it is made again."""
    quarantine_days: Days = 30.0
    """Days for which files in quarantine are kept after their copy was repaired."""
    archive: Annotated[ArchiveOptions, Kind('an object, as {"server": "TSM1"}')] = field(
        default=ArchiveOptions(), hash=False
    )
    """How a tape archive is reached. The options of the site that runs the client override those of
    the archive."""
    state: Directory = None
    """The directory for files that nobody else may write: jobs, logs, files that other programs
    fetch (removed after 14 days without use). Each site has its own directory in it. Best on the
    file system of the data: then nothing is copied twice. One in a data directory, or one that
    others may write, is refused. By default ``CAXEV_STATE``, or the unit's ``StateDirectory``."""
    markers: Mapping[str, str] = field(default=Factory(dict), hash=False)
    """No key: what the database has noted of the directories' markers, each as `Root` takes it."""

    @property
    def transport(self) -> str:
        """The method that serves this site: ``scp`` is spoken no longer, ``sftp`` is."""
        return "sftp" if self.method == "scp" else self.method

    @property
    def readable(self) -> bool:
        """Whether the files of its copies can be read; on tape, for one, they cannot."""
        return self.method not in UNREADABLE

    @property
    def roots(self) -> tuple[Root, ...]:
        """The base directories of copies: a copy lies in one of them, or is not touched.

        Other sites may write there, too.
        """
        return self._marked(*self.directories.values())

    @property
    def directories(self) -> dict[str, str]:
        """The base directories of copies by their types."""
        named = ((one.name, getattr(self, one.directory)) for one in self.types)
        return {name: path for name, path in named if path is not None}

    @property
    def marked(self) -> tuple[Root, ...]:
        """The base directories that are known by a marker: those of copies, and that of staging."""
        return self._marked(*self.roots, self.dir_tsm)

    def _marked(self, *paths: str | None) -> tuple[Root, ...]:
        named = dict.fromkeys(str(path) for path in paths if path)
        return tuple(Root(path, self.markers.get(path)) for path in named)

    def key_of(self, root: str) -> str:
        """Return the key under which sites.json names this directory first."""
        return next(key for key in self.types.directories if getattr(self, key) == root)

    def directory(self, type: str, version: str | None = None) -> str | None:  # noqa: A002  # the field's own name
        """Return the directory for such data; None if the site holds none.

        None as well for derived data whose version is missing or cannot be part of a path.
        """
        root = self.directories.get(type)
        if root is None or type not in self.types.versioned:
            return root
        # The version comes from the database, which other sites write: it must not lead elsewhere.
        if not version or "/" in version or "\0" in version:
            return None
        return f"{root.rstrip('/')}/pax_{version}"

    def processing_of(self, type: str) -> Processing | None:  # noqa: A002  # the field's own name
        """Return how this site makes data of that type; None if it does not."""
        kind = self.types.by_name.get(type)
        how: Processing | None = None if kind is None else getattr(self, kind.making, None)
        return how

    @property
    def made(self) -> dict[str, Processing]:
        """How this site makes data, by type."""
        found = {one: self.processing_of(one) for one in self.types.by_name}
        return {one: how for one, how in found.items() if how is not None}

    def purged_version(self, type: str) -> str | None:  # noqa: A002  # the field's own name
        """Return the version of such data that is deleted here; None: none is."""
        return self.pax_version_purge if type == PROCESSED else self.purge_versions.get(type)

    def link(self, name: str) -> Link:
        """Return the limits of the link to that site as seen from here: its own, else ours."""
        # Hours and numbers of transfers are of one link; a site as a whole has none.
        site = Link(max_rate=self.max_rate, nstreams=self.nstreams)
        return filled(self.links.get(name, site), site)

    def wants(self, handler: Handler) -> bool:
        """Whether this site has what the handler needs, and ``task_list`` enables it."""
        return self.unmet(handler) is None

    def unmet(self, handler: Handler) -> str | None:
        """Return why this site has not enabled the handler; None if it has.

        ``task_list`` has its name or an alias.
        """
        if handler.needs and not any(getattr(self, key, None) for key in self._keys(handler.needs)):
            known = " or ".join(self._keys(handler.needs))
            return f"{self.name} gives no {known or 'types of its own'}"
        if self.task_list and {handler.name, *handler.aliases}.isdisjoint(self._tasks):
            return f"task_list of {self.name} leaves it out"
        return None

    def _keys(self, needs: Iterable[str]) -> list[str]:
        own = [one.making for one in self.types.own if one.source is not None]
        return [key for need in needs for key in (own if need == OWN else (need,))]

    @property
    def _tasks(self) -> frozenset[str]:
        """The names in ``task_list``; a correction's name adds the handler of all corrections."""
        computing = any(one.name in self.task_list for one in self.corrections)
        return frozenset({*self.task_list, *(("correct",) if computing else ())})

    def unknown_tasks(self, handlers: Iterable[Handler]) -> Iterator[str]:
        """Report the names in ``task_list`` that no handler, task of cax or correction has."""
        known = {name for one in handlers for name in (one.name, *one.aliases)}
        known |= {*CORRECTIONS, *(one.name for one in self.corrections)}
        for name in self.task_list:
            if name not in known:
                what = f"which is no reaction ({hint(name, known, 'caxev handlers lists them')})"
                yield f"site {self.name!r}: task_list names {name!r}, {what}"

    def correcting(self) -> tuple[Correction, ...]:
        """The corrections that ``task_list`` enables, by their own name or all by ``correct``."""
        if not self.task_list or "correct" in self.task_list:
            return self.corrections
        return tuple(one for one in self.corrections if one.name in self.task_list)

    def wants_run(self, run_name: str) -> bool:
        """Whether ``dataset_list`` lets this site act on the run of that name."""
        return not self.dataset_list or run_name in self.dataset_list


def link_between(here: Site, there: Site) -> Link:
    """Return the limits of the link between two sites: the smaller of two numbers, `here`'s hours.

    If `here` names no hours, those that `there` names count.
    """
    return here.link(there.name).within(there.link(here.name))


def archive_between(here: Site, there: Site) -> ArchiveOptions:
    """Return how the archive at `there` is reached: `here`'s options override those of `there`."""
    return here.archive.over(there.archive)


@frozen
class Sites:
    """The sites by name, in the file's order. `warnings` are for ``caxev sites check``.

    `digest` differs for files of different content; `keys` has a digest for each key of each site.

    `get` is for names that an operator gave; `find` is for names from the database, which knows
    hosts that no file describes.
    """

    path: Path
    by_name: Mapping[str, Site] = field(repr=False)
    warnings: tuple[str, ...] = ()
    digest: str = ""
    keys: Mapping[str, str] = field(factory=dict, repr=False)

    @property
    def types(self) -> DataTypes:
        """The types of data that these sites know."""
        return next((site.types for site in self.values()), CAX)

    def get(self, name: str) -> Site:
        """Return the site of that name. Raises `ConfigError` naming the nearest one."""
        if name in self.by_name:
            return self.by_name[name]
        raise ConfigError(f"no site {name!r} in {self.path} {known_names(name, self)}")

    def find(self, name: str) -> Site | None:
        """The site of that name, or None."""
        return self.by_name.get(name)

    def values(self) -> tuple[Site, ...]:
        """All sites."""
        return tuple(self.by_name.values())

    def __contains__(self, name: object) -> bool:
        return name in self.by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def here(self, name: str) -> Here:
        """Return what triggers must know of a site. Raises `ConfigError` as `get` does."""
        site = self.get(name)
        passive = (one.name for one in self.values() if not one.listener and one.name != name)
        inputs = (path for one in site.correcting() for path in one.when)
        needed = (path for kind, how in site.made.items() for path in how.needs(kind))
        return Here(
            name,
            frozenset(passive),
            frozenset(inputs),
            site.wants,
            frozenset(needed),
            site.types.groups,
        )
