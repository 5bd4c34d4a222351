"""The language that selects runs: a value, its text, and which runs it means. Pure.

A `Selection` has the same conditions everywhere: as options of commands (``--lacks raw@chicago``),
and as the parameters of an address (``lacks=raw@chicago``). `Selection.read` and `Selection.texts`
are inverse to each other. `Selection.means` decides whether a run is selected;
`caxev.database.selections` turns a selection into queries that miss no such run.

Several values of one condition: of numbers, names, detectors and sources, one must apply; of tags
and copies (`has`, `lacks`), all. All conditions must apply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cached_property, lru_cache
from math import inf
from shlex import quote
from typing import Any, Final, NamedTuple, Self

from attrs import evolve, frozen

from caxev.core.entry import text as as_text
from caxev.core.model import TRANSFERRED, Copy, Run, field_of
from caxev.core.moments import (
    Moment,
    moment_at,
    read_length,
    read_moment,
    write_length,
    write_moment,
)

MOST: Final = 2**63 - 1
"""The largest number that MongoDB can hold."""
RAW: Final = "raw"
ANY: Final = "any"
"""In a pattern: a status of any kind."""


class SelectionError(ValueError):
    """A condition cannot be read. The message names the value, and shows how to write one."""


class NumberRange(NamedTuple):
    """The runs from one number to another, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        if self.last == MOST:
            return f"{self.first}-"
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


