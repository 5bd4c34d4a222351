"""Runs, their copies, and the events of what changed about them.

All of caxev reads these classes, which `database` makes from documents; `update` has what is
written back. Pure, and `Run.from_document` accepts any document without raising.

Three facts about the entries of a run's ``data`` shape this module: they have no id, their order
changes, and old programs write them beside us. So a copy is known by (type, host, version) and
never by its place, and every field that we do not know is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, Literal, NamedTuple, TypeAlias
from uuid import uuid4

from attrs import Factory, field, frozen

from caxev.core.entry import (
    NOTED,
    Entry,
    EntryField,
    Record,
    as_utc,
    count,
    mapping,
    rows,
    sha512,
    text,
    words,
)

RunId: TypeAlias = Any  # a document's _id, usually a bson.ObjectId

REQUESTED: Final = "requested"
"""The status of a copy that a person asked for and no site has begun."""
TRANSFERRING: Final = "transferring"
VERIFYING: Final = "verifying"
TRANSFERRED: Final = "transferred"
ERROR: Final = "error"
DELETING: Final = "deleting"
"""The status of a copy that is about to be deleted: it counts no more."""
MOVING: Final = "moving"
"""The status of a copy whose files are on their way to another directory of its own host."""
OUR_STATUSES: Final = (
    *(REQUESTED, TRANSFERRING, VERIFYING, TRANSFERRED),
    *(ERROR, MOVING, DELETING),
)
"""The statuses that caxev sets."""
UNKNOWN: Final = "unknown"
"""The status of an entry that names none."""
CHANGED: Final = "caxev_changed"
"""The field of a run with host and status of the entry that caxev changed last. The change stream
shows which fields changed, but not in which entry: with this field the server can leave out changes
that do not concern a site."""
STATUSES: Final = "statuses"
"""In a snapshot this field of a copy stands for the statuses of its entries, if it has several."""


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class CopyKey(NamedTuple):
    """The identity of a copy: its type, its host and, for derived data, its version."""

    type: str
    host: str
    version: str | None = None

    def at(self, host: str) -> CopyKey:
        """Return the key of the same data at another host."""
        return CopyKey(self.type, host, self.version)

    @property
    def data(self) -> str:
        """The type, and the version if it has one: ``processed v6.8.0``."""
        return f"{self.type} {self.version or ''}".rstrip()

    def __str__(self) -> str:
        return f"{self.data} at {self.host}"


class Tag(NamedTuple):
    """One of a run's tags, by name."""

    tag: str

    def __str__(self) -> str:
        return f"tag {self.tag!r}"


class Existence(NamedTuple):
    """The existence of the run."""

    def __str__(self) -> str:
        return "the run"


class Field(NamedTuple):
    """One of a run's fields, by its dotted path."""

    path: str
    of: Literal["run"] = "run"  # no tag is equal to it

    def __str__(self) -> str:
        return f"field {self.path}"


class CopyField(NamedTuple):
    """A field of one copy's entry."""

    type: str
    host: str
    version: str | None
    field: str

    @property
    def key(self) -> CopyKey:
        """The copy that it is a field of."""
        return CopyKey(self.type, self.host, self.version)

    def __str__(self) -> str:
        return f"{self.field} of {self.key}"


Aspect: TypeAlias = CopyKey | Tag | Existence | Field | CopyField
"""One thing about a run that reactions can be tied to."""

Snapshot: TypeAlias = Mapping[Aspect, str]
"""A run as one site saw it: every aspect with its value. A copy's value is its status, followed
by ``@`` and the milliseconds since 1970 of its ``status_since`` if it has one, so that a status
that went and came back is a change. `_BARE` follows if the copy is good and has no digest: old
programs add that later, and before nothing can be copied from it. Existence has the value ``yes``,
and so has a tag, followed by its date in the same way; fields have a digest of their content, and
one that is null counts as absent."""

ENTRY_FIELDS: Final = (
    *("type", "host", "pax_version", "status", "status_since"),
    *("manifest", "checksum"),  # whether it has one
)
"""The fields of an entry that can change a snapshot, beside the watched ones."""

