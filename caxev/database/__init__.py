"""The only package that knows pymongo.

`Database` is all of it, as trio functions that each cross into asyncio once. It is made of a class
for each kind of thing that is stored:

- `run_queries`: the runs, read and written; `stream`: their changes, in batches;
- `snapshots`: what a site last saw of each run, and recording what changed since;
- `reactions`, `claims`: the ledger's reactions, and the attempts at them;
- `history`: what happened, once it is settled;
- `sites`, `leases`: what is known of a site, and which process acts for it;
- `helpers`: the processes that claim reactions beside it;
- `schema`: the form of the ledger, as a number;
- `feed`: what the page shows, and its changes;
- `requests`, `bulk_requests`, `alarms`, `manifests`; `quarantine`: documents that cannot be read;
- `processes`: the processes that listen; `figures`: figures for metrics;
- `backup`: caxev's own collections as a whole;
- `setup`: making indexes (`indexes` lists them), users and their rights.

They stand on

- `client`: connecting, and what pymongo's errors mean to us;
- `opening`: opening all that for a block;
- `connection`: the connection that they share, and `operation`, which makes a trio function of an
  asyncio one;
- `runs`: which runs are selected, and what an update is to MongoDB;
- `rows`: documents of caxev's own collections, read with care;
- `writes`: many writes at once, guarded by the lease.

`blocking` is for processes without an event loop.
"""

from caxev.database.blocking import LeaseKeeper, amend, id_from, id_text
from caxev.database.bulk_requests import BulkRequest, RequestPart
from caxev.database.client import (
    DatabaseError,
    HistoryLost,
    InvalidDocument,
    LeaseLost,
    NotAuthorized,
    Unreachable,
    WrongSchema,
    concerns_one,
    is_fatal,
    is_transient,
    of_the_site,
    unless_fatal,
)
from caxev.database.database import Database
from caxev.database.feed import Changed, FeedStream, News
from caxev.database.helpers import Helper, ReactionStream
from caxev.database.history import HistorySearch
from caxev.database.indexes import URGENT_FIRST
from caxev.database.opening import one_of, open_database, run
from caxev.database.quarantine import Odd
from caxev.database.reactions import OLDEST_FIRST, Order
from caxev.database.requests import Request, WaitingRequest
from caxev.database.sites import Disk, Gap, Position, Scanning, SiteRecord
from caxev.database.snapshots import Ingest, Snapshots
from caxev.database.stream import AWAIT, Batch, Stream
from caxev.database.writes import Lease

__all__ = [
    "AWAIT",
    "OLDEST_FIRST",
    "URGENT_FIRST",
    "Batch",
    "BulkRequest",
    "Changed",
    "Database",
    "DatabaseError",
    "Disk",
    "FeedStream",
    "Gap",
    "Helper",
    "HistoryLost",
    "HistorySearch",
    "Ingest",
    "InvalidDocument",
    "Lease",
    "LeaseKeeper",
    "LeaseLost",
    "News",
    "NotAuthorized",
    "Odd",
    "Order",
    "Position",
    "ReactionStream",
    "Request",
    "RequestPart",
    "Scanning",
    "SiteRecord",
    "Snapshots",
    "Stream",
    "Unreachable",
    "WaitingRequest",
    "WrongSchema",
    "amend",
    "concerns_one",
    "id_from",
    "id_text",
    "is_fatal",
    "is_transient",
    "of_the_site",
    "one_of",
    "open_database",
    "run",
    "unless_fatal",
]
