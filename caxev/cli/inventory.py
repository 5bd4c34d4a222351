"""Compare a site's directories with the database's entries, for ``caxev stray``.

Both go into a temporary SQLite database on the disk, so that memory is bounded however many files
there are: first the places that entries claim, page by page, then what a walk finds outside of
every claim. Files inside a copy are not compared: that is for ``caxev verify``.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Final, Literal, NamedTuple, Self

from attrs import define, field, frozen

from caxev.cli.interrupts import stop_if_interrupted
from caxev.config import Site
from caxev.files import MOVED_PREFIX, PART_PREFIX
from caxev.files.erasing import GONE_PREFIX, QUARANTINE
from caxev.files.paths import RESERVED
from caxev.files.places import places as every_place

PAGE: Final = 1000
_OURS: Final = RESERVED.encode()
_PART: Final = PART_PREFIX.encode()
GONE: Final = GONE_PREFIX.encode()
MOVED: Final = MOVED_PREFIX.encode()
_ASIDE: Final = QUARANTINE.encode()

Kind = Literal["stray", "leftover"]


class ClaimedPlace(NamedTuple):
    """A place that an entry names; `must`: its files must exist."""

    path: bytes
    must: bool = False
    run: str = ""
    number: int | None = None
    name: str = ""
    type: str = ""
    version: str | None = None
    location: str = ""


class Find(NamedTuple):
    """A file, or a directory with its content, that no entry names.

    `leftover`: an abandoned partial, or files set aside by a copy that is gone. `size` is in bytes.
    `changed` is the last time that anything in it was changed, renamed or moved here, in seconds
    since 1970. `trouble`: why not all of it could be read.
    """

    path: bytes
    kind: Kind
    files: int
    size: int
    changed: float
    trouble: str | None = None


@define
class Inventory:
    """The temporary database. Use it as a context manager."""

    _db: sqlite3.Connection = field(init=False)

    def __attrs_post_init__(self) -> None:
        # With an empty name SQLite makes a file that it removes at the end, even of a crash.
        self._db = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        # No journal and no syncs: after a crash there is nothing to recover. The cache is bounded
        # (16 MiB), the paths are bytes, as file names need not be valid text.
        self._db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16384;"
            "CREATE TABLE claims(path BLOB PRIMARY KEY, must INT, run TEXT, number INT, name TEXT,"
            " type TEXT, version TEXT, location TEXT, seen INT DEFAULT 0) WITHOUT ROWID;"
            "CREATE TABLE finds(id INTEGER PRIMARY KEY, path BLOB, kind TEXT, files INT, size INT,"
            " changed REAL, trouble TEXT);"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    # -- claims -----------------------------------------------------------------------------

    def claim(self, claims: Iterable[ClaimedPlace]) -> None:
        """Store claims; of two claims on one place, one with `must` counts."""
        self._db.execute("BEGIN")
        self._db.executemany(
            "INSERT INTO claims VALUES(?,?,?,?,?,?,?,?,0) ON CONFLICT(path) DO UPDATE SET "
            "must=excluded.must, run=excluded.run, number=excluded.number, name=excluded.name, "
            "type=excluded.type, version=excluded.version, location=excluded.location "
            "WHERE excluded.must > must",
            claims,
        )
        self._db.execute("COMMIT")

    def claimed(self, path: bytes) -> bool:
        """Return whether an entry names that place."""
        found = self._db.execute("SELECT 1 FROM claims WHERE path=?", (path,)).fetchone()
        return found is not None

    def see(self, path: bytes) -> bool:
        """Mark that place as existing; return whether an entry names it."""
        if not self.claimed(path):  # most paths: reading is cheaper than an update that hits none
            return False
        self._db.execute("UPDATE claims SET seen=1 WHERE path=?", (path,))
        return True

    def claimed_below(self, path: bytes) -> bool:
        """Return whether an entry names a place inside of that directory."""
        # A range of the primary key; LIKE would scan the table, and take `_` and `%` for patterns.
        between = (path + b"/", path + b"0")  # 0 is the character after the slash
        query = "SELECT 1 FROM claims WHERE path>? AND path<? LIMIT 1"
        return self._db.execute(query, between).fetchone() is not None

    def musts(self) -> int:
        """Count the copies whose files must exist."""
        return int(self._db.execute("SELECT COUNT(*) FROM claims WHERE must").fetchone()[0])

    def settle(self) -> int:
        """Check the claimed places that the walk did not pass; return how many are missing."""
        # By pages after a key: the loop updates the table that it reads.
        after = b""
        while page := self._unseen(after):
            for claim in page:
                stop_if_interrupted()
                after = claim.path
                if os.path.lexists(claim.path):
                    self._db.execute("UPDATE claims SET seen=1 WHERE path=?", (claim.path,))
        query = "SELECT COUNT(*) FROM claims WHERE must AND NOT seen"
        return int(self._db.execute(query).fetchone()[0])

    def gone(self) -> Iterator[list[ClaimedPlace]]:
        """Return the copies whose files are missing, in pages; after `settle`."""
        after = b""
        while page := self._unseen(after):
            after = page[-1].path
            yield page

    def _unseen(self, after: bytes) -> list[ClaimedPlace]:
        query = (
            "SELECT path, must, run, number, name, type, version, location FROM claims "
            "WHERE path>? AND must AND NOT seen ORDER BY path LIMIT ?"
        )
        return [ClaimedPlace(*row) for row in self._db.execute(query, (after, PAGE))]

    # -- finds ------------------------------------------------------------------------------

    def walk(self, site: Site) -> None:
        """Walk through the directories of a site, which must all exist. Raises OSError."""
        # The rows go to the disk as the walk yields them, in one transaction.
        self._db.execute("BEGIN")
        walk = _Walk(self, _held(site), frozenset(map(_real, site.roots)))
        self._db.executemany(
            "INSERT INTO finds(path, kind, files, size, changed, trouble) VALUES(?,?,?,?,?,?)",
            walk.finds(),
        )
        self._db.execute("COMMIT")

    def finds(self) -> Iterator[list[Find]]:
        """Return the finds, in pages."""
        last = 0
        query = "SELECT * FROM finds WHERE id>? ORDER BY id LIMIT ?"
        while page := self._db.execute(query, (last, PAGE)).fetchall():
            last = page[-1][0]
            yield [Find(*row[1:]) for row in page]


def _held(site: Site) -> dict[bytes, bool]:
    """Return the directories of a site that hold copies, and whether there are versions."""
    return {_real(root): kind in site.types.versioned for kind, root in site.directories.items()}


def _real(path: str) -> bytes:
    return os.fsencode(os.path.realpath(path))


@frozen
class _Walk:
    """A walk through the directories of a site."""

    inventory: Inventory
    held: dict[bytes, bool]
    roots: frozenset[bytes]

    def finds(self) -> Iterator[Find]:
        """Return everything that no entry names."""
        for root, versioned in self.held.items():
            yield from self._below(root, versioned=versioned)

    def _below(self, directory: bytes, *, versioned: bool = False) -> Iterator[Find]:
        with os.scandir(directory) as entries:
            for entry in entries:
                stop_if_interrupted()
                if entry.name.startswith(_OURS):
                    yield from self._of_ours(entry)
                elif self.inventory.see(entry.path):
                    continue  # a copy; what is in it is not walked
                elif not entry.is_dir(follow_symlinks=False):
                    yield measured(entry.path, "stray")
                # A directory of a version is no copy, but contains some; so does one above a copy.
                elif (versioned and entry.name.startswith(b"pax_")) or self._leads_on(entry.path):
                    yield from self._below(entry.path)
                elif entry.path not in self.roots:
                    yield from self._stray(entry.path, "stray")

    def _leads_on(self, path: bytes) -> bool:
        if path in self.roots:
            return False  # it is a root of its own, or contains no copies
        inner = any(root.startswith(path + b"/") for root in self.roots)
        return inner or self.inventory.claimed_below(path)

    def _of_ours(self, entry: os.DirEntry[bytes]) -> Iterator[Find]:
        """Skip what a known copy accounts for, and what belongs to no copy at all."""
        # The quarantine has one directory for each copy, and an entry names each of them.
        if entry.name == _ASIDE and entry.is_dir(follow_symlinks=False):
            with os.scandir(entry.path) as kept:
                found = [one.path for one in kept]
        else:
            found = [entry.path] if entry.name.startswith((_PART, GONE, MOVED)) else []
        for path in found:
            if not any(map(self.inventory.claimed, keepers(path))):
                yield from self._stray(path, "leftover")

    @staticmethod
    def _stray(path: bytes, kind: Kind) -> Iterator[Find]:
        find = measured(path, kind)
        if find.files or find.trouble:  # an empty directory takes no space
            yield find


def keepers(path: bytes) -> Iterator[bytes]:
    """Return the places that account for a path: itself or, for a partial, its copy's."""
    yield path
    directory, name = os.path.split(path)
    if name.startswith(_PART):
        yield os.path.join(directory, name.removeprefix(_PART))


