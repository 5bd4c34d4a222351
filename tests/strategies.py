"""Hypothesis strategies: documents as a database may hold them, and looks at them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from bson import Int64, ObjectId
from hypothesis import settings
from hypothesis import strategies as st

from caxev.core.model import (
    YES,
    Aspect,
    CopyField,
    CopyKey,
    Event,
    Existence,
    Field,
    Snapshot,
    Tag,
)

few = settings(max_examples=40)
"""For what is dear to generate, as whole documents are."""

ODD_TEXTS = (
    "",
    "$set",
    "$$NOW",
    "a.b",
    "a\0b",
    "<here>",
    "n/a",
    "NA",
    '"],["',
    "raw@1",
    "Zürich 🦆",
)

texts = st.one_of(
    st.sampled_from(ODD_TEXTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
)
"""Any text that a database can hold: no lone surrogates, but NUL, quotes and operators."""

names = texts.filter(bool)
times = st.datetimes(timezones=st.just(UTC), allow_imaginary=False)

scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-5, 5).map(Int64),
    st.floats(),
    texts,
    st.binary(max_size=4),
    times,
    st.datetimes(),
    st.binary(min_size=12, max_size=12).map(ObjectId),
)

values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
"""Anything at all that a field may hold."""

statuses = st.sampled_from(["transferring", "verifying", "transferred", "error", "RSEreupload"])
kinds = st.sampled_from(["raw", "processed", "minitrees", "untriggered"])
hosts = st.sampled_from(["lngs", "chicago", "tsm-server", "rucio-catalogue"])
versions = st.none() | st.sampled_from(["v6.8.0", "v6.9.1"])

keys = st.builds(CopyKey, kinds | names, hosts | names, versions | names)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """An entry of ``data`` as cax or caxev write it, with fields that nobody knows."""
    entry: dict[str, Any] = {
        "type": draw(kinds),
        "host": draw(hosts),
        "status": draw(statuses),
        "location": draw(st.sampled_from(["n/a", "NA", "/data/raw/161111_1434"])),
        "checksum": draw(st.none() | st.just("ab" * 64)),
        "creation_time": draw(times | st.lists(times, max_size=2)),
        **draw(st.dictionaries(st.sampled_from(["x_one", "x_two"]), values, max_size=2)),
    }
    if (version := draw(versions)) is not None or draw(st.booleans()):
        entry["pax_version"] = version
    if draw(st.booleans()):
        entry["status_since"] = draw(times)
    return entry


_FIELDS = (
    "type",
    "host",
    "status",
    "pax_version",
    "status_since",
    "location",
    "checksum",
    "owner",
    "creation_time",
)
hostile_entries: st.SearchStrategy[Any] = values | st.dictionaries(
    st.sampled_from(_FIELDS), values | kinds | hosts, max_size=len(_FIELDS)
)
"""Entries that are no entries, or of which any field may hold anything."""

tags = st.lists(st.fixed_dictionaries({"name": names}, optional={"date": times}), max_size=3)


def _document(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"_id": st.binary(min_size=12, max_size=12).map(ObjectId)}, optional=fields
    )


documents = _document(
    number=st.integers(0, 9999),
    name=st.sampled_from(["161111_1434", "170101_0001"]),
    detector=st.sampled_from(["tpc", "muon_veto"]),
    start=times,
    tags=tags,
    data=st.lists(entries(), max_size=5),
)
"""Runs as they should be; of the copies, several may have one key."""

hostile_documents = _document(
    number=values,
    name=values,
    detector=values,
    start=values,
    tags=values | st.lists(values | st.fixed_dictionaries({"name": values}), max_size=3),
    data=values | st.lists(hostile_entries | entries(), max_size=4),
)
"""Runs that anything may have happened to."""

run_documents = documents | hostile_documents

aspects: st.SearchStrategy[Aspect] = st.one_of(
    keys,
    names.map(Tag),
    st.just(Existence()),
    names.map(Field),
    st.builds(CopyField, kinds, hosts, versions, names.map(lambda name: name.replace(".", "_"))),
)


@st.composite
def snapshots(draw: st.DrawFn) -> dict[Aspect, str]:
    """A look: any aspects, each with a value that it can have."""
    since = st.sampled_from(["", "@0", "@1478822400000"])
    status = st.builds(lambda status, at: status + at, statuses, since)
    found = draw(st.lists(aspects, max_size=6, unique=True))
    return {aspect: draw(status) if isinstance(aspect, CopyKey) else YES for aspect in found}


EPOCH = datetime(2016, 11, 11, tzinfo=UTC)


def replay(before: Snapshot, events: Iterable[Event]) -> dict[Aspect, str]:
    """Return the snapshot to which `events` lead from `before`."""
    snapshot = dict(before)
    for event in events:
        if event.after is None:
            snapshot.pop(event.aspect, None)
        else:
            snapshot[event.aspect] = event.after
    return snapshot