@frozen(kw_only=True)
class CopyPattern:
    """A condition on a copy: of that type, version and status, at that host; None: any.

    As a text: ``TYPE:VERSION@HOST=STATUS``, with any part left out. Without a status, a
    `transferred` copy is meant; ``=any`` means any.
    """

    type: str | None = None
    version: str | None = None
    host: str | None = None
    status: str | None = None

    @classmethod
    def read(cls, text: str) -> Self:
        """Return the pattern in a text. Raises `SelectionError`."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise SelectionError(f"{text!r} names no copy: write raw@lngs or processed:v6.8.0@lngs")
        parts = {name: value or None for name, value in match.groupdict().items()}
        status = parts.pop("status") or TRANSFERRED
        return cls(**parts, status=None if status == ANY else status)

    def __str__(self) -> str:
        parts = ((":", self.version), ("@", self.host), ("=", _status_text(self.status)))
        return (self.type or "") + "".join(sign + part for sign, part in parts if part)

    @property
    def is_empty(self) -> bool:
        """Whether every copy matches."""
        return self == CopyPattern()

    def means(self, copy: Copy) -> bool:
        """Return whether that copy matches."""
        return (
            self.type in (None, copy.type)
            and self.version in (None, copy.version)
            and self.host in (None, copy.host)
            and self.status in (None, copy.status)
        )

    def any_of(self, run: Run) -> bool:
        """Return whether a run has such a copy."""
        return any(map(self.means, run.copies))


_PATTERN: Final = re.compile(
    # A shell variable that is not set gives the empty text: that must not mean every good copy.
    r"(?!$)(?P<type>[^:@=]*)(?::(?P<version>[^@=]+))?(?:@(?P<host>[^=]+))?(?:=(?P<status>.+))?"
)


def _status_text(status: str | None) -> str | None:
    return ANY if status is None else None if status == TRANSFERRED else status


@frozen(kw_only=True)
class Selection:
    """The runs to which all of these conditions apply; without any, all runs.

    `since` (included) and `until` (excluded) are about the run's start. `copy` is about one copy
    that the run must have; `has` and `lacks` are about others. `fewer_than`: good copies of the
    data that `copy` names by type and version, else of raw data. With `unverified_for`, the copy
    of `copy` must be good, and not read and found right within that time before now.
    """

    numbers: tuple[NumberRange, ...] = ()
    names: tuple[str, ...] = ()
    """Globs: ``*`` stands for any text, ``?`` for one character; `glob_of` escapes a name."""
    detectors: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    """The source of the measurement: ``source.type`` of the run."""
    tags: tuple[str, ...] = ()
    not_tags: tuple[str, ...] = ()
    since: Moment | None = None
    until: Moment | None = None
    has: tuple[CopyPattern, ...] = ()
    lacks: tuple[CopyPattern, ...] = ()
    fewer_than: int | None = None
    unverified_for: timedelta | None = None
    copy: CopyPattern = CopyPattern()

    @classmethod
    def read(cls, given: Mapping[str, Sequence[str]]) -> Self:
        """Return the selection in texts, by the names of `CONDITIONS`. Raises `SelectionError`."""
        fields: dict[str, Any] = {}
        copy: dict[str, str] = {}
        for name, texts in given.items():
            if name in COPY_PARTS:
                # Such as of a shell variable that is not set: that must not mean any.
                if "" in texts:
                    raise SelectionError(f"{name} is empty: leave it out for any")
                if texts:
                    copy[name] = texts[-1]
            elif name in CONDITIONS:
                fields |= CONDITIONS[name].read_all(texts)
            else:
                known = ", ".join((*CONDITIONS, *COPY_PARTS))
                raise SelectionError(f"there is no condition {name!r} (known: {known})")
        return cls(**fields, copy=CopyPattern(**copy))

    def texts(self) -> dict[str, list[str]]:
        """Return the texts that `read` takes: the parameters of an address, values of options."""
        found = {name: one.write_all(self) for name, one in CONDITIONS.items()}
        found |= {name: [value] for name in COPY_PARTS if (value := getattr(self.copy, name))}
        return {name: texts for name, texts in found.items() if texts}

    def __str__(self) -> str:
        """Return the selection as options of a command."""
        pairs = ((name, one) for name, texts in self.texts().items() for one in texts)
        return " ".join(f"--{name} {quote(one)}" for name, one in pairs)

    @property
    def single_numbers(self) -> tuple[int, ...]:
        """The numbers that are named one by one."""
        return tuple(one.first for one in self.numbers if one.first == one.last)

    @property
    def at_most(self) -> float:
        """How many runs can be selected, as far as that shows; infinite if it does not."""
        return sum(last - first + 1 for first, last in self.numbers) or inf

    def with_copy(self, **parts: str | None) -> Self:
        """Return the selection with these parts of `copy`; None leaves a part as it is."""
        given = {name: value for name, value in parts.items() if value is not None}
        return evolve(self, copy=evolve(self.copy, **given))

    @property
    def counted(self) -> CopyPattern:
        """The good copies that `fewer_than` counts."""
        kind = self.copy.type or RAW
        return CopyPattern(type=kind, version=self.copy.version, status=TRANSFERRED)

    @cached_property
    def wanted(self) -> CopyPattern:
        """`copy`, which must be good if it must be unverified."""
        status = self.copy.status
        if self.unverified_for is not None and status is None:
            status = TRANSFERRED
        return evolve(self.copy, status=status)

    def means(self, run: Run, now: datetime) -> bool:
        """Return whether a run is selected."""
        return (
            self._means_name(run)
            and _within(run.start, self.since, self.until, now)
            and {*self.tags} <= {*run.tags}
            and {*self.not_tags}.isdisjoint(run.tags)
            and self._means_copies(run, now)
        )

    def _means_name(self, run: Run) -> bool:
        return (
            (not self.numbers or any(a <= (run.number or 0) <= b for a, b in self.numbers))
            and (not self.names or any(_glob(one).fullmatch(run.name) for one in self.names))
            and (not self.detectors or run.detector in self.detectors)
            and (not self.sources or source_of(run) in self.sources)
        )

    def _means_copies(self, run: Run, now: datetime) -> bool:
        return (
            all(one.any_of(run) for one in self.has)
            and not any(one.any_of(run) for one in self.lacks)
            and (self.fewer_than is None or len(good_hosts(run, self.counted)) < self.fewer_than)
            and (self.wanted.is_empty or any(self.means_copy(one, now) for one in run.copies))
        )

    def means_copy(self, copy: Copy, now: datetime) -> bool:
        """Return whether a copy of a selected run is one that `copy` is about."""
        if not self.wanted.means(copy):
            return False
        if self.unverified_for is None:
            return True
        read = copy.read_at
        return read is None or read < moment_at(self.unverified_for, now)


EVERY: Final = Selection()
"""All runs."""


def source_of(run: Run) -> str | None:
    """Return what was measured."""
    return as_text(field_of(run.document, "source.type"))


def good_hosts(run: Run, pattern: CopyPattern) -> frozenset[str]:
    """Return the hosts that have a copy like this."""
    # Hosts, not entries: old programs left several entries of one copy.
    return frozenset(copy.host for copy in run.copies if pattern.means(copy))


def _within(
    start: datetime | None, since: Moment | None, until: Moment | None, now: datetime
) -> bool:
    if since is None and until is None:
        return True
    if start is None:
        return False
    after = since is None or moment_at(since, now) <= start
    return after and (until is None or start < moment_at(until, now))


def glob_pattern(glob: str) -> str:
    """Return the regular expression of a glob, for Python and for MongoDB, without anchors."""
    return "".join(_SIGNS.get(one) or re.escape(one[-1]) for one in _SIGN.findall(glob))


def is_glob(glob: str) -> bool:
    """Return whether a glob stands for several names."""
    return not _SIGNS.keys().isdisjoint(_SIGN.findall(glob))


def glob_of(name: str) -> str:
    """Return the glob that stands for this name alone."""
    return re.sub(r"[*?\\]", r"\\\g<0>", name)


def name_of(glob: str) -> str:
    """Return the only name that a glob stands for, which is none of several."""
    return "".join(one[-1] for one in _SIGN.findall(glob))


def which(run: Run) -> str:
    """Return the options that name a run to another command."""
    return naming(run.number or None, glob_of(run.name), run.detector)


def naming(number: int | None, name: str | None, detector: str | None) -> str:
    """Return the options that name a run; without a number, its name (a glob) needs a detector."""
    if number is not None:
        return f"--run {number}"
    which_detector = f" --detector {quote(detector)}" if detector else ""
    return f"--name {quote(name or '')}{which_detector}"


_SIGNS: Final = {"*": ".*", "?": "."}
_SIGN: Final = re.compile(r"\\[*?\\]|.", re.DOTALL)


@lru_cache(maxsize=256)
def _glob(glob: str) -> re.Pattern[str]:
    return re.compile(glob_pattern(glob), re.DOTALL)


# -- reading and writing ---------------------------------------------------------------------------


def read_ranges(text: str) -> tuple[NumberRange, ...]:
    """Return the numbers in a text such as ``1-100,205,300-``. Raises `SelectionError`."""
    return tuple(map(_read_range, text.split(",")))


def _read_range(text: str) -> NumberRange:
    match = _RANGE.fullmatch(text.strip())
    first = int(match["first"]) if match else 0
    last = first if match is None or match["to"] is None else int(match["last"] or MOST)
    if not 1 <= first <= MOST or last > MOST:
        raise SelectionError(f"{text!r} is no run number: write 5, 1-100, 300- or 1-100,205")
    if first > last:
        raise SelectionError(f"{text!r}: {first} is after {last}")
    return NumberRange(first, last)


# ASCII: else `\d` takes the digits of any script. 19 of them are enough for `MOST`; Python refuses
# to read thousands.
_RANGE: Final = re.compile(r"(?P<first>\d{1,19})(?P<to>-(?P<last>\d{1,19})?)?", re.ASCII)


def _read_least(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text.strip(), re.ASCII):
        raise SelectionError(f"{text!r} is no number of copies: write 2")
    return int(text)


def _read_text(text: str) -> str:
    if not text:
        raise SelectionError("it is empty")
    return text


def _one(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: (read(text),)


@frozen
class Condition:
    """A condition of a `Selection`: its field, and how its values are read and written.

    `read` returns the values in one text. If not `many`, the condition has one value at most.
    """

    field: str
    read: Callable[[str], Sequence[Any]]
    write: Callable[[Any], str] = str
    many: bool = True

    def read_all(self, texts: Iterable[str]) -> dict[str, Any]:
        """Return the field with the values in these texts. Raises `SelectionError`."""
        try:
            found = [value for text in texts for value in self.read(text)]
        except SelectionError:
            raise
        except ValueError as error:
            raise SelectionError(str(error)) from None
        if self.many:
            return {self.field: tuple(dict.fromkeys(found))}
        return {self.field: found[-1]} if found else {}

    def write_all(self, selection: Selection) -> list[str]:
        """Return the texts of the field's values."""
        found = getattr(selection, self.field)
        return [self.write(one) for one in (found if self.many else (found,)) if one is not None]


COPY_PARTS: Final = ("host", "status", "type", "version")
"""The conditions on one copy: the parts of `Selection.copy`."""
CONDITIONS: Final = {
    "run": Condition("numbers", read_ranges),
    "name": Condition("names", _one(_read_text)),
    "detector": Condition("detectors", _one(_read_text)),
    "source": Condition("sources", _one(_read_text)),
    "tag": Condition("tags", _one(_read_text)),
    "not-tag": Condition("not_tags", _one(_read_text)),
    "since": Condition("since", _one(read_moment), write_moment, many=False),
    "until": Condition("until", _one(read_moment), write_moment, many=False),
    "has": Condition("has", _one(CopyPattern.read)),
    "lacks": Condition("lacks", _one(CopyPattern.read)),
    "fewer-than": Condition("fewer_than", _one(_read_least), many=False),
    "unverified-for": Condition("unverified_for", _one(read_length), write_length, many=False),
}
"""All other conditions, by their names."""


def at_host(host: str, status: str | None = None) -> Selection:
    """Return the selection of runs with a copy at a host, of that status."""
    return Selection(copy=CopyPattern(host=host, status=status))
