"""An entry comes out as it went in, and every field has its type, whatever the document holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from datetime import datetime
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st

from caxev.core import entry
from caxev.core.entry import (
    BatchJob,
    Entry,
    EntryField,
    JobResult,
    Record,
    SetAside,
    Withdrawn,
    anything,
)
from caxev.core.model import Copy, CopyKey, FormerCopy, Run
from caxev.core.update import RunUpdate
from tests import strategies as make

KINDS: tuple[type[Record], ...] = (Entry, BatchJob, JobResult, SetAside, Withdrawn, FormerCopy)


def schema(kind: type[Record]) -> Iterator[tuple[str, EntryField[Any]]]:
    for name in dir(kind):
        if isinstance(found := getattr(kind, name), EntryField):
            yield name, found


KEYS = sorted({field.name for kind in KINDS for _, field in schema(kind)} | {"check_answered"})
FREE = sorted({*KEYS} - {"type", "host", "status"})
"""Those that do not say which entry it is."""
objects = st.dictionaries(st.sampled_from(KEYS) | make.texts, make.values, max_size=12)
"""Objects of which any field may hold anything."""
hostile = st.dictionaries(st.sampled_from(KEYS) | make.texts, make.values | objects, max_size=20)
"""The same, with objects in them, as an entry has them."""


TYPES: dict[Any, Any] = {
    bool: bool,
    **dict.fromkeys((entry.text, entry.words, entry.location, entry.sha512), str | None),
    **dict.fromkeys((entry.as_utc, entry.moment), datetime | None),
    entry.count: int | None,
    entry.mapping: Mapping | None,
    **dict.fromkeys((entry.texts, entry.rows, entry.checks, entry.holds), tuple),
}
"""What each reader returns; the others return an object, or anything."""


@make.few
@given(hostile)
def test_whatever_a_field_holds_it_reads_as_its_type(fields: dict[str, Any]) -> None:
    """Nothing raises; what is not of the field's type is absent."""
    for kind in KINDS:
        row = kind(fields)
        for name, field in schema(kind):
            value = getattr(row, name)
            assert isinstance(value, TYPES.get(field.read, object)), (kind, name)
            if isinstance(value, Record):
                assert value.fields is fields[field.name]
            if isinstance(value, datetime) and field.read is not anything:
                assert value.tzinfo is not None


@make.few
@given(hostile, make.keys, make.statuses)
def test_an_entry_comes_out_as_it_went_in(
    fields: dict[str, Any], key: CopyKey, status: str
) -> None:
    """With every key that we do not know, and reading changes nothing."""
    there = {**fields, "type": key.type, "host": key.host, "status": status}
    there.pop("pax_version", None)
    if key.version is not None:
        there["pax_version"] = key.version
    before = repr(there)
    (copy,) = Run.from_document({"_id": 1, "data": [there]}).copies
    for name, _ in schema(Entry):
        getattr(copy, name)
    assert (copy.key, copy.status) == (key, status)
    assert copy.fields is there
    assert repr(there) == before


@make.few
@given(st.dictionaries(st.sampled_from(FREE), make.values), make.keys, make.statuses)
def test_what_is_written_is_what_is_read(fields: dict[str, Any], key: CopyKey, status: str) -> None:
    """The entry that `add_copy` adds has these fields, and no others but key and status."""
    update = RunUpdate.add_copy(Run(ObjectId()), key, status, **deepcopy(fields))
    copy = Copy.from_entry(update.add)
    assert copy is not None
    assert (copy.key, copy.status) == (key, status)
    named = {name: copy.fields[name] for name in fields}
    assert repr(named) == repr(fields)
    assert {*copy.fields} - {*fields} <= {"type", "host", "pax_version", "status"}


@make.few
@given(hostile)
def test_an_expectation_is_of_what_stands_there(fields: dict[str, Any]) -> None:
    """`having` expects the document's own values, whatever the typed fields make of them."""
    copy = Copy(CopyKey("raw", "lngs"), "error", fields)
    expected = copy.having(*KEYS)
    assert all(expected.fields[name] is fields.get(name) for name in KEYS)
    assert isinstance(expected.fields, Mapping)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        *((5, 5), (5000.0, 5000), (0, 0)),
        *((value, None) for value in (-1, 2.5, True, "5", float("nan"), float("inf"))),
    ],
)
def test_a_count_is_a_whole_number(value: object, found: int | None) -> None:
    """Mongosh writes whole numbers as doubles."""
    assert entry.count(value) == found
