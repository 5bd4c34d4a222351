"""Any number of documents through all that the engine makes of a document.

Hypothesis makes documents of anything that BSON can hold; of each two of them more are bred, by
taking each field and each entry from one or the other, which is quicker than making them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Any, Final

from bson import DBRef, Decimal128, Int64, MaxKey, MinKey, Regex, Timestamp
from bson.binary import Binary
from bson.code import Code
from bson.datetime_ms import DatetimeMS
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from caxev.core.diff import diff
from caxev.core.model import (
    CopyKey,
    Run,
    Watched,
    snapshot_of,
)
from tests import strategies as make

Document = Mapping[str, Any]

BRED: Final = 18
"""Documents that are bred of two."""
CHUNK: Final = 1000
"""Pairs in one go: hypothesis remembers what it has tried."""
WATCHED: Final = Watched(
    frozenset({"start", "end", "tags", "data.0", "processor.DEFAULT.gains", "x.y.z"}),
    frozenset({"status", "owner", "location", "check_asked", "checksum"}),
)

exotic: st.SearchStrategy[Any] = st.one_of(
    st.builds(DatetimeMS, st.integers(-(2**63), 2**63 - 1)),
    st.builds(Timestamp, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.builds(Binary, st.binary(max_size=8), st.sampled_from([0, 2, 5, 128])),
    st.builds(Int64, st.integers(-(2**63), 2**63 - 1)),
    st.sampled_from(
        [
            MinKey(),
            MaxKey(),
            Decimal128("NaN"),
            Decimal128("-1E+6144"),
            Regex("(a+)+$"),
            Code("while (true) {}"),
            Code("x", {"y": 1}),
            DBRef("runs_new", 1),
            "..",
            "/data/../../etc/passwd",
            "a\0b",
            "x" * 10_000,
        ]
    ),
)
"""What else a database may hold."""
anything = make.values | exotic | st.lists(exotic, max_size=2)
_NAMES: Final = (
    *("type", "host", "status", "pax_version", "status_since", "location", "checksum"),
    *("owner", "creation_time", "source", "manifest", "trigger", "verified_at", "rse"),
)
entries = st.dictionaries(st.sampled_from(_NAMES), anything | make.kinds | make.hosts, max_size=8)
documents: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"_id": make.scalars | exotic},
    optional={
        **dict.fromkeys(("number", "name", "detector", "start", "end", "x"), anything),
        "tags": anything | st.lists(anything | st.fixed_dictionaries({"name": anything})),
        "data": anything | st.lists(entries | make.entries() | anything, max_size=4),
        "processor": anything | st.just({"DEFAULT": [1]}) | st.just({"DEFAULT": {"gains": [1]}}),
    },
)


def bred(one: Document, other: Document, random: Random) -> dict[str, Any]:
    """Return a document whose fields and entries are those of one or the other."""
    child = {name: random.choice((one, other)).get(name) for name in {*one, *other}}
    data = [entry for parent in (one, other) for entry in _list(parent.get("data"))]
    if data:
        data += [_mixed(entry, data, random) for entry in data]
        child["data"] = random.choices(data, k=3)
    return child


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mixed(entry: Any, data: list[Any], random: Random) -> Any:
    other = random.choice(data)
    if not isinstance(entry, dict) or not isinstance(other, dict):
        return other
    return {name: random.choice((entry, other)).get(name) for name in {*entry, *other}}


def check(before: Document, after: Document) -> None:
    """Look at two documents; nothing may be raised, and the laws of `diff` hold."""
    snapshots = []
    for document in (before, after):
        run = Run.from_document(document)
        assert str(run)
        _ = run.start, run.number, run.snapshot(WATCHED)
        for copy in run.copies:
            told = (copy.location, copy.checksum, copy.manifest, copy.source, copy.owner)
            assert all(one is None or isinstance(one, str) for one in told)
            _ = copy.since, copy.seen_as, copy.as_seen, str(copy.key)
        snapshots.append(snapshot_of(document, WATCHED))
    one, two = snapshots
    assert diff("id", one, one) == ()
    events = diff("id", one, two)
    assert make.replay(one, events) == two
    assert all(str(event) for event in events)
    assert all(key in two or key in one for key in (e.aspect for e in events))
    assert all(isinstance(key.host, str) for key in two if isinstance(key, CopyKey))


def family(one: Document, other: Document, random: Random) -> Iterator[Document]:
    """Return the two, and those that are bred of them."""
    yield from (one, other)
    for _ in range(BRED):
        yield bred(one, other, random)


def fuzz(number: int, start: int = 1) -> int:
    """Look at about so many documents, chosen by the seed `start`; how many there were.

    Raises what is raised by any of them, with the document.
    """
    looked = 0
    chunk = 0
    while looked < number:
        pairs = min(CHUNK, -(-(number - looked) // (BRED + 2)))

        @seed(start * 1_000_003 + chunk)
        @settings(
            max_examples=pairs,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(documents, documents, st.integers(0, 2**32))
        def these(one: Document, other: Document, chosen: int) -> None:
            nonlocal looked
            last = one
            for document in family(one, other, Random(chosen)):
                check(last, document)
                last = document
                looked += 1

        these()
        chunk += 1
    return looked
