"""Runs, their copies, and the events of what changed about them.

All of caxev reads these classes, which `database` makes from documents; `update` has what is
written back. Pure, and `Run.from_document` accepts any document without raising.

Three facts about the entries of a run's ``data`` shape this module: they have no id, their order
changes, and old programs write them beside us. So a copy is known by (type, host, version) and
never by its place, and every field that we do not know is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, Final, Literal, NamedTuple, TypeAlias
from uuid import uuid4

from attrs import Factory, field, frozen

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
UNKNOWN: Final = "unknown"
"""The status of an entry that names none."""
NOTED: Final = "verified_noted"
"""The field of an entry that has the time at which its ``verified_at`` was written."""
STATUSES: Final = "statuses"
"""In a snapshot this field of a copy stands for the statuses of its entries, if it has several."""


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class CopyKey(NamedTuple):
    """The identity of a copy: its type, its host and, for derived data, its version."""

    type: str
    host: str
    version: str | None = None

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"{self.type}{version} at {self.host}"


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
that went and came back is a change. Tags and existence have the value ``yes``, fields a digest of
their content; a field that is null counts as absent."""

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
        return f"{self.aspect}: {self.status or 'gone'}"


def as_utc(value: object) -> datetime | None:
    """Return the time in a field: a datetime, or (in old documents) a list that holds one."""
    # cax pushed some times into lists.
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, datetime):
        return None
    # MongoDB keeps UTC; some clients return it without a zone.
    return value if value.tzinfo else value.replace(tzinfo=UTC)


class Check(NamedTuple):
    """A request for a fresh reading of a copy: its id, and when it was made (UTC)."""

    id: str
    at: datetime | None


def new_id() -> str:
    """Return an id that no other call returns."""
    return uuid4().hex


def _checks(value: object) -> Iterator[Check]:
    # An older version kept one request, not a list; a person may have set a plain date.
    for row in value if isinstance(value, list) else (value,):
        if isinstance(row, Mapping) and (name := _text(row.get("id"))) is not None:
            yield Check(name, as_utc(row.get("at")))
        elif isinstance(row, datetime):  # a person's, or an older version's
            yield Check(str(row), as_utc(row))


def _text(value: object) -> str | None:
    # No subclass: BSON's code is a text that is not hashable, so it cannot be a key.
    return value if type(value) is str and value else None


@frozen
class Copy:
    """One entry of a run's ``data``: a copy of its data somewhere.

    `location` is the absolute path at that host, or None if the entry has none yet (``n/a``,
    ``NA``). `checksum` is cax's sha512 hex digest, `manifest` the digest of our own manifest,
    `source` the host it was copied from, `owner` the site (with its epoch, ``lngs#7``) that is
    working on it. `fields` is the whole entry as it stands in the document.
    """

    key: CopyKey
    status: str
    fields: Mapping[str, Any] = field(factory=dict, eq=False, repr=False)

    @classmethod
    def from_entry(cls, entry: object) -> Copy | None:
        """Return the copy in an entry; None if it names no type or host: no site can own it."""
        key = _key(entry)
        # Anything may stand in `data`: people edit these documents by hand.
        if key is None or not isinstance(entry, Mapping):
            return None
        return cls(key, _text(entry.get("status")) or UNKNOWN, entry)

    @property
    def type(self) -> str:
        return self.key.type

    @property
    def host(self) -> str:
        return self.key.host

    @property
    def version(self) -> str | None:
        return self.key.version

    @property
    def location(self) -> str | None:
        location = _text(self.fields.get("location"))
        # cax wrote these before a transfer had begun.
        return None if location is None or location.lower() in {"n/a", "na"} else location

    @property
    def checksum(self) -> str | None:
        checksum = _text(self.fields.get("checksum"))
        # At a catalogue cax joined the files' ADLER32s by colons, and it wrote n/a for none.
        no_digest = checksum is None or ":" in checksum or checksum.lower() == "n/a"
        return None if no_digest else checksum

    @property
    def manifest(self) -> str | None:
        return _text(self.fields.get("manifest"))

    @property
    def source(self) -> str | None:
        return _text(self.fields.get("source"))

    @property
    def owner(self) -> str | None:
        return _text(self.fields.get("owner"))

    @property
    def since(self) -> datetime | None:
        """When the status was last set, UTC; None if an old program set it."""
        return as_utc(self.fields.get("status_since"))

    @property
    def is_abandoned(self) -> bool:
        """Whether an old program failed to make it: neither status nor trigger is by one of us."""
        found_bad = self.fields.get("checksumproblem")
        # One of us dates each status and names the trigger; old programs do neither.
        ours = self.since is not None or self.fields.get("trigger") is not None
        return self.status == ERROR and not ours and not found_bad

    @property
    def verified_at(self) -> datetime | None:
        """When its bytes were last read and found to be right, UTC; cax wrote no such time."""
        value = self.fields.get("verified_at")
        return None if isinstance(value, list) else as_utc(value)

    @property
    def noted_at(self) -> datetime | None:
        """When `verified_at` was written, UTC; None if somebody else wrote that."""
        value = self.fields.get(NOTED)
        return None if isinstance(value, list) else as_utc(value)

    @property
    def read_at(self) -> datetime | None:
        """`verified_at` as a proof: None if that time was still to come when it was written.

        Once it has come, the time itself does not show any more that it was never true.
        """
        read, noted = self.verified_at, self.noted_at
        return None if read is None or noted is None or read > noted else read

    @property
    def asked(self) -> tuple[Check, ...]:
        """The requests for a fresh reading, the latest last."""
        return tuple(_checks(self.fields.get("check_asked")))

    @property
    def answered(self) -> frozenset[str]:
        """The ids of the requests that a reading has answered, which began after they were made."""
        value = self.fields.get("check_answered")
        return frozenset(filter(None, map(_text, value if isinstance(value, list) else ())))

    @property
    def pending(self) -> tuple[Check, ...]:
        """The requests for a fresh reading that wait for an answer."""
        # By id and not by time: no clock decides whether a request was answered.
        answered = self.answered
        return tuple(one for one in self.asked if one.id not in answered)

    @property
    def as_seen(self) -> CopyIs:
        """The expectation that this copy still has the status and owner that it has here."""
        # An entry without a status is `unknown` to us, which is not what stands in the document.
        status = self.fields.get("status") if self.status == UNKNOWN else self.status
        return CopyIs(self.key, {"status": status, "owner": self.fields.get("owner")})

    @property
    def seen_as(self) -> str:
        """This copy's value in a `Snapshot`."""
        # The document's own date, as `snapshot_of` takes it: both must give the same text.
        return _value(self.status, self.fields.get("status_since"))


