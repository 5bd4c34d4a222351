"""Paths as people write them, with ``~`` for a home directory."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return a path with the home directory in place of ``~``; unchanged if there is no such user.

    sites.json is the same at every site, and a user of one need not exist at another.
    """
    # Path.expanduser raises for an unknown user.
    return Path(os.path.expanduser(path))  # noqa: PTH111
