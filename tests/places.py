"""Paths of tests as the disk code takes them: a test vouches for its own directory."""

from __future__ import annotations

import os
from pathlib import Path

from caxev.files import Confined, partial_path


def vouched(path: str | bytes | Path) -> Confined:
    """Return a test's own path, which needs no confining."""
    return Confined(os.fsencode(path))


def partial_of(path: str | Path) -> Path:
    """Return where a copy is written before it has that path."""
    return Path(os.fsdecode(partial_path(vouched(path))))
