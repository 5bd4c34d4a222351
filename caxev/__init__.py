"""caxev: one process per computing site that reacts to changes of the runs database.

All that the author of a handler needs can be imported from here; `author` lists it::

    from caxev import HERE, Job, RunUpdate, copy, on
"""

from typing import TYPE_CHECKING

from caxev.lazy import names_of

__version__ = "0.1.0"

if TYPE_CHECKING:
    from caxev.author import *  # noqa: F403
else:
    # Every process of ours imports this package, and some that others wait for, such as workers and
    # ``caxev receive``, need none of the names.
    __getattr__ = names_of(__name__, "author")
