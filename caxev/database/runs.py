"""Run documents: which ones, what of them, and updates that happen only where they still fit."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from attrs import frozen

from caxev.core.model import (
    CHECKS_KEPT,
    NOTED,
    TRANSFERRED,
    TRANSFERRING,
    CopiesAtLeast,
    CopyAbsent,
    CopyIs,
    CopyKey,
    Expectation,
    FieldIs,
    Fresh,
    NobodyReads,
    RunUpdate,
    TagAbsent,
    TagThere,
    Watched,
)
from caxev.database.client import Document

GIVEN_UP_KEPT: Final = 20
"""Notes of copies that were given up that a run keeps, the latest."""

_LOOK_FIELDS: Final = (
    "tags.name",
    "data.type",
    "data.host",
    "data.pax_version",
    "data.status",
    "data.status_since",
)


def snapshot_projection(watched: Watched) -> Document:
    """Return what a look is made of; entries can be large and many, and this is all that counts."""
    copies = (f"data.{name}" for name in watched.copies)
    paths = [*_LOOK_FIELDS, *copies, *watched.run]
    # MongoDB takes no path beside one that it lies in.
    return {path: 1 for path in paths if not any(_within(path, other) for other in paths)}


def _within(path: str, other: str) -> bool:
    return path.startswith(other + ".")


@frozen
class Selection:
    """Which runs are meant: all conditions hold together; without any, all runs.

    `host`, `status` and `type` are of one copy that the run must have.
    """

    numbers: tuple[int, int] | None = None
    name: str | None = None
    tag: str | None = None
    detector: str | None = None
    last_days: float | None = None
    host: str | None = None
    status: str | None = None
    type: str | None = None

    @property
    def entry(self) -> Document:
        """Return what an entry of ``data`` must match that is meant."""
        wanted = {"host": self.host, "status": self.status, "type": self.type}
        return {name: {"$eq": value} for name, value in wanted.items() if value is not None}

    def query(self, now: datetime) -> Document:
        """Return the filter for MongoDB; `last_days` counts back from `now` (UTC)."""
        query: Document = {}
        if self.numbers is not None:
            query["number"] = {"$gte": self.numbers[0], "$lte": self.numbers[1]}
        if self.name is not None:
            query["name"] = {"$eq": self.name}
        if self.tag is not None:
            query["tags.name"] = {"$eq": self.tag}
        if self.detector is not None:
            query["detector"] = {"$eq": self.detector}
        if self.last_days is not None:
            query["start"] = {"$gte": now - timedelta(days=self.last_days), "$lte": now}
        if self.entry:
            query["data"] = {"$elemMatch": self.entry}
        return query


def totals_pipeline(selection: Selection, now: datetime) -> list[Document]:
    """Return the aggregation that counts copies, and their bytes as far as they are known.

    A raw copy's bytes are the run's ``raw_size_byte``, once the copy is whole.
    """
    entry = {f"data.{name}": condition for name, condition in selection.entry.items()}
    names = {"data.host": {"$type": "string"}, "data.type": {"$type": "string"}}
    of_the_run = {"$and": [{"$eq": ["$data.type", "raw"]}, {"$eq": ["$data.status", TRANSFERRED]}]}
    size = {
        "$switch": {
            "branches": [
                {"case": {"$isNumber": "$data.size"}, "then": "$data.size"},
                {
                    "case": {"$and": [of_the_run, {"$isNumber": "$raw_size_byte"}]},
                    "then": "$raw_size_byte",
                },
            ],
            "default": None,
        }
    }
    which = {"host": "$data.host", "type": "$data.type", "status": "$data.status"}
    known = {"$cond": [{"$isNumber": "$size"}, 1, 0]}
    return [
        {"$match": selection.query(now)},
        {"$project": {"raw_size_byte": 1, **dict.fromkeys(_COUNTED, 1)}},
        {"$unwind": "$data"},
        {"$match": {**names, **entry}},
        {"$project": {**which, "size": size}},
        {
            "$group": {
                "_id": {name: f"${name}" for name in which},
                "copies": {"$sum": 1},
                "sized": {"$sum": known},
                "bytes": {"$sum": "$size"},
            }
        },
        {"$sort": {"_id.host": 1, "_id.type": 1, "_id.status": 1}},
    ]


_COUNTED: Final = ("data.host", "data.type", "data.status", "data.size")


def key_filter(key: CopyKey, prefix: str = "") -> Document:
    """Return what an entry of ``data`` with this key matches. No version: no text, or empty."""
    return {
        prefix + "type": {"$eq": key.type},
        prefix + "host": {"$eq": key.host},
        prefix + "pax_version": _NO_TEXT if key.version is None else {"$eq": key.version},
    }


def _copy_filter(expected: CopyIs, prefix: str = "") -> Document:
    fields = {prefix + name: {"$eq": value} for name, value in expected.fields.items()}
    return {**key_filter(expected.key, prefix), **fields}


def _condition(expectation: Expectation) -> Document:
    match expectation:
        case CopyIs():
            return {"data": {"$elemMatch": _copy_filter(expectation)}}
        case CopyAbsent(key):
            return {"data": {"$not": {"$elemMatch": key_filter(key)}}}
        case FieldIs(path, value):
            return {path: {"$eq": value}}
        case TagAbsent(name):
            return {"tags.name": {"$ne": name}}
        case TagThere(name):
            return {"tags.name": name}
        case CopiesAtLeast():
            return _at_least(expectation)
        case NobodyReads(key, since):
            return _unread(key, since)


def _unread(key: CopyKey, since: datetime | None) -> Document:
    """As `NobodyReads.holds` says, in the database's language."""
    version = key_filter(key)["pax_version"]
    same = {"type": {"$eq": key.type}, "pax_version": version}
    copying = {**same, "source": {"$eq": key.host}}
    deriving = {
        "host": {"$eq": key.host},
        "job.input": {"$eq": key.type},
        "job.input_version": version,
    }
    # Of an old program: it names no source, so it may be this one.
    unnamed = {**same, "host": {"$ne": key.host}, "source": _NO_TEXT, "job": None}
    if since is not None:
        is_old = {"$type": "date", "$lte": since}
        unnamed["$nor"] = [{name: is_old} for name in ("status_since", "creation_time")]
    readers = ({"status": TRANSFERRING, **one} for one in (copying, deriving, unnamed))
    return {"$nor": [{"data": {"$elemMatch": one}} for one in readers]}


