"""The operator's configuration: sites.json, the database's address, and which handlers are loaded.

Read by `cli` and `listener` at the start, and handed down as frozen classes. Every mistake is a
`ConfigError`: its message names file, site, key and value, and what to do. `loading` reads
sites.json into the classes of `sites` and of the modules of single keys, `settings` the
environment, `handlers` the handlers' modules; `directories` has those of the listener's own.

`public` lists the names that all this offers here.
"""

from typing import TYPE_CHECKING

from caxev.lazy import names_of

if TYPE_CHECKING:
    from caxev.config.public import *  # noqa: F403
else:
    # A worker process, and that of each job of a batch system, need a module or two of these.
    __getattr__ = names_of(__name__, "public")