_BARE: Final = "-"
_DOUBT: Final = "checksumproblem"
"""The field that marks a copy's bytes as bad or, if it is ``transferred``, as doubtful."""

YES: Final = "yes"


@frozen
class Watched:
    """The fields in a snapshot: paths of a run's fields, and names of its copies' fields."""

    run: frozenset[str] = frozenset()
    copies: frozenset[str] = frozenset()

    def __or__(self, other: Watched) -> Watched:
        return Watched(self.run | other.run, self.copies | other.copies)

    def __le__(self, other: Watched) -> bool:
        return self.run <= other.run and self.copies <= other.copies


NO_FIELDS: Final = Watched()


@frozen
class Interest:
    """The changes that the stream must bring to a site: of these fields, and to these statuses.

    `pairs` are the statuses that concern the site at certain hosts, `hosts` these hosts, `statuses`
    those that concern it at any other host. At its own, `site`, all do. Without `site`, everything
    counts.
    """

    watched: Watched = NO_FIELDS
    site: str | None = None
    hosts: frozenset[str] = frozenset()
    pairs: frozenset[tuple[str, str]] = frozenset()
    statuses: frozenset[str] = frozenset()


@frozen
class Event:
    """One aspect of one run that changed. `before` or `after` is None if it was not there."""

    run: RunId
    aspect: Aspect
    before: str | None
    after: str | None

    @property
    def status(self) -> str | None:
        """The aspect's value now without its time: a copy's status, ``yes``, or None if gone."""
        return None if self.after is None else self.after.partition("@")[0]

    def __str__(self) -> str:
        is_set = self.after and isinstance(self.aspect, Field | CopyField)  # to a digest of it
        return f"{self.aspect}: {'set' if is_set else self.status or 'gone'}"


def new_id() -> str:
    """Return an id that no other call returns."""
    return uuid4().hex


@frozen
class Copy(Entry):
    """One entry of a run's ``data``: a copy of its data somewhere.

    `Entry` has its fields, and `fields` is the whole entry as it is in the document.
    """

    key: CopyKey
    status: str
    fields: Mapping[str, Any] = field(factory=dict, eq=False, repr=False)

    @classmethod
    def from_entry(cls, entry: object) -> Copy | None:
        """Return the copy in an entry; None if it names no type or host: no site can own it."""
        key = _key(entry)
        # `data` may contain anything: people edit these documents by hand.
        if key is None or not isinstance(entry, Mapping):
            return None
        return cls(key, text(entry.get("status")) or UNKNOWN, entry)

    @property
    def type(self) -> str:
        """Its type of data, such as ``raw``."""
        return self.key.type

    @property
    def host(self) -> str:
        """The name of its site in sites.json."""
        return self.key.host

    @property
    def version(self) -> str | None:
        """Its ``pax_version``; None if its type has no versions."""
        return self.key.version

    @property
    def is_requested(self) -> bool:
        """Whether a person requested it, and it is not finished."""
        return self.status == REQUESTED or self.requested

    @property
    def is_abandoned(self) -> bool:
        """Whether an old program failed to make it: status and trigger are not caxev's."""
        # One of us dates each status and names the trigger; old programs do neither.
        ours = self.since is not None or self.trigger is not None
        return self.status == ERROR and not ours and not self.checksumproblem

    @property
    def as_seen(self) -> CopyIs:
        """The expectation that this copy still has the status and owner that it has here."""
        # An entry without a status is `unknown` to us, which the document does not have.
        status = self.fields.get("status") if self.status == UNKNOWN else self.status
        return CopyIs(self.key, {"status": status, **self.having("owner").fields})

    def having(self, *names: str) -> CopyIs:
        """Return the expectation that these fields of the entry are still what they are here."""
        # As in the document: a typed field reads as absent if its value has another type.
        return CopyIs(self.key, {name: self.fields.get(name) for name in names})

    @property
    def seen_as(self) -> str:
        """This copy's value in a `Snapshot`."""
        # The document's own date, as `snapshot_of` takes it: both must give the same text.
        return _value(self.status, self.fields)


