"""All that caxev does with the database, as trio functions that each cross into asyncio once."""

from __future__ import annotations

from caxev.database.alarms import Alarms
from caxev.database.backup import Backup
from caxev.database.bulk_requests import BulkRequests
from caxev.database.claims import Claims
from caxev.database.feed import Feeds
from caxev.database.figures import Figures
from caxev.database.helpers import Helpers
from caxev.database.manifests import Manifests
from caxev.database.processes import Processes
from caxev.database.requests import Requests
from caxev.database.setup import Setup
from caxev.database.snapshots import Recording


class Database(
    Claims,
    Helpers,
    Recording,
    Feeds,
    Requests,
    BulkRequests,
    Alarms,
    Manifests,
    Setup,
    Figures,
    Processes,
    Backup,
):
    """The runs database and this site's ledger in it.

    Every method may raise `Unreachable`, `NotAuthorized` or another `DatabaseError`. Cancelling one
    leaves its write done or not done; the filters make it safe to do it again.

    Four collections of ours are beside the runs, with the prefix ``caxev_``:

    - ``ledger``: the reactions, by key; each site's snapshots, by (site, run); and each site's
      own document, by its name, with its lease, its position in the stream and its gaps of
      history. They share a collection so that what a change leads to is one write and a commit.
      Helpers, alarms and malformed documents are there as well;
    - ``requests``: what people asked a site's listener to do (replay, retry, scan), and what they
      asked of many runs together;
    - ``manifests``: what copies consist of, by digest;
    - ``history``: what happened; see `caxev.core.history`.
    """
