"""A site's own document in the ledger, as `SiteRecord`; its key is the site's name.

Its listener writes it anew, so a field that is malformed is read as if it were missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache
from typing import Any, Final, TypeVar

from attrs import field, frozen
from bson.timestamp import Timestamp
from loguru import logger

from caxev.core.model import NO_FIELDS, Watched
from caxev.database.client import Document
from caxev.database.rows import Malformed, Row, carefully, texts

T = TypeVar("T")

GAPS_KEPT: Final = 20


@frozen
class Position:
    """A place in the change stream: after a token or, before there is one, at a time."""

    token: Mapping[str, Any] | None = None
    start: Timestamp | None = None

    @property
    def row(self) -> Document:
        """Return the position as the site's document has it."""
        return {"token": self.token, "start": self.start}


@frozen
class Gap:
    """A part of the history that the stream could not give; a scan made up for it."""

    found: datetime
    why: str


@frozen
class SiteRecord:
    """A site's document. `expires`: when the lease lapses unless renewed, UTC.

    `rules` are the digests of the rule files that were applied last, by catalogue;
    `configuration` is the digest of the owner's sites.json. `markers` are the ids of the markers
    of its directories, by their paths; `away`, why some of these were missing when its listener
    last checked. `skew`: how many seconds the listener's clock is ahead of the database's.
    """

    site: str
    epoch: int
    owner: str | None
    active: bool
    expires: datetime | None
    position: Position | None
    scanned: datetime | None
    streamed: datetime | None
    trouble: str | None
    gaps: tuple[Gap, ...]
    requests: int
    watched: Watched = NO_FIELDS
    rules: Mapping[str, str] = field(factory=dict)
    configuration: str = ""
    markers: Mapping[str, str] = field(factory=dict)
    away: Mapping[str, str] = field(factory=dict)
    skew: float | None = None

    @classmethod
    def from_document(cls, document: Document) -> SiteRecord:
        """Return the record; `active` must have been computed by the server's clock."""
        row = Row.of(document)
        site = str(document["_id"])

        def lenient(read: Callable[..., T], *args: Any, default: T) -> T:
            try:
                return carefully(lambda _: read(*args), None)
            except Malformed as error:
                _warn_once(f"what is known of site {site} is malformed: {error}")
                return default

        return cls(
            site=site,
            epoch=lenient(row.whole, "epoch", 0, default=0),
            owner=lenient(row.text, "owner", None, default=None),
            active=bool(document.get("active")),
            expires=lenient(row.moment, "expires", None, default=None),
            position=lenient(_position_from, document.get("position"), default=None),
            scanned=lenient(row.moment, "scanned", None, default=None),
            streamed=lenient(row.moment, "streamed", None, default=None),
            trouble=lenient(row.text, "trouble", None, default=None),
            gaps=lenient(_gaps_from, row, default=()),
            requests=lenient(row.whole, "requests", 0, default=0),
            watched=lenient(_watched_from, document.get("watched"), default=NO_FIELDS),
            rules=lenient(_pairs_from, row, "rules", "catalogue", "digest", default={}),
            configuration=lenient(row.text, "configuration", "", default=""),
            markers=lenient(_pairs_from, row, "markers", "root", "id", default={}),
            away=lenient(_pairs_from, row, "away", "root", "why", default={}),
            skew=skew if isinstance(skew := document.get("skew"), float) else None,
        )


def _position_from(value: object) -> Position | None:
    if not value:
        return None
    row = Row.of(value).document
    token, start = row.get("token"), row.get("start")
    if not isinstance(token, Mapping | None) or not isinstance(start, Timestamp | None):
        raise Malformed("position is neither a token nor a timestamp")
    return None if token is None and start is None else Position(token, start)


def _gaps_from(row: Row) -> tuple[Gap, ...]:
    rows = [Row.of(gap) for gap in row.many("gaps", [])]
    return tuple(Gap(gap.moment("found"), gap.text("why")) for gap in rows)


def _watched_from(value: object) -> Watched:
    if value is None:
        return NO_FIELDS
    row = Row.of(value)
    return Watched(frozenset(texts(row.many("run", []))), frozenset(texts(row.many("copies", []))))


def _pairs_from(row: Row, name: str, key: str, value: str) -> dict[str, str]:
    return {one.text(key): one.text(value) for one in map(Row.of, row.many(name, []))}


@cache
def _warn_once(message: str) -> None:
    logger.warning("{}", message)


def with_gap(gap: Gap) -> Document:
    """Return an expression for the site's last gaps with this one, once.

    It may be there already, if the reply to an earlier attempt was lost.
    """
    row = {"$literal": {"found": gap.found, "why": gap.why}}
    gaps = {"$cond": [{"$isArray": "$gaps"}, "$gaps", []]}
    more = {"$slice": [{"$concatArrays": [gaps, [row]]}, -GAPS_KEPT]}
    return {"$cond": [{"$in": [row, gaps]}, gaps, more]}
