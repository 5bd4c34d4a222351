"""The schema of an entry of a run's ``data``: each field with its type, in one place.

Old programs write these entries beside us, and people edit them by hand. So a field that does not
hold what it should reads as if it were absent, and nothing here raises, whatever stands in the
document. The entry itself is kept as it is, with the keys that we do not know: see `Record.fields`.

`caxev.core.model.Copy` is an entry with its key and status. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Generic, NamedTuple, Self, TypeVar, overload

from attrs import frozen

T = TypeVar("T")
R = TypeVar("R", bound="Record")

NOTED: Final = "verified_noted"
"""The field of an entry that has the time at which its ``verified_at`` was written."""

MOST_DAYS: Final = 36525.0
"""The longest time, in days, that a hold may count from a copy's arrival."""

# -- readers: any value in, one type out -----------------------------------------------------------


def anything(value: object) -> Any:
    """Return the value as it is."""
    return value


def text(value: object) -> str | None:
    """Return a text that is not empty."""
    # No subclass: BSON's code is a text that is not hashable, so it cannot be a key.
    return value if type(value) is str and value else None


def words(value: object) -> str | None:
    """Return a value that was written for people, as text."""
    return str(value) if value else None


def as_utc(value: object) -> datetime | None:
    """Return the time in a field: a datetime, or (in old documents) a list that holds one."""
    # cax pushed some times into lists.
    return moment(value[0]) if isinstance(value, list) and value else moment(value)


def moment(value: object) -> datetime | None:
    """Return a datetime, UTC."""
    if not isinstance(value, datetime):
        return None
    # MongoDB keeps UTC; some clients return it without a zone.
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def count(value: object) -> int | None:
    """Return a whole number of at least 0."""
    # mongosh writes 5000 as a double, so the type does not distinguish a count.
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return int(value) if value >= 0 and value % 1 == 0 else None


def texts(value: object) -> tuple[str, ...]:
    """Return the texts in a list."""
    return tuple(filter(None, map(text, value if isinstance(value, list) else ())))


def mapping(value: object) -> Mapping[str, Any] | None:
    """Return an object of the document."""
    return value if isinstance(value, Mapping) else None


def rows(value: object) -> tuple[Any, ...]:
    """Return what is in a list."""
    return tuple(value) if isinstance(value, list) else ()


def location(value: object) -> str | None:
    """Return a path, or a name in a catalogue."""
    found = text(value)
    # cax wrote these before a transfer had begun.
    return None if found is None or found.lower() in {"n/a", "na"} else found


def sha512(value: object) -> str | None:
    """Return a SHA-512 in hexadecimal."""
    found = text(value)
    # At a catalogue cax joined the files' ADLER32s by colons, and it wrote n/a for none.
    return None if found is None or ":" in found or found.lower() == "n/a" else found


# -- fields ----------------------------------------------------------------------------------------


class EntryField(Generic[T]):
    """A field of a document's object: reading it gives a `T`, whatever the document holds.

    `name` is its key in the document, by default that of the attribute.
    """

    def __init__(self, read: Callable[[object], T], name: str = "") -> None:
        self.read, self.name = read, name

    def __set_name__(self, _owner: type, name: str) -> None:
        self.name = self.name or name

    @overload
    def __get__(self, row: None, owner: type) -> Self: ...
    @overload
    def __get__(self, row: Record, owner: type) -> T: ...
    def __get__(self, row: Record | None, owner: type) -> Self | T:
        return self if row is None else self.read(row.fields.get(self.name))


@frozen
class Record:
    """An object in a document. `fields` is the object itself, with the keys that we do not know."""

    fields: Mapping[str, Any]


def _row(kind: type[R]) -> Callable[[object], R | None]:
    def read(value: object) -> R | None:
        return kind(value) if isinstance(value, Mapping) else None

    return read


class Check(NamedTuple):
    """A request for a fresh reading of a copy: its id, and when it was made (UTC)."""

    id: str
    at: datetime | None


