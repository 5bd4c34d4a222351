"""What the database says: runs, their copies, and what can change about them.

Everyone reads these classes; `mongo` makes them from documents and turns a `RunUpdate` into a
write. Pure: nothing here does I/O, and `Run.from_document` accepts any document without raising.

Three facts about the entries of a run's ``data`` shape this module: they have no id, their order
changes, and old programs write them beside us. So a copy is known by (type, host, version) and
never by its place, and every field that we do not know is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeAlias

from attrs import Factory, field, frozen

RunId: TypeAlias = Any  # a document's _id, usually a bson.ObjectId

REQUESTED: Final = "requested"
"""A copy that a person asked for; nobody has begun it."""
TRANSFERRING: Final = "transferring"
VERIFYING: Final = "verifying"
TRANSFERRED: Final = "transferred"
ERROR: Final = "error"
UNKNOWN: Final = "unknown"
"""The status of an entry that names none."""


class CopyKey(NamedTuple):
    """What makes a copy that copy: its type, its host and, for derived data, its version."""

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
    """That there is such a run at all."""

    def __str__(self) -> str:
        return "the run"


Aspect: TypeAlias = CopyKey | Tag | Existence
"""One thing about a run that reactions can be tied to."""

Look: TypeAlias = Mapping[Aspect, str]
"""A run as one site saw it: every aspect with its value. A copy's value is its status, followed
by ``@`` and the milliseconds since 1970 of its ``status_since`` where there is one, so that a
status that went and came back is a change. Tags and existence have the value ``yes``."""

YES: Final = "yes"


@frozen
class Event:
    """One aspect of one run that changed. `before` or `after` is None where it was not there."""

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
    """The time in a document's field: a datetime, or (old documents) a list that holds one."""
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


@frozen
class Copy:
    """One entry of a run's ``data``: a copy of its data somewhere.

    `location` is the absolute path at that host, or None where the entry has none yet (``n/a``,
    ``NA``). `checksum` is cax's sha512 hex digest, `manifest` the digest of our own manifest,
    `source` the host it was copied from, `owner` the site (with its epoch, ``lngs#7``) that is
    working on it. `fields` is the whole entry as it stands in the document.
    """

    key: CopyKey
    status: str
    fields: Mapping[str, Any] = field(factory=dict, eq=False, repr=False)

    @classmethod
    def from_entry(cls, entry: object) -> Copy | None:
        """The copy in an entry; None where it names no type or host, so that nobody can own it."""
        key = _key(entry)
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
        return None if location is None or location.lower() in {"n/a", "na"} else location

    @property
    def checksum(self) -> str | None:
        return _text(self.fields.get("checksum"))

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
        """When the status was last set, UTC; None where an old program set it."""
        return as_utc(self.fields.get("status_since"))

    @property
    def as_seen(self) -> CopyIs:
        """The expectation that this copy still has the status and owner that it has here."""
        # An entry without a status is `unknown` to us, which is not what stands in the document.
        status = self.fields.get("status") if self.status == UNKNOWN else self.status
        return CopyIs(self.key, {"status": status, "owner": self.fields.get("owner")})

    @property
    def seen_as(self) -> str:
        """This copy's value in a `Look`."""
        return _value(self.status, self.fields.get("status_since"))


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
        """Any document in, a run out: whatever cannot be understood is left in `document`."""
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

    def copy(self, key: CopyKey) -> Copy | None:
        """The copy known by `key`, if the run has one."""
        return next((copy for copy in self.copies if copy.key == key), None)

    def look(self) -> dict[Aspect, str]:
        """Every aspect of this run with its value."""
        return look_at(self.document)

    def __str__(self) -> str:
        return f"run {self.number}" if self.number else f"run {self.name or self.id}"


def look_at(document: Mapping[str, Any]) -> dict[Aspect, str]:
    """Every aspect of the run in a document with its value.

    What `Run` and `Copy` would say, without making them: this is done for every change there is.
    """
    look: dict[Aspect, str] = {Existence(): YES}
    for name in _tags(document.get("tags")):
        look[Tag(name)] = YES
    data = document.get("data")
    for entry in data if isinstance(data, list) else ():
        key = _key(entry)
        if key is not None and key not in look:
            status = _text(entry.get("status")) or UNKNOWN
            look[key] = _value(status, entry.get("status_since"))
    return look


def _key(entry: object) -> CopyKey | None:
    if not isinstance(entry, Mapping):
        return None
    kind, host = _text(entry.get("type")), _text(entry.get("host"))
    if kind is None or host is None:
        return None
    return CopyKey(kind, host, _text(entry.get("pax_version")))


def _value(status: str, since: object) -> str:
    if since is None or (time := as_utc(since)) is None:
        return status
    return f"{status}@{int(time.timestamp() * 1000)}"


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


@frozen
class CopyAbsent:
    """An expectation: the run has no such copy."""

    key: CopyKey


@frozen
class FieldIs:
    """An expectation: this field of the run (dotted path) has this value; None: null or absent."""

    path: str
    value: Any = None


@frozen
class TagAbsent:
    """An expectation: the run has no tag of this name."""

    name: str


Expectation: TypeAlias = CopyIs | CopyAbsent | FieldIs | TagAbsent


@frozen
class RunUpdate:
    """A change to one run document that happens only if everything in `expect` holds.

    The expectations go into the write's own filter, so of two sites that try the same change one
    wins and the other learns that it lost. At most one of `add`, `change` and `remove` is used.
    Make one with `add_copy`, `change_copy`, `remove_copy`, `add_tag` or `set_fields`.
    """

    run: RunId
    expect: tuple[Expectation, ...] = ()
    add: Mapping[str, Any] | None = None
    change: tuple[CopyIs, Mapping[str, Any]] | None = None
    remove: CopyIs | None = None
    tag: Mapping[str, Any] | None = None
    fields: Mapping[str, Any] = Factory(dict)

    @classmethod
    def add_copy(
        cls, run: Run, key: CopyKey, status: str, *expect: Expectation, **fields: Any
    ) -> RunUpdate:
        """Claim a copy: add its entry where the run has none of that key."""
        entry = {"type": key.type, "host": key.host, "status": status, **fields}
        if key.version is not None:
            entry["pax_version"] = key.version
        return cls(run.id, (CopyAbsent(key), *expect), add=entry)

    @classmethod
    def change_copy(
        cls, run: Run, copy: Copy, status: str, *expect: Expectation, **fields: Any
    ) -> RunUpdate:
        """Change a copy that still has the status and the owner that `copy` was seen with."""
        seen = copy.as_seen
        return cls(run.id, (seen, *expect), change=(seen, {"status": status, **fields}))

    @classmethod
    def remove_copy(cls, run: Run, copy: Copy, *expect: Expectation) -> RunUpdate:
        """Take a copy's entry out, if it still has the status and owner it was seen with."""
        seen = copy.as_seen
        return cls(run.id, (seen, *expect), remove=seen)

    @classmethod
    def add_tag(cls, run: Run, name: str, **fields: Any) -> RunUpdate:
        """Tag the run, unless it has that tag."""
        return cls(run.id, (TagAbsent(name),), tag={"name": name, **fields})

    @classmethod
    def set_fields(cls, run: Run, *expect: Expectation, **fields: Any) -> RunUpdate:
        """Set top-level fields of the run; give what they must be now as `FieldIs`."""
        return cls(run.id, expect, fields=fields)
