"""sites.json: the sites of a collaboration, as cax knew them and with caxev's additions.

`listener` and the command line call `load_sites` once; handlers see `Site` and `Sites` through
their job. A cax.json loads unchanged. What is wrong with a file is told all at once.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, NamedTuple, get_args

import attrs
from attrs import Factory, evolve, field, frozen
from cattrs import AttributeValidationNote, ClassValidationError, Converter, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, override

from caxev.config.alarms import Sink, read_alarms
from caxev.config.archive import ARCHIVES, ArchiveOptions, read_archive
from caxev.config.corrections import Correction, read_corrections
from caxev.config.directories import directory_warnings
from caxev.config.errors import Problems, nearest
from caxev.config.json_file import read_entries, repeats
from caxev.config.links import Link, read_amount, read_links, read_rate
from caxev.config.permissions import Permission, read_permissions
from caxev.config.processing import Processing, read_directory, read_processing
from caxev.config.retention import (
    Deletion,
    Patrol,
    Stalled,
    read_deletion,
    read_patrol,
    read_stalled,
)
from caxev.config.rucio import Catalogue, read_catalogue
from caxev.core.errors import ConfigError
from caxev.core.paths import Root
from caxev.core.registry import Handler

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
OTHERS: Final = (MOVERS, ARCHIVES)
WITHOUT_LISTENER: Final = frozenset({"gfal-copy", "lcg-cp", "tsm", "directory", "rucio"})
UNREADABLE: Final = frozenset({"tsm", "directory", "rucio"})
"""Methods of what keeps copies without letting their files be read."""
GRID: Final = frozenset({"gfal-copy", "lcg-cp"})
TYPES: Final = ("raw", "processed", "minitrees")
VERSIONED: Final = frozenset({"processed", "minitrees"})
DIRECTORIES: Final = ("dir_raw", "dir_processed", "dir_minitrees", "dir_tsm")
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
FORMER: Final = {
    "pax_versions": "pax_processing_versions",
    "receive": "method",
    "directory": "dir_raw",
}
"""Keys of old versions of cax, and what they became."""
PLACES: Final = ("sites.json", "/etc/caxev/sites.json")
"""Where sites.json is looked for when neither ``--config`` nor ``CAXEV_SITES`` names it."""


class Shape(NamedTuple):
    """What a key's value must be, in words, and the function that reads it.

    `read` gives the value as `Site` holds it, and raises ValueError for any other. It never sees
    null, which stands for the default everywhere.
    """

    words: str
    read: Callable[[Any], Any]


def _sure(fits: bool) -> None:
    if not fits:
        raise ValueError


def _text(value: Any) -> str | None:
    _sure(isinstance(value, str) and "\0" not in value)
    return value or None


def _name(value: Any) -> str:
    name = _text(value)
    if name is None:
        raise ValueError
    return name


def _names(value: Any) -> tuple[str, ...]:
    _sure(isinstance(value, list))
    return tuple(_name(item) for item in value)


def _flag(value: Any) -> bool:
    _sure(isinstance(value, bool))
    return bool(value)


def _days(value: Any) -> float:
    _sure(isinstance(value, int | float) and not isinstance(value, bool))
    _sure(0 <= value < math.inf)
    return float(value)


def _count(value: Any) -> int:
    _sure(isinstance(value, int) and not isinstance(value, bool) and value > 0)
    return int(value)


def _port(value: Any) -> int:
    _sure(_count(value) < 2**16)
    return int(value)


def _lanes(value: Any) -> dict[str, int]:
    _sure(isinstance(value, dict))
    return {_name(lane): _count(workers) for lane, workers in value.items()}


def _method(value: Any) -> str:
    _sure(
        isinstance(value, str)
        and (value in METHODS or any(entry_points(group=g, name=value) for g in OTHERS))
    )
    return str(value)


def _directory(value: Any) -> str | None:
    path = _text(value)
    _sure(path is None or ".." not in PurePosixPath(path).parts)
    return path if path is None else path.rstrip("/") or "/"


def _line(value: Any) -> str | None:
    text = _text(value)
    _sure(text is None or not {"\n", "\r"}.intersection(text))
    return text


def _fingerprint(value: Any) -> str:
    _sure(_name(value).startswith("SHA256:"))
    return str(value)


Text = Annotated[str | None, Shape("a text or null", _text)]
Name = Annotated[str, Shape("a text that is not empty", _name)]
Names = Annotated[tuple[str, ...], Shape("a list of names or null", _names)]
Flag = Annotated[bool, Shape("true, false or null", _flag)]
Days = Annotated[float | None, Shape("a number of days or null", _days)]
Count = Annotated[int | None, Shape("a whole number, 1 or more, or null", _count)]
Port = Annotated[int, Shape("a port, 1 to 65535", _port)]
Lanes = Annotated[Mapping[str, int], Shape('numbers of workers, as {"transfer": 2}', _lanes)]
Links = Annotated[
    Mapping[str, Link],
    Shape('limits by site, as {"chicago": {"max_rate": "200MB/s"}}, or null', read_links),
]
Rucio = Annotated[
    Catalogue, Shape('how the catalogue is reached, as {"auth_type": "userpass"}', read_catalogue)
]
Permissions = Annotated[
    Mapping[str, Permission],
    Shape(
        'who may read, as {"mode": "0750", "group": "xenon"}, or null',
        lambda value: read_permissions(value, TYPES),
    ),
]
Corrections = Annotated[
    tuple[Correction, ...],
    Shape('a list, as [{"name": ..., "field": ..., "table": ...}], or null', read_corrections),
]
Sinks = Annotated[
    tuple[Sink, ...],
    Shape(
        'addresses of people, as [{"email": {"to": ["shift@example.org"]}}], or null', read_alarms
    ),
]
Rate = Annotated[float | None, Shape('a rate, as "200MB/s", or null', read_rate)]
Amount = Annotated[int, Shape('an amount, as "500GB", or null', read_amount)]
Made = Annotated[
    Processing | None, Shape('how it is made, as {"command": ["pax", "{input}"]}', read_processing)
]
PatrolRule = Annotated[
    Patrol | None, Shape('as {"days": 90, "max_rate": "50MB/s"}, or null', read_patrol)
]
DeletionRule = Annotated[
    Deletion, Shape('as {"copies": 3, "protect": ["keep"]}, or null', read_deletion)
]
StalledRule = Annotated[Stalled, Shape('as {"warn": 2, "retry": 24}, or null', read_stalled)]
Archive = Annotated[
    ArchiveOptions, Shape('an object, as {"server": "TSM1"}, or null', read_archive)
]
Line = Annotated[str | None, Shape("a command in one line or null", _line)]
State = Annotated[
    str | None, Shape("an absolute path without '..', '%' or '\\', or null", read_directory)
]
Method = Annotated[str, Shape("one of " + ", ".join(METHODS), _method)]
Directory = Annotated[str | None, Shape("a path without '..' or null", _directory)]
Fingerprint = Annotated[
    str | None, Shape("a host key's fingerprint (SHA256:...) or null", _fingerprint)
]


def acts(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is one of a site that copies data by itself, and not only keeps it."""
    return any(entry.get(key) for key in ("upload_options", "download_options"))


