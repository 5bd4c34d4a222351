"""The state that the tasks of one lease share.

`session` makes a `Context` for each lease; watcher, recorder, requests, dispatcher, runner and
settler hold it. A reload replaces its `options`, so read them again each time.
"""

from __future__ import annotations

from attrs import Factory, define, field

from caxev.config import Site, Sites
from caxev.core.alarms import Alarms
from caxev.core.registry import Registry
from caxev.database import Database, Lease
from caxev.engine.options import Options
from caxev.engine.trouble import Trouble


@define(eq=False)
class Context:
    """A lease, and what to act with while it lasts."""

    database: Database
    lease: Lease
    options: Options
    alarms: Alarms = field(factory=Alarms)
    # One for all tasks: trouble is over only when each of them has come through.
    trouble: Trouble = field(
        default=Factory(lambda self: Trouble(self.lease.site), takes_self=True)
    )

    @property
    def is_helper(self) -> bool:
        """Whether this process only helps the one that leads the site."""
        return self.lease.helper is not None

    @property
    def site(self) -> Site:
        return self.options.site

    @property
    def sites(self) -> Sites:
        return self.options.sites

    @property
    def registry(self) -> Registry:
        return self.options.registry