def hidden(path: bytes, prefix: bytes) -> bytes:
    """Return the hidden sibling of a path, with that prefix."""
    directory, name = os.path.split(path)
    return os.path.join(directory, prefix + name)


def copies_of(path: bytes) -> Iterator[bytes]:
    """Return the possible places of the copy to which one of our own files belongs."""
    yield path
    directory, name = os.path.split(path)
    for prefix in (_PART, GONE, MOVED):
        if name.startswith(prefix):
            yield os.path.join(directory, name.removeprefix(prefix))
    if os.path.basename(directory) == _ASIDE:
        copy = name.rpartition(b"@")[0] or name  # without the time at which it was set aside
        yield os.path.join(os.path.dirname(directory), copy.replace(b"%", b"/"))


def measured(path: bytes, kind: Kind) -> Find:
    """Count the files and bytes at a path, without following links, in bounded memory."""
    # ctime and not mtime: transfers set the mtime to that of the source, and a rename into the
    # directory leaves it. An iterator for each level bounds the memory by the depth.
    files, size, changed = 0, 0, 0.0
    trouble: str | None = None
    open_: list[Iterator[os.DirEntry[bytes]]] = []
    try:
        status = os.lstat(path)
        files, size, changed = 1, status.st_size, status.st_ctime
        if os.path.isdir(path) and not os.path.islink(path):
            files = size = 0
            open_.append(os.scandir(path))
        while open_:
            stop_if_interrupted()
            entry = next(open_[-1], None)
            if entry is None:
                open_.pop().close()  # type: ignore[attr-defined]  # what scandir returns
                continue
            status = entry.stat(follow_symlinks=False)
            changed = max(changed, status.st_ctime)
            if entry.is_dir(follow_symlinks=False):
                open_.append(os.scandir(entry.path))
            else:
                files, size = files + 1, size + status.st_size
    except OSError as error:
        trouble = error.strerror or "it cannot be read"
    finally:
        for entries in open_:
            entries.close()  # type: ignore[attr-defined]  # the same
    return Find(path, kind, files, size, changed, trouble)


@lru_cache(maxsize=1024)
def _directory(path: str) -> str:
    return os.path.realpath(path)


def places(location: object) -> Sequence[bytes]:
    """As `caxev.files.places.places`, but each directory is resolved only once."""
    return every_place(location, _directory)