def is_archive(method: object) -> bool:
    """Whether that is the method of what keeps copies without letting their files be read."""
    if not isinstance(method, str):
        return False
    return method in UNREADABLE or bool(entry_points(group=ARCHIVES, name=method))


def _listens(site: Site) -> bool:
    """Whether a caxev process serves a site, unless it is said."""
    if site.upload_options or site.download_options:
        return True
    return site.method not in WITHOUT_LISTENER and not is_archive(site.method)


@frozen
class Site:
    """One site of sites.json. Key names are cax's; an empty text counts as null.

    `purge` is in days after a run's start. `upload_options` and `download_options` are names of
    sites in order of preference. `listener` says whether a caxev process serves that site: where
    none does, the site that pushed verifies. `host_key` is the pinned fingerprint of its SSH host
    key, `identity` and `known_hosts` are absolute paths at this machine. `lanes` says how many
    reactions run side by side in each lane, `handlers` names further modules to load, and
    `master` the types of data of which this site holds the master copy. `max_rate` is in bytes a
    second; `min_free` are the bytes that must stay free here; `receiver` is the command that
    starts caxev at this site's account. `links` are limits of the ways to other sites, as seen
    from here; `priority` names tags, the most urgent first. `hard_links` lets copies of method
    ``local`` share their bytes with their source where both are on one file system: off by
    default, since two links are one copy, and what harms one harms both. `permissions` are what
    copies get here, by their type; `corrections` are the fields of runs that are computed here.
    `patrol`, `deletion` and `stalled` say how its copies are looked after; `quarantine_days`, for
    how many days files are kept on which no majority could agree. `archive` says how tape is
    reached; see `archive_between`. `rucio` says how a catalogue is reached; runs with one of
    `rucio_tags` are fetched here. `state` is where sites keep what nobody else may write: see
    `caxev.config.state`. `markers` are no key of the file: the
    ids of the markers that the database has noted for the directories (`caxev.files.roots`).
    """

    name: Name
    method: Method = "sftp"
    hostname: Text = None
    username: Text = None
    dir_raw: Directory = None
    dir_processed: Directory = None
    dir_minitrees: Directory = None
    dir_tsm: Directory = None
    data_type: Names = TYPES
    upload_options: Names = ()
    download_options: Names = ()
    purge: Days = None
    pax_version_purge: Text = None
    nstreams: Count = None
    grid_cert: Text = None
    pax_processing_versions: Names = ()
    task_list: Names = ()
    dataset_list: Names = ()
    rucio_account: Text = None
    rucio_upload_rse: Text = None
    rucio_download_rse: Text = None
    rucio_transfer: Names = ()
    rucio_config_p2: Text = None
    rucio_config_p3: Text = None
    rucio_tags: Names = ()
    rucio: Rucio = field(default=Catalogue())
    listener: Flag = field(default=Factory(_listens, takes_self=True))
    port: Port = 22
    known_hosts: Text = None
    identity: Text = None
    host_key: Fingerprint = None
    lanes: Lanes = field(default=Factory(dict), hash=False)
    handlers: Names = ()
    master: Names = ()
    max_rate: Rate = None
    min_free: Amount = 0
    receiver: Line = None
    links: Links = field(default=Factory(dict), hash=False)
    priority: Names = ()
    hard_links: Flag = False
    processing: Made = None
    minitrees: Made = None
    permissions: Permissions = field(default=Factory(dict), hash=False)
    corrections: Corrections = ()
    alarms: Sinks = field(default=(), hash=False)
    patrol: PatrolRule = None
    deletion: DeletionRule = field(factory=Deletion)
    stalled: StalledRule = field(factory=Stalled)
    quarantine_days: Days = 30.0
    archive: Archive = field(default=ArchiveOptions(), hash=False)
    state: State = None
    markers: Mapping[str, str] = field(default=Factory(dict), hash=False)

    @property
    def transport(self) -> str:
        """The method that serves this site: ``scp`` is spoken no longer, ``sftp`` is."""
        return "sftp" if self.method == "scp" else self.method

    @property
    def readable(self) -> bool:
        """Whether the files of its copies can be read: not where they are on tape, for one."""
        return self.method not in UNREADABLE

    @property
    def roots(self) -> tuple[Root, ...]:
        """The base directories of copies: a copy lies in one of them, or is not touched.

        Other sites may write there, too.
        """
        return self._marked(self.dir_raw, self.dir_processed, self.dir_minitrees)

    @property
    def marked(self) -> tuple[Root, ...]:
        """The base directories that are known by a marker: those of copies, and that of staging."""
        return self._marked(*self.roots, self.dir_tsm)

    def _marked(self, *paths: str | None) -> tuple[Root, ...]:
        named = dict.fromkeys(str(path) for path in paths if path)
        return tuple(Root(path, self.markers.get(path)) for path in named)

    def key_of(self, root: str) -> str:
        """Return the key under which sites.json names this directory first."""
        return next(key for key in DIRECTORIES if getattr(self, key) == root)

    def directory(self, type: str, version: str | None = None) -> str | None:  # noqa: A002  # the field's own name
        """Where this site keeps such data; None where it holds none.

        None as well for derived data whose version is missing or cannot be part of a path.
        """
        root: str | None = getattr(self, f"dir_{type}") if type in TYPES else None
        if root is None or type not in VERSIONED:
            return root
        if not version or "/" in version or "\0" in version:
            return None
        return f"{root.rstrip('/')}/pax_{version}"

    def link(self, name: str) -> Link:
        """The limits of the way to that site, as seen from here: its own, else this site's."""
        own = self.links.get(name, Link())
        return evolve(
            own,
            max_rate=self.max_rate if own.max_rate is None else own.max_rate,
            nstreams=own.nstreams or self.nstreams,
        )

    def wants(self, handler: Handler) -> bool:
        """Whether this site has what the handler needs, and ``task_list`` enables it."""
        return self.unmet(handler) is None

    def unmet(self, handler: Handler) -> str | None:
        """Why this site has not enabled the handler; None where it has.

        In ``task_list`` it stands by its name or an alias.
        """
        if handler.needs and not any(getattr(self, key, None) for key in handler.needs):
            return f"{self.name} gives no {' or '.join(handler.needs)}"
        if self.task_list and {handler.name, *handler.aliases}.isdisjoint(self._tasks):
            return f"task_list of {self.name} leaves it out"
        return None

    @property
    def _tasks(self) -> frozenset[str]:
        """What ``task_list`` names; with a correction it names the handler of all corrections."""
        computing = any(one.name in self.task_list for one in self.corrections)
        return frozenset({*self.task_list, *(("correct",) if computing else ())})

    def unknown_tasks(self, handlers: Iterable[Handler]) -> Iterator[str]:
        """Say which names in ``task_list`` are those of no handler, task of cax or correction."""
        known = {name for one in handlers for name in (one.name, *one.aliases)}
        known |= {*CORRECTIONS, *(one.name for one in self.corrections)}
        for name in self.task_list:
            if name not in known:
                guess = nearest(name, known)
                hint = f"did you mean {guess!r}?" if guess else "caxev handlers lists them"
                yield f"site {self.name!r}: task_list names {name!r}, which is no reaction ({hint})"

    def correcting(self) -> tuple[Correction, ...]:
        """The corrections that ``task_list`` enables, by their own name or all by ``correct``."""
        if not self.task_list or "correct" in self.task_list:
            return self.corrections
        return tuple(one for one in self.corrections if one.name in self.task_list)

    def wants_run(self, run_name: str) -> bool:
        """Whether ``dataset_list`` lets this site act on the run of that name."""
        return not self.dataset_list or run_name in self.dataset_list


