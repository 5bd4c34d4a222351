"""Make the ledger's indexes, if this site's user may."""

from __future__ import annotations

from typing import Final

import trio
from loguru import logger

from caxev.database import Database, DatabaseError, NotAuthorized, is_transient

EVERY: Final = 86400.0
"""Seconds after which the indexes are made again: nothing shows that a collection was dropped."""


async def make_indexes(database: Database) -> None:
    """Make the indexes if we may: at the start, and after somebody has dropped the ledger."""
    try:
        await database.create_indexes()
    except NotAuthorized as error:
        logger.warning(
            "no right to create indexes, an administrator must (caxev db init): {}", error
        )
    except DatabaseError as error:
        if not is_transient(error):
            raise
        logger.warning("the indexes may be missing, which makes everything slow: {}", error)


async def keep_indexes(database: Database) -> None:
    """Make the indexes daily, until cancelled."""
    while True:
        await trio.sleep(EVERY)
        try:
            await make_indexes(database)
        except DatabaseError as error:
            logger.error("the indexes cannot be made: {}", error)
