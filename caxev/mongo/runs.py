"""Run documents: which ones, what of them, and updates that happen only where they still fit."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from attrs import frozen

from caxev.model import (
    CopyAbsent,
    CopyIs,
    CopyKey,
    Expectation,
    FieldIs,
    RunUpdate,
    TagAbsent,
)
from caxev.mongo.client import Document

LOOK_FIELDS: Final = (
    "tags.name",
    "data.type",
    "data.host",
    "data.pax_version",
    "data.status",
    "data.status_since",
)
"""What a look is made of; `data` entries can be large and many, and this is all matching needs."""

LOOK_PROJECTION: Final = dict.fromkeys(LOOK_FIELDS, 1)


@frozen
class Selection:
    """Which runs are meant: all conditions hold together; without any, all runs."""

    numbers: tuple[int, int] | None = None
    name: str | None = None
    tag: str | None = None
    detector: str | None = None
    last_days: float | None = None

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
            query["start"] = {"$gte": now - timedelta(days=self.last_days)}
        return query


def key_filter(key: CopyKey, prefix: str = "") -> Document:
    """Return what an entry of ``data`` with this key matches. No version: no text, or empty."""
    return {
        prefix + "type": {"$eq": key.type},
        prefix + "host": {"$eq": key.host},
        prefix + "pax_version": {"$not": {"$gt": ""}}
        if key.version is None
        else {"$eq": key.version},
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


def write_of(update: RunUpdate, now: datetime) -> tuple[Document, Document, list[Document] | None]:
    """Return filter, update and array filters: the whole of a `RunUpdate` as one write.

    Whatever sets a status also sets its `status_since`, so that a status that went and came back
    is seen as a change.
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
        change["$set"] = {f"data.$[copy].{name}": v for name, v in _dated(fields, now).items()}
        array_filters = [_copy_filter(which, "copy.")]
    if update.tag is not None:
        change.setdefault("$push", {})["tags"] = {"date": now, **update.tag}
    if update.fields:
        change.setdefault("$set", {}).update(update.fields)
    return query, change, array_filters


def _dated(fields: Mapping[str, Any], now: datetime) -> Document:
    return {**fields, "status_since": now} if "status" in fields else dict(fields)