class GivenUp(NamedTuple):
    """A copy was given up `at` that time (UTC), by the reaction that its `trigger` names.

    Without a trigger an old program had begun it: what that left stands at `location`.
    """

    at: datetime
    trigger: str | None
    location: str | None


@frozen
class Run:
    """A run document. Unknown fields stay in `document`.

    `number` is None for muon-veto runs, which are known by `name`. Of entries with the same key
    the first counts as `copy(key)`; entries that name no type or host are left out of `copies`.
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
        number = document.get("number")
        return cls(
            id=document.get("_id"),
            number=number if isinstance(number, int) and number > 0 else None,
            name=_text(document.get("name")) or "",
            detector=_text(document.get("detector")) or "",
            tags=tuple(_tags(document.get("tags"))),
            copies=tuple(_copies(document.get("data"))),
            document=document,
        )

    @property
    def start(self) -> datetime | None:
        """When the run was started, UTC."""
        return as_utc(self.document.get("start"))

    @property
    def suffix(self) -> str:
        """What cax put behind the name of a muon veto's run, as the TPC has one of that name."""
        return "_MV" if self.detector == "muon_veto" else ""

    def copy(self, key: CopyKey) -> Copy | None:
        """Return the copy with this key, if the run has one."""
        # Old programs can leave two entries for one copy. MongoDB's positional operator changes
        # the first that matches, so the first is the copy.
        return next((copy for copy in self.copies if copy.key == key), None)

    def given_up(self, key: CopyKey) -> Iterator[GivenUp]:
        """Return each time that the copy with this key was given up, as far as that is kept."""
        rows = self.document.get("given_up")
        for row in rows if isinstance(rows, list) else ():
            if _key(row) == key and (at := as_utc(row.get("date"))) is not None:
                yield GivenUp(at, _text(row.get("trigger")), _text(row.get("location")))

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
    for name in _tags(document.get("tags")):
        snapshot[Tag(name)] = YES
    data = document.get("data")
    several: dict[CopyKey, list[str]] = {}
    for entry in data if isinstance(data, list) else ():
        key = _key(entry)
        if key is None:
            continue
        seen = _value(_text(entry.get("status")) or UNKNOWN, entry.get("status_since"))
        # A second entry changes no value of the copy, but must not go unnoticed.
        if key in snapshot:
            several.setdefault(key, [snapshot[key]]).append(seen)
        else:
            snapshot[key] = seen
            for name in watched.copies:
                if (value := entry.get(name)) is not None:
                    snapshot[CopyField(*key, name)] = _digest(value)
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
    kind, host = _text(entry.get("type")), _text(entry.get("host"))
    if kind is None or host is None:
        return None
    return CopyKey(kind, host, _text(entry.get("pax_version")))


def _value(status: str, since: object) -> str:
    # Without a date two visits of one status look the same; old programs give us no more.
    if since is None or (time := as_utc(since)) is None:
        return status
    return f"{status}@{int(time.timestamp() * 1000)}"


def time_of(value: str | None) -> datetime | None:
    """The time (UTC) since when a copy has had its status, from its value in a `Snapshot`.

    The inverse of what `Copy.seen_as` makes of ``status_since``.
    """
    _, at, milliseconds = (value or "").rpartition("@")
    try:
        return _EPOCH + timedelta(milliseconds=int(milliseconds)) if at else None
    except (ValueError, OverflowError):  # a status may be any text
        return None


def _tags(value: object) -> Iterator[str]:
    for tag in value if isinstance(value, list) else ():
        name = _text(tag.get("name")) if isinstance(tag, Mapping) else None
        if name is not None:
            yield name


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
