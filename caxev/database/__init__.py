"""The only package that knows pymongo.

- `client`: connecting, and what pymongo's errors mean to us;
- `runs`: run documents: reading them, and updates that happen only where they still fit;
- `stream`: the change stream in batches;
- `rows`: documents of caxev's own collections, read with care;
- `store`: what a site keeps for itself: lease, position, last looks, debts, requests;
- `blocking`: one update by a process without an event loop;
- `grants`: what a site's user may do;
- `Database`: all of it, as trio functions that each cross into asyncio once.
"""

from caxev.database.blocking import LeaseKeeper, amend, id_from, id_text
from caxev.database.client import (
    DatabaseError,
    Deposed,
    HistoryLost,
    LoginFailed,
    NotReplicaSet,
    Refused,
    Unreachable,
    Unstorable,
    concerns_one,
    is_fatal,
    passing,
)
from caxev.database.database import Database, Ingest, Looked
from caxev.database.runs import Selection
from caxev.database.store import (
    OLDEST_FIRST,
    URGENT_FIRST,
    Gap,
    Odd,
    Order,
    Position,
    Request,
    SiteRecord,
    Tenure,
)
from caxev.database.stream import Batch, Stream

__all__ = [
    "OLDEST_FIRST",
    "URGENT_FIRST",
    "Batch",
    "Database",
    "DatabaseError",
    "Deposed",
    "Gap",
    "HistoryLost",
    "Ingest",
    "LeaseKeeper",
    "LoginFailed",
    "Looked",
    "NotReplicaSet",
    "Odd",
    "Order",
    "Position",
    "Refused",
    "Request",
    "Selection",
    "SiteRecord",
    "Stream",
    "Tenure",
    "Unreachable",
    "Unstorable",
    "amend",
    "concerns_one",
    "id_from",
    "id_text",
    "is_fatal",
    "passing",
]
