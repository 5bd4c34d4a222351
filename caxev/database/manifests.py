"""Manifests: what copies consist of, under their digests, in parts that fit into a document."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

from bson import decode_all
from loguru import logger

from caxev.database.client import Document
from caxev.database.connection import operation
from caxev.database.quarantine import Quarantine
from caxev.database.rows import Malformed, Row, carefully, items_from
from caxev.failpoints import point

MANIFEST: Final = 512 << 20
"""Bytes of a manifest: one of a million files has half as many."""
TOGETHER: Final = 4 << 20
"""Bytes of several manifests that are read at once; as objects they take ten times that."""
_PART: Final = 8 << 20
"""Bytes of a manifest's items in one document, about; the largest item is about as large."""


class Manifests(Quarantine):
    """Storing and loading manifests."""

    @operation
    async def store_manifest(self, digest: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Store a manifest's items under its digest."""
        if await self._manifests.find_one({"_id": {"m": digest, "last": True}}, {"_id": 1}):
            return
        parts = list(_in_parts(rows))
        for number, part in enumerate(parts):
            # The part that is marked last is written last: if it is there, all are.
            last = number == len(parts) - 1
            key: Document = {"m": digest, "last": True} if last else {"m": digest, "part": number}
            document = {"m": digest, "part": number, "items": part}
            await self._manifests.replace_one({"_id": key}, document, upsert=True)
            point("database.manifest.after")

    @operation
    async def load_manifest(self, digest: str) -> list[Document] | None:
        """Return a manifest's items, or None if they are not there completely."""
        parts, behind = await self._parts([digest], MANIFEST)
        # A damaged manifest counts as missing: it is made again.
        if behind is not None:
            logger.warning(
                "the manifest {} has more than {:,} bytes: it is not read", digest, MANIFEST
            )
            return None
        # In a thread: the digests of a large run's files would hold up all other calls.
        return await to_thread(self._items, digest, parts.get(digest, []))

    @operation
    async def load_manifests(self, digests: Iterable[str]) -> dict[str, list[Document] | None]:
        """Return the items of several manifests, each as `load_manifest` does.

        Those that would make them more than `TOGETHER` bytes, about, are left out.
        """
        wanted = sorted({*digests})
        parts, behind = await self._parts(wanted, TOGETHER)
        read = [one for one in wanted if behind is None or one < behind]
        return await to_thread(lambda: {one: self._items(one, parts.get(one, [])) for one in read})

    async def _parts(
        self, digests: Sequence[str], most: int
    ) -> tuple[dict[str, list[Document]], str | None]:
        """Read the parts of manifests; also return the first that was not read whole, if any.

        That is if they are more than `most` bytes, about.
        """
        parts: dict[str, list[Document]] = {}
        size = 0
        query, options = {"m": {"$in": digests}}, self._manifests.codec_options
        async for one in self._manifests.find_raw_batches(query, sort=[("m", 1)], batch_size=100):
            batch = cast("bytes", one)  # whatever its type says
            for part in decode_all(batch, options):
                if isinstance(part["m"], str):  # a list that holds the digest is found, too
                    parts.setdefault(part["m"], []).append(part)
            size += len(batch)
            if size > most:
                return parts, max(parts)
        return parts, None

    def _items(self, digest: str, found: Sequence[Document]) -> list[Document] | None:
        """Return the items in the parts of a manifest; None if these are not all, or damaged."""
        parts = [part for _, part in self._read(self._manifests, found, part_from)]
        if len(parts) < len(found) or not any(part["_id"].get("last") for part in parts):
            return None
        parts.sort(key=lambda part: int(part["part"]))
        try:
            return carefully(lambda _: items_from(digest, parts), None)
        except Malformed as error:
            for part in parts:
                self._skip(self._manifests, part, str(error), _never)
            return None


def part_from(document: Document) -> None:
    """Read a part of a manifest."""
    row = Row.of(document)
    Row.of(document.get("_id"))
    row.whole("part")
    for item in row.many("items"):
        Row.of(item)


def _never(_document: Document) -> None:
    raise Malformed("its items do not match its digest")


def _in_parts(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    part: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        part.append(row)
        size += 256 + sum(len(value) for value in row.values() if isinstance(value, bytes))
        if size >= _PART:
            yield part
            part, size = [], 0
    yield part
