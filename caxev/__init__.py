"""caxev: one process per computing site that reacts to changes of the runs database.

All that the author of a handler needs can be imported from here; `author` lists it::

    from caxev import HERE, Job, RunUpdate, copy, on
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from caxev.author import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """Load `author` when the first of its names is used.

        Every process of ours imports this package, and some that others wait for, such as workers
        and ``caxev receive``, need none of the names.
        """
        from importlib.util import find_spec

        # Python also asks for a module of ours here, before it imports it.
        if name.startswith("__") or find_spec(f"{__name__}.{name}") is not None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from caxev import author

        return getattr(author, name)
