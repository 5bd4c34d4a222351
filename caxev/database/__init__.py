"""The only package that knows pymongo.

- `client`: connecting, and what pymongo's errors mean to us;
- `runs`: run documents: reading them, and updates that happen only where they still fit;
- `stream`: the change stream in batches;
- `rows`: documents of caxev's own collections, read with care;
- `store`: what a site keeps for itself: lease, position, snapshots, reactions, requests;
- `blocking`: one update by a process without an event loop;
- `grants`: what a site's user may do;
- `Database`: all of it, as trio functions that each cross into asyncio once.
"""

from caxev.database.blocking import LeaseKeeper, amend, id_from, id_text
from caxev.database.client import (
    DatabaseError,
    HistoryLost,
    InvalidDocument,
    LeaseLost,
    LoginFailed,
    NotAuthorized,
    NotReplicaSet,
    Unreachable,
    concerns_one,
    is_fatal,
    is_transient,
    of_the_site,
)
from caxev.database.database import Database, Ingest, Snapshots
from caxev.database.runs import Selection
from caxev.database.store import (
    OLDEST_FIRST,
    URGENT_FIRST,
    Gap,
    Lease,
    Odd,
    Order,
    Position,
    Request,
    SiteRecord,
)
from caxev.database.stream import Batch, Stream

__all__ = [
    "OLDEST_FIRST",
    "URGENT_FIRST",
    "Batch",
    "Database",
    "DatabaseError",
    "Gap",
    "HistoryLost",
    "Ingest",
    "InvalidDocument",
    "Lease",
    "LeaseKeeper",
    "LeaseLost",
    "LoginFailed",
    "NotAuthorized",
    "NotReplicaSet",
    "Odd",
    "Order",
    "Position",
    "Request",
    "Selection",
    "SiteRecord",
    "Snapshots",
    "Stream",
    "Unreachable",
    "amend",
    "concerns_one",
    "id_from",
    "id_text",
    "is_fatal",
    "is_transient",
    "of_the_site",
]
