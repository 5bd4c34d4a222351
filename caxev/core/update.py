"""Writes to a run: their changes, and the state that they expect to find.

A handler returns a `RunUpdate`. Its expectations go into the write's own filter, so that of two
sites that try the same change one wins. Pure: `database` turns an update into a write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeAlias

from attrs import Factory, evolve, frozen

from caxev.core.model import (
    ERROR,
    TRANSFERRED,
    TRANSFERRING,
    Copy,
    CopyIs,
    CopyKey,
    Run,
    RunId,
    new_id,
)

OWN_FIELDS: Final = frozenset(
    {"_id", "comments", "data", "deleted_data", "detector", "given_up", "name", "number", "tags"}
)
"""Fields that identify a run or have operations of their own: they are not set as a whole."""
KEY_FIELDS: Final = frozenset({"type", "host", "pax_version"})
"""Fields that identify a copy."""
CHECKS_KEPT: Final = 32
"""Requests for a fresh reading that an entry keeps, and answers: the latest of each."""


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


@frozen
class TagThere:
    """An expectation: the run has a tag of this name."""

    name: str


@frozen
class Fresh:
    """A condition for a reading of a copy: it answers `request`, independent of any clock.

    With `since`, so does one that began between `since` and `until` (UTC): a time that is, or was
    when it was written, in the future proves nothing.
    """

    request: str
    since: datetime | None = None
    until: datetime | None = None

    def counts(self, copy: Copy) -> bool:
        """Return whether the copy was read so."""
        if copy.verified_at is None:
            return False
        if self.request in copy.answered:
            return True
        read = copy.read_at
        if self.since is None or read is None:
            return False
        return self.since <= read <= (self.until or read)


@frozen
class CopiesAtLeast:
    """An expectation: so many good copies of this copy's data exist at other hosts.

    Good is what is ``transferred`` with this copy's `manifest` or, if either manifest is not
    known, with its `checksum`. `hosts` names the only ones that count, each with
    how its copy must have been read, None: by its entry. Without, all hosts count by their entries.
    """

    number: int
    key: CopyKey
    manifest: str | None = None
    checksum: str | None = None
    hosts: Mapping[str, Fresh | None] | None = None

    @classmethod
    def of(
        cls, number: int, copy: Copy, hosts: Mapping[str, Fresh | None] | None = None
    ) -> CopiesAtLeast:
        """Expect `number` copies of the content of `copy`, by its manifest and checksum."""
        return cls(number, copy.key, copy.manifest, copy.checksum, hosts)

    def holds(self, run: Run) -> bool:
        """Return whether the run is so; several entries of one host are one copy."""
        # By hosts: two entries at one host are the same files.
        return len({copy.host for copy in run.copies if self.counts(copy)}) >= self.number

    def counts(self, other: Copy) -> bool:
        """Return whether another copy is one of those that count."""
        key = self.key
        if (other.type, other.version) != (key.type, key.version) or other.host == key.host:
            return False
        if other.status != TRANSFERRED or (self.hosts is not None and other.host not in self.hosts):
            return False
        # The entry may be a lie; a proof needs a reading that answered our request.
        fresh = None if self.hosts is None else self.hosts[other.host]
        if fresh is not None and not fresh.counts(other):
            return False
        # The manifest covers every file. cax's checksum stands in only if a manifest is missing.
        if self.manifest and other.manifest:
            return self.manifest == other.manifest
        return self.checksum is not None and self.checksum == other.checksum


@frozen
class NobodyReads:
    """An expectation: no copy, and no derived data, is being made from this copy.

    A copy that is being made has an entry ``transferring`` that names its `source`; derived data
    names the input of its ``job``. Old programs name neither, and may read any copy of the same
    data. An entry of theirs counts unless it was made, or its status dated, at `since` or before
    (UTC; None: it counts in any case); `caxev.handlers.stalled` dates it if nothing else did.
    """

    key: CopyKey
    since: datetime | None = None

    def holds(self, run: Run) -> bool:
        """Return whether the run is so."""
        return not any(map(self._reads, run.copies))

    def _reads(self, one: Copy) -> bool:
        if one.status != TRANSFERRING:
            return False
        key, job = self.key, one.job
        # Processing reads at its own host.
        made_of = None if job is None or one.host != key.host else (job.input, job.input_version)
        if made_of == (key.type, key.version):
            return True
        if (one.type, one.version) != (key.type, key.version):
            return False
        return one.source == key.host or (one.host != key.host and self._may_read(one))

    def _may_read(self, one: Copy) -> bool:
        if one.source is not None or one.fields.get("job") is not None:
            return False
        dates = (one.since, one.creation_time)
        # A date from before shows that the program has died, if nothing has touched it since.
        return self.since is None or all(date is None or date > self.since for date in dates)


Expectation: TypeAlias = (
    CopyIs | CopyAbsent | FieldIs | TagAbsent | TagThere | CopiesAtLeast | NobodyReads
)


@frozen
class RunUpdate:
    """A change to one run document that happens only if everything in `expect` holds.

    The expectations go into the write's own filter, so of two sites that try the same change one
    wins and the other learns that it lost. At most one of `add`, `change` and `remove` is used.
    Make one with `add_copy`, `change_copy`, `note`, `ask`, `remove_copy`, `add_tag`, `remove_tag`,
    `add_comment` or `set_fields`. `append` adds to lists in the changed entry, which keep their
    last `CHECKS_KEPT` values. `tombstone` goes to the run's ``deleted_data``, `given_up` to its
    list of that name. Raises ValueError if it would change the identity of the run or the copy;
    only an update that `overwrites` may set any field of the run.
    """

    run: RunId
    expect: tuple[Expectation, ...] = ()
    add: Mapping[str, Any] | None = None
    change: tuple[CopyIs, Mapping[str, Any]] | None = None
    append: Mapping[str, Sequence[Any]] = Factory(dict)
    remove: CopyIs | None = None
    tag: Mapping[str, Any] | None = None
    untag: str | None = None
    comment: Mapping[str, Any] | None = None
    fields: Mapping[str, Any] = Factory(dict)
    tombstone: Mapping[str, Any] | None = None
    given_up: Mapping[str, Any] | None = None
    overwrites: bool = False

    def __attrs_post_init__(self) -> None:
        # Refused when it is made: an update with such a name would fail in the database, after the
        # work is done.
        for one in self.expect:
            if not isinstance(one, Expectation):
                raise TypeError(f"{one!r} is no expectation, such as CopyIs or FieldIs")
        protected = frozenset() if self.overwrites else OWN_FIELDS
        _check_names("a run", self.fields, protected)
        if self.add is not None:
            _check_names("a copy's entry", self.add)
            # It is pushed whole: a dot would become a part of the field's name.
            if dotted := [name for name in self.add if "." in name]:
                raise ValueError(f"{dotted[0]!r}: give a new copy the whole field, without a dot")
        if self.change is not None:
            _check_names("a copy's entry", self.change[1], KEY_FIELDS)

    @classmethod
    def add_copy(
        cls, run: Run, key: CopyKey, status: str, *expect: Expectation, **fields: Any
    ) -> RunUpdate:
        """Claim a copy: add its entry if the run has none with that key."""
        entry = {**fields, "type": key.type, "host": key.host, "status": status}
        if key.version is not None:
            entry["pax_version"] = key.version
        return cls(run.id, (CopyAbsent(key), *expect), add=entry)

    @classmethod
    def change_copy(
        cls, run: Run, copy: Copy, status: str, *expect: Expectation, **fields: Any
    ) -> RunUpdate:
        """Change a copy that still has the status and the owner that `copy` was seen with."""
        seen = _seen(run, copy)
        # The expectation goes into the filter of the write: of two sites that try it, one wins.
        return cls(run.id, (seen, *expect), change=(seen, {"status": status, **fields}))

    @classmethod
    def give_up(cls, run: Run, copy: Copy, **fields: Any) -> RunUpdate:
        """Make a copy that is not finished an ``error``, and remember it; see `remembered`."""
        return cls.change_copy(run, copy, ERROR, owner=None, **fields).remembered(copy)

    def remembered(self, copy: Copy) -> RunUpdate:
        """This update, which also notes in the run that the copy was given up.

        The note outlives the entry, which others may take out. The engine does not start the
        reaction that gave a copy up again for the entry's vanishing.
        """
        left = copy.having("location", "trigger").fields
        row = {name: value for name, value in left.items() if value is not None}
        key = {"type": copy.type, "host": copy.host, "pax_version": copy.version}
        return evolve(self, given_up={**key, **row})

    @classmethod
    def note(cls, run: Run, copy: Copy, *expect: Expectation, **fields: Any) -> RunUpdate:
        """Set fields of a copy's entry that are not its status: no event of the copy's own."""
        if "status" in fields:
            raise ValueError("a note sets no status: use change_copy")
        seen = _seen(run, copy)
        return cls(run.id, (seen, *expect), change=(seen, fields))

    @classmethod
    def replace(cls, run: Run, copy: Copy, **fields: Any) -> RunUpdate:
        """As `note`, if nobody has written these fields meanwhile."""
        seen = _seen(run, copy)
        which = CopyIs(seen.key, {**seen.fields, **copy.having(*fields).fields})
        return cls(run.id, (which,), change=(which, fields))

    @classmethod
    def ask(cls, run: Run, copy: Copy, request: str, now: datetime) -> RunUpdate:
        """Ask for a fresh reading of a copy; the answer names the id `request`."""
        row = {"id": request, "at": now}
        return _appended(cls.note(run, copy), copy, "check_asked", [row])

    def answering(self, seen: Copy) -> RunUpdate:
        """Record that a reading answers the requests in the copy as it was `seen` before.

        It answers all requests that were in the entry when the reading began. Without any, the
        answer gets a new id, which wakes the reactions that wait for a reading.
        """
        # The requests of `seen`, not of the copy as it is now: one made during the reading is not
        # answered by it.
        ids = [one.id for one in seen.pending] or [new_id()]
        return _appended(self, seen, "check_answered", ids)

    @classmethod
    def remove_copy(
        cls,
        run: Run,
        copy: Copy,
        *expect: Expectation,
        tombstone: Mapping[str, Any] | None = None,
    ) -> RunUpdate:
        """Take a copy's entry out, if it still has the status and owner it was seen with.

        With `tombstone` (who, when, why, on what proof) it is remembered in ``deleted_data``.
        """
        seen = _seen(run, copy)
        if tombstone is not None:
            tombstone = {
                "type": copy.type,
                "host": copy.host,
                "pax_version": copy.version,
                "location": copy.location,
                "checksum": copy.checksum,
                "manifest": copy.manifest,
                **tombstone,
            }
        return cls(run.id, (seen, *expect), remove=seen, tombstone=tombstone)

    @classmethod
    def add_tag(cls, run: Run, name: str, **fields: Any) -> RunUpdate:
        """Tag the run, unless it has that tag."""
        return cls(run.id, (TagAbsent(name),), tag={"name": name, **fields})

    @classmethod
    def remove_tag(cls, run: Run, name: str) -> RunUpdate:
        """Take a tag from the run, if it has it: all of that name."""
        return cls(run.id, (TagThere(name),), untag=name)

    @classmethod
    def add_comment(cls, run: Run, text: str, user: str) -> RunUpdate:
        """Add a comment to the run's ``comments``: ``text``, ``user`` and ``date`` (UTC)."""
        # `$push` onto what is no list would fail.
        there = run.document.get("comments")
        expected = () if there is None or isinstance(there, list) else (FieldIs("comments"),)
        return cls(run.id, expected, comment={"text": text, "user": user})

    @classmethod
    def set_fields(cls, run: Run, *expect: Expectation, **fields: Any) -> RunUpdate:
        """Set fields of the run, by dotted path; give what they must be now as `FieldIs`.

        Raises ValueError for those that make the run what it is (`OWN_FIELDS`).
        """
        return cls(run.id, expect, fields=fields)

    @classmethod
    def overwrite(cls, run: Run, *expect: Expectation, **fields: Any) -> RunUpdate:
        """Set any fields, also those in `OWN_FIELDS`: for an administrator, never for a handler."""
        return cls(run.id, expect, fields=fields, overwrites=True)