def link_between(here: Site, there: Site) -> Link:
    """The limits of the way between two sites: of two numbers the smaller, hours as `here` says.

    Where `here` names no hours, those that `there` names count.
    """
    return here.link(there.name).within(there.link(here.name))


def archive_between(here: Site, there: Site) -> ArchiveOptions:
    """How the archive at `there` is reached from `here`: as `here` says, else as `there` does."""
    return here.archive.over(there.archive)


@frozen
class Here:
    """The site that this process serves, as `caxev.core.registry` asks it."""

    site: Site
    passive: frozenset[str]

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def correction_inputs(self) -> frozenset[str]:
        """The fields of runs that this site's corrections wait for."""
        return frozenset(path for one in self.site.correcting() for path in one.when)

    def wants(self, handler: Handler) -> bool:
        """Whether the site has enabled this handler."""
        return self.site.wants(handler)


@frozen
class Sites:
    """The sites by name, in the file's order. `warnings` are for ``caxev sites check``.

    `digest` differs where another file says something else.

    `get` is for names that an operator gave; `find` is for names from the database, where hosts
    turn up that no file describes.
    """

    path: Path
    by_name: Mapping[str, Site] = field(repr=False)
    warnings: tuple[str, ...] = ()
    digest: str = ""

    def get(self, name: str) -> Site:
        """The site of that name. Raises `ConfigError` naming the nearest one."""
        if name in self.by_name:
            return self.by_name[name]
        guess = nearest(name, self.by_name)
        hint = f"did you mean {guess!r}? " if guess else ""
        raise ConfigError(f"no site {name!r} in {self.path} ({hint}known: {', '.join(self)})")

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
        """The view of the site that this process serves. Raises `ConfigError` as `get` does."""
        passive = (site.name for site in self.values() if not site.listener and site.name != name)
        return Here(self.get(name), frozenset(passive))


