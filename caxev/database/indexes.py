"""The indexes of the runs and of our own collections, each with the queries that it serves. Pure.

A listener makes those of the ledger by itself, if it may. The runs are not only ours: their indexes
are made by ``caxev db init`` alone, which shows them. Without these every command works, and reads
the whole collection.
"""

from __future__ import annotations

from typing import Any, Final

from attrs import frozen
from pymongo import ASCENDING, DESCENDING, IndexModel

from caxev.core.ledger import NEWEST_FIRST, State

Order = tuple[tuple[str, int], ...]
Filter = dict[str, Any]

URGENT_FIRST: Final[Order] = (("priority", DESCENDING), ("generation", DESCENDING))
"""By priority, then newest first: the order of `NEWEST_FIRST` lanes."""


@frozen
class Index:
    """An index: its keys, which documents are in it (None: all), and what it is for."""

    name: str
    keys: Order
    serves: str
    only: Filter | None = None
    expires: bool = False
    """Whether the server deletes a document at the time in the (only) key."""

    @property
    def model(self) -> IndexModel:
        """Return the index as pymongo makes it."""
        options: dict[str, Any] = {}
        if self.only is not None:
            options["partialFilterExpression"] = self.only
        if self.expires:
            options["expireAfterSeconds"] = 0
        return IndexModel(list(self.keys), name=self.name, **options)

    @property
    def words(self) -> str:
        """Return the keys for people."""
        names = (name if way == ASCENDING else f"-{name}" for name, way in self.keys)
        return ", ".join(names)

    def is_like(self, existing: Any) -> bool:
        """Return whether an index that exists, as the server lists it, does the same."""
        if tuple(existing["key"].items()) != self.keys:
            return False
        # One that leaves out documents, or hides, or compares in another way, serves no such query.
        others = ("sparse", "hidden", "collation")
        same = existing.get("partialFilterExpression") == self.only
        same = same and ("expireAfterSeconds" in existing) is self.expires
        return same and not any(existing.get(name) for name in others)


def _of(name: str, *keys: str, serves: str, only: Filter | None = None) -> Index:
    return Index(name, tuple((key, ASCENDING) for key in keys), serves, only)


# After an equality on the other keys the ids are in order, so that a page can begin after any id.
HOST_AND_STATUS: Final = _of(
    "caxev_copies",
    "data.host",
    "data.status",
    "_id",
    serves="status --host --status, verify --site, rule files of a catalogue",
)
HOST: Final = _of(
    "caxev_host", "data.host", "_id", serves="status --host, rm --dry-run, stray, rucio check"
)
STATUS: Final = _of("caxev_status", "data.status", "_id", serves="status --status")
NUMBER: Final = _of(
    "caxev_number",
    "number",
    "_id",
    serves="--run, and the order of lists",
)
NAME: Final = _of("caxev_name", "name", "_id", serves="--name, and a run of a new name")
TAG: Final = _of("caxev_tag", "tags.name", "_id", serves="--tag, and completing tags")
HELD: Final = _of(
    "caxev_held",
    "data.holds.at",
    serves="holds",
    only={"data.holds.at": {"$exists": True}},
)
RUNS: Final = (NUMBER, NAME, TAG, HOST_AND_STATUS, HOST, STATUS, HELD)
"""Those of the runs collection."""


def _newest_first(lane: str) -> Index:
    """Return the index in a lane's order; `due` is in it so that what is not due costs no read.

    One for each such lane: the reactions of all others are spared the upkeep.
    """
    keys = (("site", ASCENDING), ("lane", ASCENDING), *URGENT_FIRST, ("due", ASCENDING))
    only = {"state": State.PENDING.value, "lane": lane}
    return Index(f"newest_{lane}", keys, f"due reactions of the lane {lane}, newest first", only)


LEDGER: Final = (
    _of(
        "due",
        *("site", "lane", "due"),
        serves="reactions that are due and that nobody has claimed",
        only={"state": State.PENDING.value},
    ),
    _of(
        "claimed",
        *("site", "epoch"),
        serves="claimed reactions, for the next process to interrupt",
        only={"epoch": {"$exists": True}},
    ),
    _of("kind", "kind", serves="sites, alarms", only={"kind": {"$exists": True}}),
    _of(
        "failed",
        *("site", "due"),
        serves="reactions --failed, retry",
        only={"state": State.FAILED.value},
    ),
    *map(_newest_first, sorted(NEWEST_FIRST)),
)
EXPIRES: Final = Index(
    "expires", (("expires", ASCENDING),), "forgetting what is old (CAXEV_HISTORY_DAYS)", None, True
)
REQUESTS: Final = (
    _of("site", "site", serves="what people asked a site to do"),
    _of("bulk", "bulk", serves="requests cancel, resume", only={"bulk": {"$exists": True}}),
    EXPIRES,
)
MANIFESTS: Final = (_of("manifest", "m", serves="a manifest by its digest"),)
# By `_id` behind the time, so that a page can begin after any row.
HISTORY: Final = (
    _of("site", "site", "at", "_id", serves="history of a site, or of all"),
    _of("run", "run", "at", "_id", serves="history of a run"),
    EXPIRES,
)