@frozen
class FormerCopy(Record):
    """A row of ``given_up`` or ``deleted_data``: a copy that the run had, and may have again."""

    at = EntryField(as_utc, "date")
    location = EntryField(text)
    trigger = EntryField(text)
    """The reaction that gave it up. Without one an old program had begun it: what that left is at
    `location`."""
    by = EntryField(words)
    """The person or site that deleted it."""
    why = EntryField(words)


@frozen
class Run:
    """A run document. Unknown fields stay in `document`.

    `number` is None for muon-veto runs, which are known by `name`. If entries have the same key,
    `copy(key)` is the first; entries that name no type or host are left out of `copies`.
    """

    id: RunId
    number: int | None = None
    name: str = ""
    detector: str = ""
    tags: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()
    document: Mapping[str, Any] = field(factory=dict, eq=False, repr=False)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Run:
        """Return the run in any document; what is not understood is left in `document`."""
        return cls(
            id=document.get("_id"),
            number=count(document.get("number")) or None,
            name=text(document.get("name")) or "",
            detector=text(document.get("detector")) or "",
            tags=tuple(tag["name"] for tag in _tags(document.get("tags"))),
            copies=tuple(_copies(document.get("data"))),
            document=document,
        )

    @property
    def start(self) -> datetime | None:
        """When the run was started, UTC."""
        return as_utc(self.document.get("start"))

    @property
    def suffix(self) -> str:
        """The end that cax gave the name of a muon veto's run, as the TPC has one of that name."""
        return "_MV" if self.detector == "muon_veto" else ""

    def copy(self, key: CopyKey) -> Copy | None:
        """Return the copy with this key, if the run has one."""
        return self._by_key.get(key)

    @cached_property
    def _by_key(self) -> dict[CopyKey, Copy]:
        # Old programs can leave two entries for one copy. MongoDB's positional operator changes
        # the first that matches, so the first is the copy.
        return {copy.key: copy for copy in reversed(self.copies)}

    def at(self, hosts: Collection[str]) -> Iterator[Copy]:
        """Yield the entries at these hosts, also those without a type or a host, as ``unknown``.

        For those who erase or move files: such an entry is no copy, but its files may be the only
        ones of that run, and without a host they may be at any.
        """
        for row in filter(None, map(mapping, rows(self.document.get("data")))):
            host = text(row.get("host"))
            if host is None or host in hosts:
                key = CopyKey(text(row.get("type")) or UNKNOWN, host or UNKNOWN)
                status = text(row.get("status")) or UNKNOWN
                yield Copy.from_entry(row) or Copy(key, status, row)

    @cached_property
    def hosts(self) -> frozenset[str]:
        """The hosts that have a copy."""
        return frozenset(one.host for one in self.copies)

    @property
    def raw_size(self) -> int | None:
        """The bytes of its raw data, once that is complete."""
        return count(self.document.get("raw_size_byte"))

    def size_of(self, copy: Copy) -> int | None:
        """Return the bytes of a copy: those in its entry, or the run's if it is of raw data."""
        return self.raw_size if copy.size is None and copy.type == "raw" else copy.size

    def given_up(self, key: CopyKey) -> list[FormerCopy]:
        """Return each time that the copy with this key was given up, as far as that is kept."""
        return self._former("given_up", key)

    def deleted(self, key: CopyKey) -> list[FormerCopy]:
        """Return each time that a copy with this key was deleted on purpose, the latest last."""
        return self._former("deleted_data", key)

    def _former(self, name: str, key: CopyKey) -> list[FormerCopy]:
        return [FormerCopy(row) for row in rows(self.document.get(name)) if _key(row) == key]

    def snapshot(self, watched: Watched = NO_FIELDS) -> dict[Aspect, str]:
        """Return every aspect of this run with its value; of the fields, those that are watched."""
        return snapshot_of(self.document, watched)

    def __str__(self) -> str:
        return f"run {self.number}" if self.number else f"run {self.name or self.id}"