def find_sites(config: str | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """Which sites.json to load: ``--config``, ``CAXEV_SITES``, or the first of `PLACES`.

    Raises `ConfigError` where none is named and none is there.
    """
    named = config or (os.environ if environ is None else environ).get("CAXEV_SITES")
    if named:
        return Path(named).expanduser()
    for place in PLACES:
        if Path(place).exists():
            return Path(place)
    places = " and ".join(PLACES)
    raise ConfigError(f"no sites.json: looked at {places}; name one by --config or CAXEV_SITES")


def load_sites(path: str | Path) -> Sites:
    """Read a sites.json. Raises `ConfigError` with everything that is wrong with it."""
    file = Path(path).absolute()
    entries = read_entries(file)
    problems = list(_name_problems(entries))
    sites: list[Site] = []
    warnings: list[str] = []
    for place, entry in enumerate(entries, 1):
        label = _label(entry, place)
        site, wrong = _structure(entry, label)
        for repeat in repeats(entry, label):
            (warnings if repeat.same else problems).append(str(repeat))
        problems += wrong
        if site is not None:
            sites.append(_resolved(site, file.parent))
            problems += _site_problems(site)
    if problems:
        raise _failed(file, problems)
    by_name = {site.name: site for site in sites}
    return Sites(file, by_name, (*warnings, *_warnings(sites)), _digest(entries))


def _digest(entries: Sequence[object]) -> str:
    """Return what tells one configuration from another, however it is laid out."""
    text = json.dumps(entries, sort_keys=True)
    return blake2b(text.encode(), digest_size=6).hexdigest()


def _failed(file: Path, problems: Sequence[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"{file}: {problems[0]}")
    return ConfigError(f"{file}: {len(problems)} problems, the first: {problems[0]}", problems)


def _label(entry: object, place: int) -> str:
    name = entry.get("name") if isinstance(entry, dict) else None
    return f"site {name!r}" if isinstance(name, str) and name else f"site no. {place}"


def _name_problems(entries: Iterable[object]) -> Iterator[str]:
    names = Counter(entry.get("name") for entry in entries if _has_name(entry))  # type: ignore[attr-defined]  # it is a dict
    for name, times in names.items():
        if times > 1:
            yield f"site {name!r}: stands {times} times in the list; rename or remove one"


def _has_name(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str)


def _structure(entry: object, label: str) -> tuple[Site | None, list[str]]:
    if not isinstance(entry, dict):
        return None, [f"{label}: is {_shown(entry)}, not an object with the site's keys"]
    if "name" not in entry:
        return None, [f'{label}: has no name; add "name", as in the database\'s entries']
    known = {
        key: value
        for key, value in entry.items()
        if not key.startswith("x_") and (value is not None or key not in KEYS)
    }
    known.setdefault("name", entry["name"])
    if acts(known) and is_archive(known.get("method")):
        # As in cax's tape and Rucio files: how it reaches the archive, not how it is reached.
        del known["method"]
    try:
        return _converter.structure(known, Site), []
    except ClassValidationError as errors:
        return None, [line for error in errors.exceptions for line in _told(error, label, entry)]


def _told(error: BaseException, label: str, entry: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(error, ForbiddenExtraKeysError):
        yield from (_unknown_key(label, key) for key in sorted(error.extra_fields))
        return
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            key, shape = note.name, get_args(note.type)[1]
            guess = _guess(entry[key]) if shape.read is _method else ""
            if isinstance(error, Problems):
                yield from (f"{label}: {key}: {line}" for line in error.lines)
                continue
            yield f"{label}: {key} must be {shape.words}, not {_shown(entry[key])}{guess}"


def _guess(method: object) -> str:
    guess = nearest(method, METHODS) if isinstance(method, str) else None
    return f" (did you mean {guess!r}?)" if guess else ""


def _unknown_key(label: str, key: str) -> str:
    guess = FORMER.get(key) or nearest(key, KEYS)
    hint = f"did you mean {guess!r}?" if guess else "take it out"
    return f"{label}: unknown key {key!r} ({hint}; a key of your own begins with x_)"


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004  # so that it stays a line


def _site_problems(site: Site) -> Iterator[str]:
    for key in DIRECTORIES:
        path = getattr(site, key)
        if path is not None and not path.startswith("/") and site.method not in GRID:
            yield f"site {site.name!r}: {key} must be an absolute path or null, not {_shown(path)}"
        if path is not None and path.strip("/") == "" and site.method not in GRID:
            yield f"site {site.name!r}: {key} is '/', the whole machine: name a directory in it"
    for key, directory in (("processing", "dir_processed"), ("minitrees", "dir_minitrees")):
        if getattr(site, key) is not None and getattr(site, directory) is None:
            yield f"site {site.name!r}: {key} needs {directory}, where the results go"


def _resolved(site: Site, base: Path) -> Site:
    return evolve(
        site,
        identity=_at(base, site.identity),
        known_hosts=_at(base, site.known_hosts),
        grid_cert=_at(base, site.grid_cert),
        rucio=site.rucio.resolved(base),
    )


def _at(base: Path, path: str | None) -> str | None:
    return None if path is None else str(base / Path(path).expanduser())


def _warnings(sites: Sequence[Site]) -> Iterator[str]:
    names = {site.name for site in sites}
    for site in sites:
        for key in ("upload_options", "download_options", "links"):
            for name in getattr(site, key):
                if name not in names:
                    yield _unknown_site(site, key, name, names)
        for name in CORRECTIONS:
            if name in site.task_list and name not in {one.name for one in site.corrections}:
                yield f"site {site.name!r}: task_list names {name!r}, but corrections does not"
        if site.method == "lcg-cp":
            yield f"site {site.name!r}: method 'lcg-cp' is no longer to be had: use 'gfal-copy'"
        for key in ("processing", "minitrees"):
            how: Processing | None = getattr(site, key)
            if how is not None and how.system != "local" and not (how.directory or site.state):
                yield (
                    f"site {site.name!r}: {key} names no directory, where jobs of {how.system}"
                    " keep their files: the nodes must see it"
                )
    yield from directory_warnings(sites, DIRECTORIES)


def _unknown_site(site: Site, key: str, name: str, names: Iterable[str]) -> str:
    guess = nearest(name, names)
    hint = f"did you mean {guess!r}?" if guess else "add it or take it out"
    return f"site {site.name!r}: {key} names {name!r}, which is no site of this file ({hint})"


def _structure_hook(annotated: Any) -> Callable[[Any, Any], Any]:
    shape: Shape = get_args(annotated)[1]
    return lambda value, _type: shape.read(value)


def _has_shape(type_: Any) -> bool:
    return any(isinstance(argument, Shape) for argument in get_args(type_))


def _make_converter() -> Converter:
    converter = Converter(detailed_validation=True, forbid_extra_keys=True)
    converter.register_structure_hook_factory(_has_shape, _structure_hook)
    converter.register_structure_hook(
        Site, make_dict_structure_fn(Site, converter, markers=override(omit=True))
    )
    return converter


_converter: Final = _make_converter()
KEYS: Final = tuple(one.name for one in attrs.fields(Site) if one.name != "markers")
"""The keys of a site in sites.json."""