def checks(value: object) -> tuple[Check, ...]:
    """Return the requests for a fresh reading."""
    return tuple(_each_check(value))


class Hold(NamedTuple):
    """A person's wish that a copy stays: who, why, when it was made, and when it ends (UTC).

    If `until` is None it ends so many `days` after the copy has arrived; without both, never.
    """

    by: str
    why: str
    at: datetime | None
    until: datetime | None = None
    days: float | None = None


def holds(value: object) -> tuple[Hold, ...]:
    """Return the holds of a copy; one whose end is not understood has none."""
    rows = value if isinstance(value, list) else ()
    return tuple(_hold(row) for row in rows if isinstance(row, Mapping))


def _hold(row: Mapping[str, Any]) -> Hold:
    return Hold(
        by=words(row.get("by")) or "somebody",
        why=words(row.get("why")) or "",
        at=moment(row.get("at")),
        until=moment(row.get("until")),
        days=_days(row.get("days")),
    )


def _days(value: object) -> float | None:
    # A value that is no number of days is no end: a hold that is not understood still holds.
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 <= value <= MOST_DAYS else None


def _each_check(value: object) -> Iterator[Check]:
    # An older version kept one request, not a list; a person may have set a plain date.
    for row in value if isinstance(value, list) else (value,):
        if isinstance(row, Mapping) and (name := text(row.get("id"))) is not None:
            yield Check(name, as_utc(row.get("at")))
        elif isinstance(row, datetime):  # a person's, or an older version's
            yield Check(str(row), as_utc(row))


@frozen
class BatchJob(Record):
    """The ``job`` of an entry: the job that makes derived data. See `caxev.batch`."""

    name = EntryField(text)
    """The name of the present attempt's job."""
    claimed = EntryField(count)
    """Milliseconds since 1970: when the entry was claimed. Part of the names of its jobs."""
    attempt = EntryField(count)
    """From 1 on, within a claim."""
    tries = EntryField(mapping)
    """The number of retries, by the way in which the attempt before had failed."""
    id = EntryField(anything)
    """The batch system's name for it; None until it is sent."""
    submitted = EntryField(as_utc)
    """When it was sent, or started as a process of the listener; UTC."""
    log = EntryField(text)
    """Where its output is, at its site."""
    input = EntryField(text)
    """The type of the data that it reads."""
    input_version = EntryField(text)
    reads = EntryField(text)
    """The path that it reads."""
    cores = EntryField(count)
    memory = EntryField(count)
    """Bytes."""
    walltime = EntryField(count)
    """Seconds."""
    not_before = EntryField(moment)
    """When the next attempt is due, UTC."""


@frozen
class JobResult(Record):
    """The ``job_ended`` of an entry, which the job itself writes. See `caxev.batch.base.JobEnd`."""

    name = EntryField(text)
    """The name of the job, as in `BatchJob`."""
    how = EntryField(text)
    why = EntryField(words)
    host = EntryField(text)
    """The node where it ran."""
    at = EntryField(as_utc)


@frozen
class SetAside(Record):
    """The ``quarantine`` of an entry: files that differ from the master's."""

    at = EntryField(as_utc)
    place = EntryField(text)
    """Where they are; None until they have been moved there."""
    master = EntryField(text, "from")
    """The host whose copy they differ from."""
    mark = EntryField(text)
    """Identifies the files to move."""


@frozen
class Withdrawn(Record):
    """The ``withdrawn`` of an entry: a deletion that was given up."""

    at = EntryField(as_utc)
    why = EntryField(words)