def _seen(run: Run, copy: Copy) -> CopyIs:
    """Return what finds a copy's entry, or several of the same files, while it is as it was seen.

    Old programs left several entries of one key: those of other files are not meant.
    """
    seen, same = copy.as_seen, [one for one in run.copies if one.key == copy.key]
    place = copy.having("location").fields if len(same) > 1 else {}
    return CopyIs(seen.key, {**seen.fields, **place})


def _check_names(of: str, fields: Mapping[str, Any], protected: Collection[str] = ()) -> None:
    """Refuse names that MongoDB does not take, or that would break what is protected."""
    for name in fields:
        if not is_path(name):
            raise ValueError(f"no field of {of} can be named {name!r}")
        if (top := name.partition(".")[0]) in protected:
            raise ValueError(
                f"{name!r} is no field to set: {top!r} makes {of} what it is. For copies there are "
                "add_copy, change_copy and remove_copy, for tags add_tag"
            )


def is_path(name: object) -> bool:
    """Return whether that is a field's name, or several with dots between, as MongoDB takes it."""
    if not isinstance(name, str) or "\0" in name:
        return False
    return all(part and not part.startswith("$") for part in name.split("."))


def _appended(update: RunUpdate, copy: Copy, name: str, values: Sequence[Any]) -> RunUpdate:
    """Append to a list in the copy's entry; what is no list there (an older version's) goes."""
    # `$push` onto what is no list would fail.
    there = copy.fields.get(name)
    if there is None or isinstance(there, list):
        return evolve(update, append={**update.append, name: values})
    assert update.change is not None
    which, fields = update.change
    return evolve(update, change=(which, {**fields, name: list(values)}))
