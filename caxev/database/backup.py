"""Reading and writing whole collections of caxev's own: what a back-up holds.

A restored ledger is of the past. So every site begins at a later epoch than any before, holds no
lease, and scans all runs: its reactions go by the runs as they are then, and by nothing that the
ledger remembers of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from bson import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo import InsertOne
from pymongo.errors import BulkWriteError

from caxev.database.client import DatabaseError, Document
from caxev.database.connection import LONG_LIMIT, Connection, within
from caxev.database.processes import KIND as PROCESS
from caxev.database.schema import KIND as SCHEMA
from caxev.database.setup import OWN
from caxev.database.sites import ACTIVE, SITE
from caxev.database.writes import HELPER

LATER: Final = 10_000
"""Epochs that are skipped: more than a site can have begun since the back-up."""
AT_ONCE: Final = 500
DUPLICATE: Final = 11000
PAST: Final = ("position", "scanned", "scanning", "expires", "owner", "lsid", "trouble")
"""Fields of a site's document that describe the moment of the back-up."""
ADDED_TO: Final = ("manifests", "history")
"""Collections that only grow: a restore removes nothing from them."""
Keep = Callable[[str, bytes], None]


class Backup(Connection):
    """Reading all of caxev's own collections at one point in time, and writing them back."""

    @within(LONG_LIMIT)
    async def back_up(self, keep: Keep) -> None:
        """Hand over each document, as BSON, with its collection's name.

        All are as they were at one point in time, whatever is written meanwhile. The server keeps
        that for five minutes (``minSnapshotHistoryWindowInSeconds``).
        """
        raw = CodecOptions(document_class=RawBSONDocument)
        async with self._client.start_session(snapshot=True) as session:
            for name in OWN:
                collection = self._own(name).with_options(codec_options=raw)
                async for document in collection.find({}, session=session):
                    keep(name, bytes(document.raw))

    @within(LONG_LIMIT)
    async def restore(
        self, documents: Iterable[tuple[str, Document]], *, force: bool
    ) -> dict[str, int]:
        """Write a back-up's documents; return how many of each collection.

        Refuses if a listener is active, and unless `force` if the ledger holds anything. If it is
        interrupted, give it again with `force`: the sites' documents come last.
        """
        await self._check_idle(force=force)
        for name in OWN:
            if name not in ADDED_TO:
                await self._own(name).delete_many({})
        counts = dict.fromkeys(OWN, 0)
        sites: list[Document] = []
        rows = (row for row in documents if not _is_of_now(*row))
        while some := list(islice(rows, AT_ONCE)):
            sites += [document for name, document in some if _is_site(name, document)]
            for name in OWN:
                chosen = [one for of, one in some if of == name and not _is_site(of, one)]
                counts[name] += await self._put_back(name, chosen)
        counts["ledger"] += await self._put_back("ledger", [_later(site) for site in sites])
        return counts

    async def _check_idle(self, *, force: bool) -> None:
        active = self._ledger.find({"kind": SITE, "$expr": ACTIVE}, {"_id": 1})
        names = [str(one["_id"]) async for one in active]
        if names:
            listening = f"a listener is active for {', '.join(names)}"
            raise DatabaseError(f"{listening}: stop all listeners of all sites first")
        if not force and await self._ledger.find_one(
            {"kind": {"$nin": [PROCESS, HELPER, SCHEMA]}}, {"_id": 1}
        ):
            raise DatabaseError(
                f"{self._ledger.full_name} is not empty: what it holds would be replaced; if that "
                "is meant, give --force"
            )

    async def _put_back(self, name: str, documents: Sequence[Document]) -> int:
        if not documents:
            return 0
        writes = [InsertOne(document) for document in documents]
        try:
            await self._own(name).bulk_write(writes, ordered=False)
        except BulkWriteError as error:
            failed = error.details.get("writeErrors", [])
            # A row that is there already was not removed, or a restore that was killed wrote it.
            if any(one.get("code") != DUPLICATE for one in failed):
                raise
        return len(documents)


def _is_of_now(name: str, document: Document) -> bool:
    """Return whether a document is about a process that is gone by now."""
    return name == "ledger" and document.get("kind") in (PROCESS, HELPER)


def _is_site(name: str, document: Document) -> bool:
    return name == "ledger" and document.get("kind") == SITE


def _later(site: Document) -> Document:
    epoch = site.get("epoch")
    later = (epoch if isinstance(epoch, int) else 0) + LATER
    return {**{name: value for name, value in site.items() if name not in PAST}, "epoch": later}


def split(data: Callable[[int], bytes]) -> Iterator[bytes]:
    """Return the documents of a stream of BSON. Raises ValueError if it ends inside of one."""
    while head := data(4):
        size = int.from_bytes(head, "little")
        if len(head) < 4 or not 5 <= size <= 17 << 20:  # noqa: PLR2004  # a length; BSON's limits
            raise ValueError("it is damaged")
        rest = data(size - 4)
        if len(rest) != size - 4:
            raise ValueError("it is not complete")
        yield head + rest
