"""Send what changed to all who watch a view: rendered once, however many they are.

A viewer whose connection takes nothing for a while is dropped, so that it costs no memory; its
browser connects again and gets everything that differs from what it has seen.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final, TypeAlias

import trio
from attrs import define, field
from loguru import logger

from caxev.core.errors import GiveUp
from caxev.database import DatabaseError
from caxev.web.rendering import plain

BEHIND: Final = 16
"""Messages that may wait for a viewer: four seconds of changes."""

MOST_VIEWERS: Final = 500
"""Browsers that may watch at once: each has a connection, and memory for what waits."""
SHARE: Final = MOST_VIEWERS // 2
"""Those of one person, or of one address if nobody logs in."""
SPARE: Final = MOST_VIEWERS // 4
"""Those that are left to people who do not watch yet."""

Render: TypeAlias = Callable[[], Awaitable[Mapping[str, Any]]]
"""Makes the parts of a view: HTML, or what JSON holds. Raises `GiveUp` if there is no more."""


def message(kind: str, data: object, number: str | None = None) -> bytes:
    """Return a server-sent event."""
    text = json.dumps(data, default=plain, separators=(",", ":"))
    head = f"id: {number}\n" if number else ""
    return f"{head}event: {kind}\ndata: {text}\n\n".encode("utf-8", "backslashreplace")


def digest(parts: Mapping[str, Any]) -> str:
    """Return what a viewer that has these parts shows, in few characters."""
    text = json.dumps(parts, default=plain, sort_keys=True)
    return blake2b(text.encode("utf-8", "backslashreplace"), digest_size=9).hexdigest()


@define(eq=False)
class Viewer:
    """One open connection of a person, or from an address. Cancelling `scope` ends it."""

    send: trio.MemorySendChannel[bytes]
    scope: trio.CancelScope
    who: str = ""


@define(eq=False)
class Topic:
    """A view that somebody watches, and its parts as they were sent last."""

    render: Render
    viewers: set[Viewer] = field(factory=set)
    parts: dict[str, Any] = field(factory=dict)
    # One rendering at a time: of two the older one could end last.
    _rendering: trio.Lock = field(init=False, factory=trio.Lock)

    def send(self, data: bytes, viewers: Iterable[Viewer] | None = None) -> None:
        """Send a message to these viewers, or all; drop those who lag too far behind."""
        for viewer in list(self.viewers if viewers is None else viewers):
            try:
                viewer.send.send_nowait(data)
            except trio.WouldBlock:
                logger.debug("a viewer is too slow: dropped")
                self.viewers.discard(viewer)
                viewer.scope.cancel()

    async def begin(self) -> None:
        """Render the view, unless it was rendered."""
        if not self.parts:
            async with self._rendering:
                self.parts = self.parts or dict(await self.render())

    async def refresh(self) -> None:
        """Render the view, and send the parts that changed."""
        async with self._rendering:
            try:
                parts = dict(await self.render())
            except GiveUp:
                self.send(message("reload", {}))
                return
            except DatabaseError as error:
                # Viewers keep what they have; all is rendered again when the database is back.
                logger.debug("a view is not up to date: {}", error)
                return
            former, self.parts = self.parts, parts
        if former and parts.keys() != former.keys():
            # A part came or went: only a whole page has it in its place.
            self.send(message("reload", {}, digest(parts)))
        elif changed := {name: one for name, one in parts.items() if former.get(name) != one}:
            self.send(message("parts", changed, digest(parts)))


@define(eq=False)
class Hub:
    """The views that are watched now, by name."""

    topics: dict[str, Topic] = field(factory=dict)
    _woken: trio.Event = field(init=False, factory=trio.Event)
    _dirty: set[str] = field(init=False, factory=set)

    @property
    def viewers(self) -> int:
        """How many connections are open."""
        return sum(len(topic.viewers) for topic in self.topics.values())

    def has_room(self, who: str) -> bool:
        """Return whether a person, or an address, may watch once more: nobody keeps others out."""
        of_all = [viewer.who for topic in self.topics.values() for viewer in topic.viewers]
        of_it = of_all.count(who)
        return of_it < SHARE and len(of_all) < (MOST_VIEWERS - SPARE if of_it else MOST_VIEWERS)

    def wake(self, *names: str) -> None:
        """Have these views rendered again."""
        self._dirty.update(names)
        self._woken.set()

    def send_rows(self, topic: str, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of a list to those who watch it."""
        if rows and topic in self.topics:
            self.topics[topic].send(message(kind, rows))

    def reload(self, topic: str) -> None:
        """Have those who watch a view ask for the whole of it again."""
        self.topics[topic].send(message("reload", {}))

    async def run(self) -> None:
        """Render views as they become outdated, until cancelled."""
        while True:
            await self._woken.wait()
            self._woken = trio.Event()
            names, self._dirty = self._dirty, set()
            for name in names:
                # Looked up only now: its last viewer may have left while another was rendered.
                if (topic := self.topics.get(name)) is not None:
                    await topic.refresh()
                    # Most views render without waiting: let requests be answered in between.
                    await trio.lowlevel.checkpoint()

    async def join(self, name: str, render: Render, viewer: Viewer, seen: str | None) -> None:
        """Add a viewer that has seen the parts with this digest; None: those of no page."""
        topic = self.topics.setdefault(name, Topic(render))
        # First: a view without viewers ends, and what changes from now on is sent.
        topic.viewers.add(viewer)
        await topic.begin()
        now = digest(topic.parts)
        if topic.parts and seen != now:
            topic.send(message("parts", topic.parts, now), [viewer])

    def leave(self, name: str, viewer: Viewer) -> None:
        """Forget a viewer, and its view if it was the last."""
        topic = self.topics.get(name)
        if topic is None:
            return
        topic.viewers.discard(viewer)
        if not topic.viewers:
            del self.topics[name]
