"""caxev/config/README.md: each key of sites.json, once, with the default that the code has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from caxev.config import (
    ArchiveOptions,
    Catalogue,
    Correction,
    Deletion,
    Email,
    Link,
    Patrol,
    Permission,
    Processing,
    Sink,
    Sites,
    Stalled,
    Webhook,
    load_sites,
)
from caxev.config.sites import KEYS, METHODS
from caxev.engine.dispatcher import LANES, OTHER_LANE
from tests.documents import TEXTS, headed, marked

TEXT = TEXTS["caxev/config/README.md"]
MAIL = {"to": ["shift@example.org"]}
HOOK = {"shape": "slack"}
FIELD = {"name": "gains", "field": "processor.gains", "table": "gains"}
Place = Callable[[dict[str, Any]], dict[str, Any]]

INNER: dict[str, tuple[type[Any], dict[str, Any], Place]] = {
    "a link": (Link, {}, lambda one: {"links": {"chicago": one}}),
    "`permissions`": (Permission, {}, lambda one: {"permissions": one}),
    "`deletion`": (Deletion, {}, lambda one: {"deletion": one}),
    "`patrol`": (Patrol, {"days": 90}, lambda one: {"patrol": one}),
    "`stalled`": (Stalled, {}, lambda one: {"stalled": one}),
    "`processing`": (
        Processing,
        {"command": ["pax"]},
        lambda one: {"dir_processed": "/data/processed", "processing": one},
    ),
    "a correction": (Correction, FIELD, lambda one: {"corrections": [one]}),
    "every sink": (Sink, MAIL, lambda one: {"alarms": [{"email": one}]}),
    "`email`": (Email, MAIL, lambda one: {"alarms": [{"email": one}]}),
    "`webhook`": (Webhook, HOOK, lambda one: {"alarms": [{"webhook": one}]}),
    "`archive`": (ArchiveOptions, {}, lambda one: {"archive": one}),
    "`rucio`": (Catalogue, {}, lambda one: {"rucio": one}),
}
"""By the table's heading: the class, the keys that it must have, and its place in a site."""
OTHERWISE = {"sender": "from"}
"""Fields that are called otherwise in the file."""
INTERNAL = {"kind", "options"}


def rows_of(heading: str) -> Iterator[list[str]]:
    """The rows of all tables of that heading."""
    return (row for head, rows in headed(TEXT) if head[0] == heading for row in rows)


def keys_of(heading: str) -> list[str]:
    return [key for row in rows_of(heading) for key in marked(row[0])]


def loaded(path: Path, **keys: Any) -> Sites:
    """A site with these keys, read by the code."""
    (path / "sites.json").write_text(json.dumps([{"name": "lngs", **keys}]))
    return load_sites(path / "sites.json")


def defaults(heading: str) -> Iterator[tuple[str, Any]]:
    """The keys whose default the table shows as JSON, with it."""
    for row in rows_of(heading):
        begin, default, *_rest = (*row[2].split("`"), "", "")
        try:
            value = json.loads(default)
        except ValueError:
            continue
        if begin == "":
            yield from ((key, value) for key in marked(row[0]))


def test_every_key_of_a_site_is_there_once() -> None:
    """The tables have every key that a site can have, and no other."""
    assert sorted(keys_of("key")) == sorted(KEYS)


@pytest.mark.parametrize("what", INNER)
def test_every_inner_key_is_there_once(what: str) -> None:
    """The tables of objects inside a site have each of their keys, and no other."""
    fields = {one.name for one in attrs.fields(INNER[what][0])} - INTERNAL
    assert sorted(keys_of(f"key of {what}")) == sorted(OTHERWISE.get(n, n) for n in fields)


@pytest.mark.parametrize(("key", "value"), [*defaults("key")], ids=str)
def test_a_default_is_that_of_the_code(tmp_path: Path, key: str, value: Any) -> None:
    """A site that gives a key its default is the same as one that leaves it out."""
    bare: dict[str, Any] = {"name": "lngs"}
    assert loaded(tmp_path, **{key: value}).get("lngs") == loaded(tmp_path, **bare).get("lngs")


@pytest.mark.parametrize("what", INNER)
def test_an_inner_default_is_that_of_the_code(tmp_path: Path, what: str) -> None:
    """The same for the keys of objects inside a site; one that is required has none."""
    _class, needed, place = INNER[what]
    bare = loaded(tmp_path, **place(needed)).get("lngs")
    for key, value in defaults(f"key of {what}"):
        assert loaded(tmp_path, **place({**needed, key: value})).get("lngs") == bare, key
    rows = [row for row in rows_of(f"key of {what}") if row[2] == "required"]
    assert {key for row in rows for key in marked(row[0])} <= needed.keys()


def test_the_methods_are_those_of_the_code() -> None:
    """The row of `method` names every method that a site can have."""
    (row,) = (row for row in rows_of("key") if row[0] == "`method`")
    assert set(METHODS) <= set(marked(row[1]))


def test_the_lanes_are_those_of_the_engine() -> None:
    """The sizes of lanes in the text are the engine's."""
    (row,) = (row for row in rows_of("key") if row[0] == "`lanes`")
    assert row[2] == ", ".join(f"{k} {v}" for k, v in LANES.items()) + f", any other {OTHER_LANE}"
