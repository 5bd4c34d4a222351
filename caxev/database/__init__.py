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

They are built on

- `client`: connecting, and what pymongo's errors mean to us;
- `opening`: opening all that for a block;
- `connection`: the connection that they share, and `operation`, which makes a trio function of an
  asyncio one;
- `runs`: which runs are selected, and what an update is to MongoDB;
- `rows`: documents of caxev's own collections, read with care;
- `writes`: many writes at once, guarded by the lease.

`blocking` is for processes without an event loop, `lease_keeper` for those whose loop is blocked,
`ids` for those that need no pymongo.

`public` lists the names that all this offers here.
"""

from typing import TYPE_CHECKING

from caxev.lazy import names_of

if TYPE_CHECKING:
    from caxev.database.public import *  # noqa: F403
else:
    # The process of each job of a batch system needs `blocking` alone, and starts in two thirds of
    # the time that all would take.
    __getattr__ = names_of(__name__, "public")
