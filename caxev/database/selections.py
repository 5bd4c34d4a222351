"""Selections of runs in MongoDB's language: queries, indexes to read them by, and counts. Pure.

A query may match runs that a selection does not mean, but never misses one, whatever old programs
and people wrote into the documents: `Selection.means` decides. If all documents are as caxev and
cax write them, it matches exactly those that are selected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from math import inf
from typing import Any, Final

from attrs import Factory, evolve, frozen
from bson.max_key import MaxKey
from bson.min_key import MinKey
from bson.regex import Regex

from caxev.core.entry import NOTED
from caxev.core.model import TRANSFERRED, UNKNOWN
from caxev.core.moments import moment_at
from caxev.core.selection import (
    MOST,
    CopyPattern,
    NumberRange,
    Selection,
    glob_pattern,
    is_glob,
    name_of,
)
from caxev.database import indexes
from caxev.database.client import Document
from caxev.database.indexes import Order
from caxev.database.runs import text_of

BY_ID: Final[Order] = (("_id", 1),)
"""The index that every collection has."""
_STRICT: Final = {"$not": {"$type": "array"}}
"""Refuses a list that holds the value: it is no text to us."""


# -- queries --------------------------------------------------------------------------------------


def query_of(selection: Selection, now: datetime) -> Document:
    """Return the filter for MongoDB; times count back from `now` (UTC)."""
    conditions = [
        *_names(selection),
        *_start(selection, now),
        *({"tags.name": {"$eq": one}} for one in selection.tags),
        *({"tags": {"$not": {"$elemMatch": {"name": _is(one)}}}} for one in selection.not_tags),
        *_copies(selection, now),
    ]
    return {"$and": conditions} if conditions else {}


def _names(selection: Selection) -> Iterator[Document]:
    if selection.numbers:
        yield {"$or": [{"number": {"$gte": o.first, "$lte": o.last}} for o in selection.numbers]}
    if selection.names:
        yield {"$or": [_named(one) for one in selection.names]}
    if selection.detectors:
        yield {"detector": {"$in": list(selection.detectors)}}
    if selection.sources:
        yield {"source.type": {"$in": list(selection.sources)}}


def _named(name: str) -> Document:
    if not is_glob(name):
        return {"name": {"$eq": name_of(name)}}
    # A regular expression cannot hold a NUL: the part before it selects more.
    plain, nul, _ = name.partition("\0")
    pattern = Regex(f"^{glob_pattern(plain)}{'' if nul else '$'}", "s")
    # A run without a name has an empty one.
    bare = [] if name.strip("*") else [{"name": {"$not": {"$gt": ""}}}, {"name": _LIST}]
    return {"$or": [{"name": pattern}, *bare]}


_LIST: Final = {"$type": "array"}


def _start(selection: Selection, now: datetime) -> Iterator[Document]:
    if selection.since is not None:
        yield {"start": {"$gte": moment_at(selection.since, now)}}
    if selection.until is not None:
        yield {"start": {"$lt": moment_at(selection.until, now)}}


def _copies(selection: Selection, now: datetime) -> Iterator[Document]:
    wanted, least = selection.wanted, selection.fewer_than
    for one in (*selection.has, *(() if wanted.is_empty else (wanted,))):
        yield {"data": {"$elemMatch": entry_filter(one)}}
    for one in selection.lacks:
        # An entry without a status is `unknown` to us: nothing that a filter could rule out.
        if one.status != UNKNOWN:
            yield {"data": {"$not": {"$elemMatch": _strict_filter(one)}}}
    if least is not None:
        yield _fewer(selection.counted, least)
    if selection.unverified_for is not None:
        yield _unverified(wanted, moment_at(selection.unverified_for, now))


def _is(value: str) -> Document:
    return {"$eq": value, **_STRICT}


def _parts(pattern: CopyPattern) -> dict[str, str]:
    """Return the fields of an entry that a pattern names."""
    status = None if pattern.status == UNKNOWN else pattern.status
    parts = {
        "host": pattern.host,
        "status": status,
        "type": pattern.type,
        "pax_version": pattern.version,
    }
    return {name: value for name, value in parts.items() if value is not None}


def entry_filter(pattern: CopyPattern) -> Document:
    """Return the filter for entries of ``data`` that may be such a copy."""
    return {name: {"$eq": value} for name, value in _parts(pattern).items()}


def _strict_filter(pattern: CopyPattern) -> Document:
    """Return the filter for entries that certainly are such a copy."""
    some = {"$gt": "", **_STRICT}  # what names no type or host is no copy
    exact = {name: _is(value) for name, value in _parts(pattern).items()}
    return {"type": some, "host": some, **exact}


def _equals(pattern: CopyPattern) -> list[Document]:
    """Return expressions that are true for an entry ``$$copy`` that is such a copy."""
    parts = _parts(pattern).items()
    return [{"$eq": [text_of(name), {"$literal": value}]} for name, value in parts]


def _entries(conditions: Iterable[Document]) -> Document:
    """Return an expression: the entries for which all conditions hold."""
    # cax, or a person, may have written anything: a run without a list has no copies.
    entries = {"$cond": [{"$isArray": "$data"}, "$data", []]}
    some = [{"$ne": [text_of(name), None]} for name in ("type", "host")]
    return {"$filter": {"input": entries, "as": "copy", "cond": {"$and": [*some, *conditions]}}}


def _fewer(pattern: CopyPattern, number: int) -> Document:
    good = _entries(_equals(pattern))
    hosts = {"$setUnion": [{"$map": {"input": good, "as": "copy", "in": "$$copy.host"}}, []]}
    return {"$expr": {"$lt": [{"$size": hosts}, number]}}


def _unverified(pattern: CopyPattern, limit: datetime) -> Document:
    read, noted = "$$copy.verified_at", f"$$copy.{NOTED}"
    is_fresh = {
        "$and": [
            {"$eq": [{"$type": read}, "date"]},
            {"$eq": [{"$type": noted}, "date"]},
            {"$lte": [read, noted]},
            {"$gte": [read, limit]},
        ]
    }
    stale = _entries([*_equals(pattern), {"$not": [is_fresh]}])
    return {"$expr": {"$gt": [{"$size": stale}, 0]}}


# -- reading by an index --------------------------------------------------------------------------


@frozen
class Scan:
    """A part of an index, from the bound `low` to the bound `high`, which is excluded.

    Each bound has a value for each key, the id last; empty: no bound. `only` is the filter that
    selects the same runs without the index. `ranges` if the key before the id has several values;
    else the runs come in the order of their ids. `begun` if `low` or `high` is where a page ended.
    """

    keys: Order
    low: tuple[Any, ...] = ()
    high: tuple[Any, ...] = ()
    only: Document = Factory(dict)
    ranges: bool = False
    begun: bool = False

    @property
    def by_id(self) -> Scan | None:
        """The same runs by the index of ids; None if that has another order than what was read."""
        if self.keys == BY_ID or (self.ranges and self.begun):
            return None
        if self.ranges:
            return Scan(BY_ID, only=self.only)
        return Scan(BY_ID, self.low[-1:], self.high[-1:], self.only)

    def after(self, document: Document, *, newest_first: bool) -> Scan:
        """Return what is left: from this run on, or with the newest first, behind it."""
        bounds = self.high if newest_first else self.low
        values = (document[self.keys[0][0]],) if self.ranges else bounds[:-1]
        position = (*values, document["_id"])
        if newest_first:
            return evolve(self, high=position, begun=True)
        return evolve(self, low=position, begun=True)


ALL: Final = Scan(BY_ID)


def scans_of(selection: Selection) -> list[Scan]:
    """Return the parts of an index that hold all selected runs, none twice, in its order."""
    numbers = _disjoint(selection.numbers)
    if numbers and numbers[-1].last != MOST:
        return [_by_number(one) for one in numbers]
    names, prefix = {*selection.names}, _prefix(selection.names)
    if names and not any(map(is_glob, names)):
        return [_with_name(name) for name in sorted(set(map(name_of, names)))]
    if selection.tags:
        return [_equal(indexes.TAG.keys, selection.tags[0])]
    if prefix is not None:
        return [_with_prefix(*prefix)]
    if (by_copy := _by_copy(selection)) is not None:
        return [by_copy]
    return [_by_number(one) for one in numbers] or [ALL]


def query_beside(selection: Selection, scans: Sequence[Scan], now: datetime) -> Document:
    """Return `query_of` without numbers and names, which each scan adds.

    There may be thousands of scans, and each would filter by the numbers of all.
    """
    keys = scans[0].keys
    if keys == indexes.NUMBER.keys:
        selection = evolve(selection, numbers=())
    if keys == indexes.NAME.keys and not any(map(is_glob, selection.names)):
        selection = evolve(selection, names=())
    return query_of(selection, now)


def _by_copy(selection: Selection) -> Scan | None:
    """Return the part of an index for a copy that runs must have, if it has a host or status."""
    for pattern in (selection.wanted, *selection.has):
        parts = _parts(pattern)
        host, status = parts.get("host"), parts.get("status")
        if host is not None and status is not None:
            return _equal(indexes.HOST_AND_STATUS.keys, host, status)
        if host is not None:
            return _equal(indexes.HOST.keys, host)
        if status is not None:
            return _equal(indexes.STATUS.keys, status)
    return None


def _equal(keys: Order, *values: str) -> Scan:
    return Scan(keys, (*values, MinKey()), (*values, MaxKey()))


def _by_number(numbers: NumberRange) -> Scan:
    first, last = numbers
    only = {"number": {"$gte": first, "$lte": last, **_STRICT}}
    return Scan(
        indexes.NUMBER.keys, (first, MinKey()), (last, MaxKey()), only, ranges=first != last
    )


def _disjoint(ranges: Iterable[NumberRange]) -> list[NumberRange]:
    """Return ranges of the same numbers in their order, none of which touches another."""
    found: list[NumberRange] = []
    for one in sorted(ranges):
        if found and one.first <= found[-1].last + 1:
            found[-1] = NumberRange(found[-1].first, max(found[-1].last, one.last))
        else:
            found.append(one)
    return found


def _prefix(names: Sequence[str]) -> tuple[str, str] | None:
    """Return with what the only glob begins, and the first text behind; None if there is none."""
    if len(names) != 1:
        return None
    prefix = re.split(r"[*?\\]", names[0], maxsplit=1)[0]
    after = _after(prefix)
    return None if after is None else (prefix, after)


def _with_prefix(prefix: str, after: str) -> Scan:
    only = {"name": {"$gte": prefix, "$lt": after, **_STRICT}}
    return Scan(indexes.NAME.keys, (prefix, MinKey()), (after, MinKey()), only, ranges=True)


def _with_name(name: str) -> Scan:
    scan = _equal(indexes.NAME.keys, name)
    return evolve(scan, only={"name": _is(name)})


_SURROGATES: Final = range(0xD800, 0xE000)


def _after(prefix: str) -> str | None:
    """Return the first text behind all that begin with this prefix; None if there is none."""
    code = ord(prefix[-1]) + 1 if prefix else 0
    if code in _SURROGATES:
        code = _SURROGATES.stop
    return None if not 0 < code <= 0x10FFFF else prefix[:-1] + chr(code)  # noqa: PLR2004


# -- counting -------------------------------------------------------------------------------------


def totals_pipeline(selection: Selection, now: datetime) -> list[Document]:
    """Return the aggregation that counts copies, and their bytes if they are known.

    A raw copy's bytes are the run's ``raw_size_byte``, once the copy is whole.
    """
    conditions = entry_filter(selection.wanted).items()
    entry = {f"data.{name}": condition for name, condition in conditions}
    names = {f"_id.{name}": {"$type": "string"} for name in ("host", "type")}
    which = {"host": "$data.host", "type": "$data.type", "status": "$data.status"}
    sizes = {"own": _is_amount("$data.size"), "whole": _is_amount("$raw_size_byte")}
    amounts = {"own": {"$sum": "$data.size"}, "whole": {"$sum": "$raw_size_byte"}}
    return [
        {"$match": query_of(selection, now)},
        {"$project": {"_id": 0, "raw_size_byte": 1, **dict.fromkeys(_COUNTED, 1)}},
        {"$unwind": "$data"},
        *([{"$match": entry}] if entry else []),
        # Millions of copies become few groups here, and whatever can wait is done with these.
        {"$group": {"_id": {**which, **sizes}, "copies": {"$sum": 1}, **amounts}},
        {"$match": names},
        {
            "$group": {
                "_id": {name: or_null(f"$_id.{name}") for name in which},
                "copies": {"$sum": "$copies"},
                "sized": {"$sum": _of_known("$copies", "$copies")},
                "bytes": {"$sum": _of_known("$own", "$whole")},
            }
        },
        {"$sort": {"_id.host": 1, "_id.type": 1, "_id.status": 1}},
    ]


def or_null(path: str) -> Document:
    """Return an expression for a field of a group's key: without it, one that is missing goes."""
    return {"$ifNull": [path, None]}


def _is_amount(path: str) -> Document:
    """Return an expression: a field is a finite number of at least 0."""
    # NaN comes before all numbers, and what is no number after them, or before NaN. A sum with one
    # such size would be NaN itself.
    return {"$and": [{"$gte": [path, 0]}, {"$lt": [path, inf]}]}


def _of_known(own: str, whole: str) -> Document:
    """Return an expression for a group: of entries with a size, of whole raw data, else null."""
    is_whole = [
        {"$eq": ["$_id.type", "raw"]},
        {"$eq": ["$_id.status", TRANSFERRED]},
        "$_id.whole",
    ]
    branches = [{"case": "$_id.own", "then": own}, {"case": {"$and": is_whole}, "then": whole}]
    return {"$switch": {"branches": branches, "default": None}}


_COUNTED: Final = ("data.host", "data.type", "data.status", "data.size", "data.pax_version")
