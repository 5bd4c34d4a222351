"""Run documents in MongoDB's language: updates with their conditions.

A `RunUpdate` becomes one write whose filter holds all that it expects, so that it happens only if
the run is still as its author saw it. Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from caxev.core.entry import NOTED
from caxev.core.model import (
    CHANGED,
    ENTRY_FIELDS,
    TRANSFERRED,
    TRANSFERRING,
    CopyIs,
    CopyKey,
    Watched,
)
from caxev.core.update import (
    CHECKS_KEPT,
    CopiesAtLeast,
    CopyAbsent,
    Expectation,
    FieldIs,
    Fresh,
    NobodyReads,
    RunUpdate,
    TagAbsent,
    TagThere,
)
from caxev.database.client import Document

GIVEN_UP_KEPT: Final = 20
"""Notes of copies that were given up that a run keeps, the latest."""

_SNAPSHOT_FIELDS: Final = (
    *("tags.name", "tags.date"),
    *(f"data.{name}" for name in (*ENTRY_FIELDS, NOTED)),
)


def snapshot_projection(watched: Watched) -> Document:
    """Return the fields that a snapshot is made of: whole entries can be large and many."""
    copies = (f"data.{name}" for name in watched.copies)
    paths = [*_SNAPSHOT_FIELDS, *copies, *watched.run]
    # MongoDB refuses a path together with one that it lies in.
    return {path: 1 for path in paths if not any(path.startswith(f"{one}.") for one in paths)}


def key_filter(key: CopyKey, prefix: str = "") -> Document:
    """Return the filter for entries of ``data`` with this key.

    Without a version it matches an entry whose version is empty or no text, as cax wrote them.
    """
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
    """Return the filter that agrees with `NobodyReads.holds`."""
    version = key_filter(key)["pax_version"]
    same = {"type": {"$eq": key.type}, "pax_version": version}
    copying = {**same, "source": {"$eq": key.host}}
    deriving = {
        "host": {"$eq": key.host},
        "job.input": {"$eq": key.type},
        "job.input_version": version,
    }
    # A copy that cax makes names no source, so this may be the one it reads.
    unnamed = {**same, "host": {"$ne": key.host}, "source": _NO_TEXT, "job": None}
    if since is not None:
        is_old = {"$type": "date", "$lte": since}
        unnamed["$nor"] = [{name: is_old} for name in ("status_since", "creation_time")]
    readers = ({"status": TRANSFERRING, **one} for one in (copying, deriving, unnamed))
    return {"$nor": [{"data": {"$elemMatch": one}} for one in readers]}


_NO_TEXT: Final = {"$not": {"$gt": ""}}
"""Matches a value that is no text, or an empty one."""


def _at_least(wanted: CopiesAtLeast) -> Document:
    """Return the filter that agrees with `CopiesAtLeast.counts`."""
    conditions: list[Document] = [
        {"$eq": ["$$copy.type", {"$literal": wanted.key.type}]},
        {"$eq": [text_of("pax_version"), {"$literal": wanted.key.version}]},
        {"$ne": [text_of("host"), {"$literal": wanted.key.host}]},
        {"$ne": [text_of("host"), None]},
        {"$eq": ["$$copy.status", TRANSFERRED]},
    ]
    if wanted.hosts is not None:
        conditions.append({"$in": ["$$copy.host", {"$literal": sorted(wanted.hosts)}]})
        conditions += [
            {"$or": [{"$ne": ["$$copy.host", {"$literal": host}]}, _is_fresh(fresh)]}
            for host, fresh in sorted(wanted.hosts.items())
            if fresh is not None
        ]
    conditions.append(_same_content(wanted))
    # cax, or a person, may have written anything: a run without a list has no copies.
    entries = {"$cond": [{"$isArray": "$data"}, "$data", []]}
    good = {"$filter": {"input": entries, "as": "copy", "cond": {"$and": conditions}}}
    # Several entries of one host count once: they may be the same files.
    hosts = {"$setUnion": [{"$map": {"input": good, "as": "copy", "in": "$$copy.host"}}, []]}
    return {"$expr": {"$gte": [{"$size": hosts}, wanted.number]}}


def _same_content(wanted: CopiesAtLeast) -> Document:
    """Match copies with the wanted manifest; without one, those with the wanted checksum."""
    by_checksum: Document = {
        "$and": [
            {"$ne": [{"$literal": wanted.checksum}, None]},
            {"$eq": [text_of("checksum"), {"$literal": wanted.checksum}]},
        ]
    }
    if wanted.manifest is None:
        return by_checksum
    same = {"$eq": [text_of("manifest"), {"$literal": wanted.manifest}]}
    unknown = {"$and": [{"$eq": [text_of("manifest"), None]}, by_checksum]}
    return {"$or": [same, unknown]}


def text_of(name: str) -> Document:
    """Return an expression for a field of a copy, null if it is empty or no text."""
    value = f"$$copy.{name}"
    is_text = {"$and": [{"$eq": [{"$type": value}, "string"]}, {"$ne": [value, ""]}]}
    return {"$cond": [is_text, value, None]}


def _is_fresh(wanted: Fresh) -> Document:
    """Return the expression that agrees with `Fresh.counts`."""
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
    """Return filter, update and array filters: the whole of a `RunUpdate` as one write."""
    query: Document = {"_id": update.run}
    if update.expect:
        query["$and"] = [_condition(expectation) for expectation in update.expect]
    # MongoDB takes each operator once: what several parts of the update push or set is collected.
    change: Document = {}
    array_filters = None
    if update.add is not None:
        change["$push"] = {"data": _dated(update.add, now)}
    if removed := _removed_from_lists(update):
        change["$pull"] = removed
    if update.change is not None:
        which, fields = update.change
        if fields:
            change["$set"] = {f"data.$[copy].{name}": v for name, v in _dated(fields, now).items()}
        for name, values in update.append.items():
            last = {"$each": list(values), "$slice": -CHECKS_KEPT}
            change.setdefault("$push", {})[f"data.$[copy].{name}"] = last
        array_filters = [_copy_filter(which, "copy.")]
        if "status" in fields:
            marked = {"host": which.key.host, "status": fields["status"], "at": now}
            change["$set"][CHANGED] = marked
    if added := _added_to_lists(update, now):
        change.setdefault("$push", {}).update(added)
    if update.fields:
        change.setdefault("$set", {}).update(update.fields)
    # One that changes nothing still shows whether the run is as expected. PyMongo refuses {}, and
    # MongoDB a filter that is not used.
    return query, change or {"$set": {}}, array_filters if change else None


def _removed_from_lists(update: RunUpdate) -> Document:
    """Return filters for what is taken out of lists of the run."""
    removed = {} if update.remove is None else {"data": _copy_filter(update.remove)}
    return removed if update.untag is None else {**removed, "tags": {"name": {"$eq": update.untag}}}


def _added_to_lists(update: RunUpdate, now: datetime) -> Document:
    """Return the rows that are added to lists of the run, each with its date."""
    rows = {
        "tags": update.tag,
        "comments": update.comment,
        "deleted_data": update.tombstone,
        "given_up": update.given_up,
    }
    last = {"given_up": {"$slice": -GIVEN_UP_KEPT}}
    return {
        name: {"$each": [{"date": now, **row}], **last.get(name, {})}
        for name, row in rows.items()
        if row is not None
    }


def _dated(fields: Mapping[str, Any], now: datetime) -> Document:
    # A status that went and came back between two snapshots shows by its date. The times of
    # verifications come from other clocks, so when they were noted is kept as well.
    dated = {"status": "status_since", "verified_at": NOTED}
    return {**fields, **{name: now for of, name in dated.items() if of in fields}}
