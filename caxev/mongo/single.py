"""One update of one run, by a process that does nothing else and has no event loop: a job's end."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from bson import json_util
from pymongo import MongoClient

from caxev.config import Settings
from caxev.model import RunId, RunUpdate
from caxev.mongo.client import RELIED_ON, Document, address, listeners, translated
from caxev.mongo.runs import write_of


def id_text(run: RunId) -> str:
    """A run's id as text, of whatever type it is."""
    return json_util.dumps(run, json_options=json_util.CANONICAL_JSON_OPTIONS)


def id_from(text: str) -> RunId:
    """The id that `id_text` made a text of."""
    options = json_util.CANONICAL_JSON_OPTIONS.with_options(tz_aware=True)
    run: Any = json_util.loads(text, json_options=options)
    return run


def amend(settings: Settings, update: RunUpdate, now: datetime) -> bool:
    """Write an update; whether it fitted. Blocks. Raises `DatabaseError`."""
    query, change, array_filters = write_of(update, now)
    with translated(settings), connect_plainly(settings) as client:
        runs = client[settings.database][settings.collection]
        done = runs.update_one(query, change, array_filters=array_filters)
    return done.matched_count > 0


def connect_plainly(settings: Settings) -> MongoClient[Document]:
    """A client without an event loop. Does not wait for the server."""
    return MongoClient(
        address(settings),
        **RELIED_ON,
        appname="caxev batch",
        serverSelectionTimeoutMS=10_000,
        event_listeners=listeners(),
    )
