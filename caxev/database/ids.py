"""Ids of runs, which are of any BSON type, as text.

A module of its own, since a worker process needs no more than this of the database.
"""

from __future__ import annotations

from typing import Any

from bson import json_util

from caxev.core.model import RunId


def id_text(run: RunId) -> str:
    """Return a run's id, of any type, as text: canonical MongoDB Extended JSON (version 2)."""
    return json_util.dumps(run, json_options=json_util.CANONICAL_JSON_OPTIONS)


def id_from(text: str) -> RunId:
    """Return the id that `id_text` made a text of. Raises ValueError, or a BSON error."""
    options = json_util.CANONICAL_JSON_OPTIONS.with_options(tz_aware=True)
    run: Any = json_util.loads(text, json_options=options)
    return run
