"""Documents of caxev's own collections, read with care: a person or a fault may have changed them.

A `Row` returns a document's fields by type. A value that does not fit raises `Malformed`, which
names the field; `quarantine` skips such a document and keeps it in mind, for the site's listener to
report it and to set it aside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from math import isfinite
from typing import Any, Final, TypeVar

from attrs import frozen

from caxev.core.alarms import Alarm, AlarmState, Delivery, Severity
from caxev.core.ledger import Reaction, State, aspect_from
from caxev.core.model import Aspect, Event, RunId
from caxev.core.packing import unpack

T = TypeVar("T")

# Times far outside overflow once something is added to them.
_YEARS: Final = range(1970, 3000)
_LARGEST: Final = 2**62
_LONGEST: Final = 60  # characters of a value that are shown


class Malformed(ValueError):
    """A document is not as caxev writes it. The message names the field and its value."""


@frozen
class Row:
    """A document, or a part of one, whose fields are read by type.

    Each method raises `Malformed` if the field is something else. `None` as `default` allows a
    field that is missing or null; without a default it must be there.
    """

    document: Mapping[str, Any]

    @classmethod
    def of(cls, value: object) -> Row:
        """Return a part of a document as a row."""
        if not isinstance(value, Mapping):
            raise Malformed(f"{_shown(value)} is not an object")
        return cls(value)

    def _get(self, name: str, what: str, fits: Callable[[Any], bool], default: Any) -> Any:
        value = self.document.get(name)
        if value is None and default is not _NEEDED:
            return default
        if name not in self.document:
            raise Malformed(f"{name} is missing")
        if not fits(value):
            raise Malformed(f"{name} is {_shown(value)}, not {what}")
        return value

    def text(self, name: str, default: Any = ...) -> Any:
        """Return a text."""
        return self._get(name, "a text", lambda value: type(value) is str, default)

    def whole(self, name: str, default: Any = ...) -> Any:
        """Return a whole number; the shell writes 3 as 3.0."""
        value = self._get(name, "a whole number", _is_whole, default)
        return value if value is default else int(value)

    def number(self, name: str, default: Any = ...) -> Any:
        """Return a number, as a float."""
        value = self._get(name, "a number", _is_number, default)
        return value if value is default else float(value)

    def moment(self, name: str, default: Any = ...) -> Any:
        """Return a time, UTC."""
        return self._get(name, "a date", _is_moment, default)

    def flag(self, name: str, default: Any = ...) -> Any:
        """Return true or false."""
        return self._get(name, "true or false", lambda value: isinstance(value, bool), default)

    def many(self, name: str, default: Any = ...) -> Any:
        """Return a list."""
        return self._get(name, "a list", lambda value: isinstance(value, list), default)

    def runs(self, name: str) -> tuple[RunId, ...] | None:
        """Return a list of runs' ids; None if there is none."""
        found = self.many(name, None)
        if found is not None and not all(is_plain(run) for run in found):
            raise Malformed(f"{name} has an item that is no run's id")
        return None if found is None else tuple(found)

    def run(self, name: str) -> RunId:
        """Return a run's id."""
        return self._get(name, "a run's id", lambda v: v is not None and is_plain(v), _NEEDED)


_NEEDED: Final = ...


def _is_whole(value: object) -> bool:
    # The shell writes 3 as 3.0, and a bool is an int to Python.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_LARGEST < value < _LARGEST and value == int(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_moment(value: object) -> bool:
    return isinstance(value, datetime) and value.tzinfo is not None and value.year in _YEARS


def is_plain(value: object) -> bool:
    """Return whether this can be a key of ours, as a document or a list cannot."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def carefully(read: Callable[[Any], T], document: object) -> T:
    """Read a document. Raises `Malformed` for any fault in it."""
    try:
        return read(document)
    except Malformed:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Malformed(f"it cannot be read: {type(error).__name__}: {error}") from error


def texts(values: object) -> list[str]:
    """Return a list of texts. Raises `Malformed`."""
    # No subclass of str: BSON's code is one that cannot be hashed.
    if not isinstance(values, list) or not all(type(one) is str for one in values):
        raise Malformed(f"{_shown(values)} is not a list of texts")
    return values


def reaction_from(document: Mapping[str, Any]) -> Reaction:
    """Return the reaction that a ledger document holds."""
    row = Row.of(document)
    run, aspect = row.run("run"), aspect_from(document.get("aspect"))
    reaction = Reaction(
        site=row.text("site"),
        event=Event(run, aspect, row.text("before", None), row.text("after", None)),
        handler=row.text("handler"),
        lane=row.text("lane"),
        generation=row.whole("generation"),
        at=row.moment("at"),
        due=row.moment("due"),
        state=State(row.text("state")),
        epoch=row.whole("epoch", None),
        attempts=row.whole("attempts", 0),
        interrupted=row.whole("interrupted", 0),
        note=row.text("note", ""),
        started=row.moment("started", None),
        priority=row.whole("priority", 0),
        hindered=row.moment("hindered", None),
        root=row.text("root", ""),
    )
    if reaction.epoch is None and ("epoch" in document or reaction.state is State.RUNNING):
        raise Malformed("epoch is missing")  # no process could free it, or claim it
    if document.get("_id") != reaction.id:  # no write to it would find it
        raise Malformed(f"its _id is not {reaction.id}")
    return reaction


def snapshot_from(document: Mapping[str, Any]) -> dict[Aspect, str]:
    """Return what a site last saw of a run."""
    packed = document.get("seen")
    if not isinstance(packed, bytes):
        raise Malformed(f"seen is {_shown(packed)}, not packed")
    return unpack(packed)


def alarm_state_from(document: Mapping[str, Any]) -> AlarmState:
    """Return the alarm that `alarms.alarm_row` made a row of."""
    row = Row.of(document)
    details = dict(texts(pair) for pair in row.many("details"))
    alarm = Alarm(
        row.text("site"),
        row.text("key"),
        row.text("summary"),
        Severity(row.text("severity")),
        row.text("run"),
        details,
        row.flag("once"),
        row.run("run_id") if "run_id" in document else None,
    )
    if document.get("_id") != {"alarm": alarm.key, "s": alarm.site}:
        raise Malformed("its _id is that of another alarm")
    deliveries = {one.text("sink"): _delivery(one) for one in map(Row.of, row.many("deliveries"))}
    return AlarmState(alarm, row.moment("since"), row.moment("over", None), deliveries)


def _delivery(row: Row) -> Delivery:
    return Delivery(
        row.moment("raised", None),
        row.flag("over"),
        row.whole("tries"),
        row.moment("due", None),
        row.text("why"),
    )


def items_from(digest: str, parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the items of a manifest from its parts, which must have its digest."""
    from caxev.files import Manifest  # few commands need it, and all wait for what it imports

    items = [dict(Row.of(item).document) for part in parts for item in Row.of(part).many("items")]
    # Files that were compared with Rucio are kept under a manifest's digest, which is not that of
    # these rows.
    if not digest.startswith("catalogue:") and Manifest.from_rows(items).digest != digest:
        raise Malformed("its items do not match its digest")
    return items
