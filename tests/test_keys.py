"""caxev/config/README.md: each key of sites.json, as the code reads it."""

from __future__ import annotations

import re
from collections import Counter

from caxev.config.sites import METHODS
from caxev.engine.lanes import LANES, OTHER_LANE
from tests.config_keys import CLASSES, documented
from tests.documents import TEXTS, headed, marked
from tests.key_tables import rendered, shown

TEXT = TEXTS["caxev/config/README.md"]


def test_the_tables_are_those_of_the_code() -> None:
    """Rendering them anew changes nothing: else run ``python -m tests.key_tables``."""
    assert rendered(TEXT) == TEXT


def test_every_key_is_there_once() -> None:
    """Each key of each class has one row."""
    known = {(cls.__name__, key.name) for cls in CLASSES.values() for key in documented(cls)}
    assert Counter(shown(TEXT)) == Counter(known)


def test_the_methods_are_those_of_the_code() -> None:
    """The row of `method` names every method that a site can have."""
    (row,) = (row for _head, rows in headed(TEXT) for row in rows if row[0] == "`method`")
    assert set(METHODS) <= set(marked(row[2]))


def test_the_lanes_are_those_of_the_engine() -> None:
    """The sizes of lanes in the text are the engine's."""
    sizes = ", ".join(f"{name} {size}" for name, size in LANES.items())
    assert f"{sizes}, any other {OTHER_LANE}" in re.sub(r"\s+", " ", TEXT)
