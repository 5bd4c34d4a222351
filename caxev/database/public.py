"""The names that `caxev.database` offers, each from the module that has it."""

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
from caxev.database.helpers import Helper
from caxev.database.history import HistorySearch
from caxev.database.ids import id_from, id_text
from caxev.database.lease_keeper import LeaseKeeper
from caxev.database.opening import one_of, open_database, run
from caxev.database.quarantine import Odd
from caxev.database.requests import Request
from caxev.database.sites import Disk, Gap, Position, Scanning, SiteRecord
from caxev.database.snapshots import Ingest, Snapshots
from caxev.database.stream import AWAIT, Batch, Stream
from caxev.database.writes import Lease

__all__ = [
    "AWAIT",
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
    "Position",
    "Request",
    "RequestPart",
    "Scanning",
    "SiteRecord",
    "Snapshots",
    "Stream",
    "Unreachable",
    "WrongSchema",
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