def snapshot_of(document: Mapping[str, Any], watched: Watched = NO_FIELDS) -> dict[Aspect, str]:
    """Return every aspect of the run in a document with its value.

    As `Run` and `Copy` would give them, without making these: it is done for every change.
    """
    snapshot: dict[Aspect, str] = {Existence(): YES}
    for tag in _tags(document.get("tags")):
        value = _dated(YES, tag.get("date"))
        # If several have one name, the latest counts.
        snapshot[Tag(tag["name"])] = max(value, snapshot.get(Tag(tag["name"]), ""))
    data = document.get("data")
    several: dict[CopyKey, list[str]] = {}
    for entry in data if isinstance(data, list) else ():
        key = _key(entry)
        if key is None:
            continue
        status = text(entry.get("status")) or UNKNOWN
        seen = _value(status, entry)
        # A second entry changes no value of the copy, but must not go unnoticed.
        if key in snapshot:
            several.setdefault(key, [snapshot[key]]).append(seen)
        else:
            snapshot[key] = seen
            for name in watched.copies:
                if (value := entry.get(name)) is not None:
                    snapshot[CopyField(*key, name)] = _field_value(name, value, status, entry)
    # In the order of the array: the first is the copy, so an exchange of the two is a change.
    for key, statuses in several.items():
        snapshot[CopyField(*key, STATUSES)] = _digest(statuses)
    for path in watched.run:
        # Null counts as absent, as it does in the filters of updates.
        if (value := field_of(document, path)) is not None:
            snapshot[Field(path)] = _digest(value)
    return snapshot


def field_of(document: Mapping[str, Any], path: str) -> Any:
    """Return the value of a document's field, by dotted path; None if it is absent."""
    value: Any = document
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _digest(value: object) -> str:
    # Only equality matters. A field may hold megabytes, and broken text from old programs.
    return blake2b(repr(value).encode("utf-8", "replace"), digest_size=8).hexdigest()


def _key(entry: object) -> CopyKey | None:
    if not isinstance(entry, Mapping):
        return None
    kind, host = text(entry.get("type")), text(entry.get("host"))
    if kind is None or host is None:
        return None
    return CopyKey(kind, host, text(entry.get("pax_version")))


def _value(status: str, entry: Mapping[str, Any]) -> str:
    # Without a date two visits of one status look the same; old programs give us no more.
    value = _dated(status, entry.get("status_since"))
    if status != TRANSFERRED or _has_digest(entry):
        return value
    return f"{value}{'' if '@' in value else '@'}{_BARE}"


def _dated(value: str, at: object) -> str:
    time = None if at is None else as_utc(at)
    return value if time is None else f"{value}@{int(time.timestamp() * 1000)}"


def _field_value(name: str, value: object, status: str, entry: Mapping[str, Any]) -> str:
    # A reading ends a doubt, so that one after it is another.
    is_doubt = name == _DOUBT and status == TRANSFERRED
    return _digest((value, entry.get(NOTED)) if is_doubt else value)


def _has_digest(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry has a digest to compare other copies with."""
    return bool(text(entry.get("manifest")) or sha512(entry.get("checksum")))


def time_of(value: str | None) -> datetime | None:
    """The time (UTC) since when a copy has had its status, from its value in a `Snapshot`.

    The inverse of what `Copy.seen_as` makes of ``status_since``.
    """
    _, at, milliseconds = (value or "").rpartition("@")
    try:
        return _EPOCH + timedelta(milliseconds=int(milliseconds.rstrip(_BARE))) if at else None
    except (ValueError, OverflowError):  # a status may be any text
        return None


def _tags(value: object) -> Iterator[Mapping[str, Any]]:
    for tag in value if isinstance(value, list) else ():
        if isinstance(tag, Mapping) and text(tag.get("name")) is not None:
            yield tag


def _copies(value: object) -> Iterator[Copy]:
    for entry in value if isinstance(value, list) else ():
        copy = Copy.from_entry(entry)
        if copy is not None:
            yield copy


@frozen
class CopyIs:
    """An expectation: the run has this copy, and these of its fields have these values.

    A value of None stands for null or absent, as in a MongoDB filter.
    """

    key: CopyKey
    fields: Mapping[str, Any] = Factory(dict)