@frozen
class Entry(Record):
    """An entry of a run's ``data``. Times are UTC, sizes bytes."""

    # Where its files are.
    location = EntryField(location)
    """The absolute path at its host, or a catalogue's ``scope:dataset``; None: it has none yet."""
    size = EntryField(count)
    folder = EntryField(text)
    """The folder on tape, for a copy that has no location yet."""
    moving_to = EntryField(text)
    """The path to which ``caxev mv`` moves it."""
    moved_from = EntryField(text)
    """The hidden path at which a move has left files."""

    # Its makers, and the process that works on it.
    creation_time = EntryField(as_utc)
    creation_place = EntryField(text)
    source = EntryField(text)
    """The host that it was copied from."""
    source_name = EntryField(text)
    """In a catalogue: the name of the directory that was uploaded."""
    producer = EntryField(text)
    """The site whose job made the data, in copies of it."""
    owner = EntryField(text)
    """The site that works on it, with its epoch: ``lngs#7``."""
    trigger = EntryField(text)
    """The reaction that claimed it. Old programs write none."""
    requested = EntryField(bool)
    """Whether a person requested it: remains when its status no longer shows it."""
    bulk = EntryField(text)
    """The id of the latest bulk request that includes it."""
    from_rse = EntryField(text)
    """The RSE to fetch it from, if a person named one."""
    since = EntryField(as_utc, "status_since")
    """When the status was last set; None if an old program set it."""
    arrived_at = EntryField(as_utc)
    """When it was first found to be right here, or was written to tape."""
    holds = EntryField(holds)
    """Holds that exempt it from the rules of deletion; see `caxev.copies.holds`."""
    error = EntryField(words)
    """Why it is bad, or why the last attempt failed."""
    repairs = EntryField(count)
    """How often it was repaired."""
    resends = EntryField(count)
    """How often it was sent to tape again."""

    # Its content.
    checksum = EntryField(sha512)
    """cax's SHA-512 in hexadecimal."""
    manifest = EntryField(text)
    """The digest of its manifest."""
    source_checksum = EntryField(sha512)
    source_manifest = EntryField(text)
    checksumproblem = EntryField(bool)
    """Whether its bytes are bad, or suspected to be."""
    disputed = EntryField(bool)
    """Whether an ``error`` contradicts other copies, but not its own digests."""
    vouched = EntryField(bool)
    """Whether a person has checked it and found it right."""
    verified_at = EntryField(moment)
    """When its bytes were last read and found to be right; cax wrote no such time."""
    noted_at = EntryField(moment, NOTED)
    """When `verified_at` was written; None if somebody else wrote that."""
    asked = EntryField(checks, "check_asked")
    """The requests for a fresh reading, the latest last."""
    quarantine = EntryField(_row(SetAside))
    is_quarantined = EntryField(bool, "quarantine")

    # Derived data.
    job = EntryField(_row(BatchJob))
    job_ended = EntryField(_row(JobResult))

    # Deletion; see `caxev.copies.deletion`.
    deletion = EntryField(mapping)
    """The intent."""
    proof = EntryField(anything)
    """The good copies that were counted when the deletion was proven."""
    is_erasing = EntryField(bool, "erasing")
    """Whether its bytes are being erased: the point of no return is passed."""
    mark = EntryField(text)
    """Identifies the files to erase at its location."""
    moved_mark = EntryField(text)
    """Identifies the files to erase at `moved_from`."""
    withdrawn = EntryField(_row(Withdrawn))

    # In a catalogue; see `caxev.rucio`.
    rse = EntryField(texts)
    """The RSEs of its replicas."""
    rule_info = EntryField(rows)
    """The state of its rules; cax wrote texts."""
    rules = EntryField(text)
    """A digest of the wishes that the rules were last made to match."""

    @property
    def read_at(self) -> datetime | None:
        """`verified_at` as a proof: None if that time was still to come when it was written.

        Once it has come, the time itself does not show any more that it was never true.
        """
        read, noted = self.verified_at, self.noted_at
        return None if read is None or noted is None or read > noted else read

    @property
    def answered(self) -> frozenset[str]:
        """The ids of the requests that a reading has answered, which began after they were made."""
        return frozenset(texts(self.fields.get("check_answered")))

    @property
    def pending(self) -> tuple[Check, ...]:
        """The requests for a fresh reading that wait for an answer."""
        # By id and not by time: no clock decides whether a request was answered.
        answered = self.answered
        return tuple(one for one in self.asked if one.id not in answered)