_NO_TEXT: Final = {"$not": {"$gt": ""}}
"""Matches what is no text, or an empty one."""


def _at_least(wanted: CopiesAtLeast) -> Document:
    """As `CopiesAtLeast.counts` says, in the database's language."""

    def text(name: str) -> Document:  # null where it is none
        value = f"$$copy.{name}"
        is_text = {"$and": [{"$eq": [{"$type": value}, "string"]}, {"$ne": [value, ""]}]}
        return {"$cond": [is_text, value, None]}

    conditions: list[Document] = [
        {"$eq": ["$$copy.type", {"$literal": wanted.key.type}]},
        {"$eq": [text("pax_version"), {"$literal": wanted.key.version}]},
        {"$ne": [text("host"), {"$literal": wanted.key.host}]},
        {"$ne": [text("host"), None]},
        {"$eq": ["$$copy.status", TRANSFERRED]},
    ]
    if wanted.hosts is not None:
        conditions.append({"$in": ["$$copy.host", {"$literal": sorted(wanted.hosts)}]})
        conditions += [
            {"$or": [{"$ne": ["$$copy.host", {"$literal": host}]}, _is_fresh(fresh)]}
            for host, fresh in sorted(wanted.hosts.items())
            if fresh is not None
        ]
    by_checksum: Document = {
        "$and": [
            {"$ne": [{"$literal": wanted.checksum}, None]},
            {"$eq": [text("checksum"), {"$literal": wanted.checksum}]},
        ]
    }
    if wanted.manifest is None:
        conditions.append(by_checksum)
    else:
        same = {"$eq": [text("manifest"), {"$literal": wanted.manifest}]}
        unknown = {"$and": [{"$eq": [text("manifest"), None]}, by_checksum]}
        conditions.append({"$or": [same, unknown]})
    entries = {"$cond": [{"$isArray": "$data"}, "$data", []]}
    good = {"$filter": {"input": entries, "as": "copy", "cond": {"$and": conditions}}}
    # Several entries of one host are one copy.
    hosts = {"$setUnion": [{"$map": {"input": good, "as": "copy", "in": "$$copy.host"}}, []]}
    return {"$expr": {"$gte": [{"$size": hosts}, wanted.number]}}


def _is_fresh(wanted: Fresh) -> Document:
    """As `Fresh.counts` says, in the database's language."""
    read, answers = "$$copy.verified_at", "$$copy.check_answered"
    listed = {"$cond": [{"$isArray": answers}, answers, []]}
    ways: list[Document] = [{"$in": [{"$literal": wanted.request}, listed]}]
    if wanted.since is not None:
        past = [] if wanted.until is None else [{"$lte": [read, wanted.until]}]
        noted = f"$$copy.{NOTED}"
        was_past = [{"$eq": [{"$type": noted}, "date"]}, {"$lte": [read, noted]}]
        ways.append({"$and": [{"$gte": [read, wanted.since]}, *past, *was_past]})
    return {"$and": [{"$eq": [{"$type": read}, "date"]}, {"$or": ways}]}


def write_of(update: RunUpdate, now: datetime) -> tuple[Document, Document, list[Document] | None]:
    """Return filter, update and array filters: the whole of a `RunUpdate` as one write.

    Whatever sets a status also sets its `status_since`, so that a status that went and came back
    is seen as a change; whatever sets `verified_at` also notes when that was.
    """
    query: Document = {"_id": update.run}
    if update.expect:
        query["$and"] = [_condition(expectation) for expectation in update.expect]
    change: Document = {}
    array_filters = None
    if update.add is not None:
        change["$push"] = {"data": _dated(update.add, now)}
    if update.remove is not None:
        change["$pull"] = {"data": _copy_filter(update.remove)}
    if update.change is not None:
        which, fields = update.change
        if fields:
            change["$set"] = {f"data.$[copy].{name}": v for name, v in _dated(fields, now).items()}
        for name, values in update.append.items():
            last = {"$each": list(values), "$slice": -CHECKS_KEPT}
            change.setdefault("$push", {})[f"data.$[copy].{name}"] = last
        array_filters = [_copy_filter(which, "copy.")]
    if added := _added_to_lists(update, now):
        change.setdefault("$push", {}).update(added)
    if update.fields:
        change.setdefault("$set", {}).update(update.fields)
    return query, change, array_filters


def _added_to_lists(update: RunUpdate, now: datetime) -> Document:
    """What goes to lists of the run, each row with its date."""
    rows = {"tags": update.tag, "deleted_data": update.tombstone, "given_up": update.given_up}
    last = {"given_up": {"$slice": -GIVEN_UP_KEPT}}
    return {
        name: {"$each": [{"date": now, **row}], **last.get(name, {})}
        for name, row in rows.items()
        if row is not None
    }


def _dated(fields: Mapping[str, Any], now: datetime) -> Document:
    dated = {"status": "status_since", "verified_at": NOTED}
    return {**fields, **{name: now for of, name in dated.items() if of in fields}}
