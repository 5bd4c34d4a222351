"""The processes of all sites, each with a document in the ledger that it keeps fresh.

Their keys begin with ``process``, so that a scan over runs or reactions skips them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from caxev.core.processes import Process
from caxev.database.client import Document
from caxev.database.connection import Connection, operation
from caxev.database.rows import Malformed, Row, carefully, texts

KIND: Final = "process"
FRESH: Final = 180.0
"""Seconds after which a process that has not reported counts as gone..."""
FORGOTTEN: Final = 86400.0
"""...and after which its document is removed."""


class Processes(Connection):
    """The reports of processes on themselves. It decides nothing, so it needs no lease."""

    @operation
    async def report_process(self, process: Process) -> None:
        """Record that a process is there, and forget those that have been gone for a day."""
        keys = [[name, digest] for name, digest in sorted(process.keys.items())]
        values = {
            "kind": KIND,
            "site": process.site,
            "owner": process.owner,
            "version": process.version,
            "configuration": process.configuration,
            "handlers": process.handlers,
            "keys": keys,
            "lanes": list(process.lanes),
        }
        change: Document = {"seen": "$$NOW", "began": {"$ifNull": ["$began", "$$NOW"]}}
        change |= {name: {"$literal": one} for name, one in values.items()}
        await self._ledger.update_one({"_id": _key(process)}, [{"$set": change}], upsert=True)
        gone = {"kind": KIND, "site": process.site, "$expr": {"$lt": ["$seen", _ago(FORGOTTEN)]}}
        await self._ledger.delete_many(gone)

    @operation
    async def forget_process(self, process: Process) -> None:
        """Remove what was reported: the process leaves."""
        await self._ledger.delete_one({"_id": _key(process)})

    @operation
    async def processes(self) -> list[Process]:
        """Return the processes of all sites that are there, by site."""
        fresh = {"kind": KIND, "$expr": {"$gt": ["$seen", _ago(FRESH)]}}
        cursor = self._ledger.find(fresh).sort([("site", 1), ("owner", 1)])
        return processes_from(await cursor.to_list(None))


def processes_from(documents: Iterable[Document]) -> list[Process]:
    """Return what processes reported, as far as it can be read."""
    found = []
    for document in documents:
        try:
            found.append(carefully(_process_from, document))
        except Malformed:  # it will be written again within a minute
            continue
    return found


def _key(process: Process) -> Document:
    return {"process": process.owner, "s": process.site}


def _ago(seconds: float) -> Document:
    return {"$subtract": ["$$NOW", seconds * 1000]}


def _process_from(document: Document) -> Process:
    row = Row.of(document)
    names = ("owner", "site", "version", "configuration", "handlers")
    keys = {str(name): str(digest) for name, digest in row.many("keys", [])}
    return Process(
        **{one: row.text(one) for one in names},
        keys=keys,
        lanes=tuple(texts(row.many("lanes", []))),
        began=row.moment("began", None),
        seen=row.moment("seen"),
    )
