"""Read sites.json again, on SIGHUP: `server` calls it, as the listener does its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import define
from loguru import logger

from caxev.config import ConfigError, Sites
from caxev.core.processes import differing
from caxev.database import Database, DatabaseError
from caxev.web.app import Pages
from caxev.web.broadcast import Broadcast
from caxev.web.feeder import Heard

Reread: TypeAlias = Callable[[], tuple[Sites, Sequence[Mapping[str, Any]]]]
"""Reads sites.json again; returns it with the rows of what handlers there are."""


@define(eq=False)
class PageReloader:
    """Has pages show another sites.json; a file with a mistake changes nothing."""

    pages: Pages
    broadcast: Broadcast
    reread: Reread
    databases: Sequence[Database]

    async def reload(self) -> None:
        """Read credentials and sites.json again, and have all views rendered again."""
        for one in self.databases:
            try:
                await one.renew_credentials()
            except DatabaseError as error:
                logger.error("keeping the previous database credentials: {}", error)
        scene = self.pages.scene
        try:
            sites, handlers = self.reread()
        except ConfigError as error:
            logger.error("keeping the previous configuration: {}", error)
            return
        changed = ", ".join(differing(scene.sites.keys, sites.keys)) or "nothing"
        logger.info("reloaded {}; changed: {}", sites.path, changed)
        scene.sites, self.pages.handlers = sites, handlers
        scene.state.changed += 1  # what is counted by the rules of sites.json is counted again
        self.broadcast(Heard())
        for name in self.pages.hub.topics:
            self.pages.hub.reload(name)  # not all that a page shows of sites.json is in its parts
