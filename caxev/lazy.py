"""Names of a package that are loaded when the first of them is used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module


def names_of(package: str, module: str) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a package that offers the names of one of its modules.

    So a process that needs other modules of the package alone starts without this one.
    """

    def load(name: str) -> object:
        from importlib.util import find_spec

        # Python also asks for a module of ours here, before it imports it.
        if name.startswith("__") or find_spec(f"{package}.{name}") is not None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module}"), name)

    return load
