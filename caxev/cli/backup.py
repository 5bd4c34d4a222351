"""Run ``caxev backup`` and ``restore``: what only caxev has, in one file."""

from __future__ import annotations

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from caxev import __version__
from caxev.cli.command import command
from caxev.cli.options import options
from caxev.cli.output import Table, columns, show
from caxev.config import ConfigError
from caxev.core.clock import utcnow

if TYPE_CHECKING:
    from caxev.database import Database

FORMAT: Final = 1
_COLUMNS = columns("collection", "documents")


@command("caxev backup /var/backups/caxev.bak")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def backup(*, file: Path) -> None:
    """Write the ledger, requests, manifests and history to FILE, as at one point in time.

    Listeners may go on meanwhile. FILE holds names of runs and what programs printed, and is
    readable for its owner only. It is replaced when the new one is complete. Back up the runs
    collection by MongoDB's own means.
    """
    partial = file.with_name(f".{file.name}.part")
    counts: Counter[str] = Counter()
    try:
        with _opened(partial) as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as out:
            options().with_database(_write, out, counts)
        os.replace(partial, file)  # noqa: PTH105  # atomic
        _sync(file.parent)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    show(Table(_COLUMNS, _rows(counts)))


def _opened(path: Path) -> IO[bytes]:
    path.unlink(missing_ok=True)
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: PTH123


async def _write(database: Database, out: gzip.GzipFile, counts: Counter[str]) -> None:
    from bson import encode

    settings = database.settings
    head = {"caxev": FORMAT, "version": __version__, "begun": utcnow()}
    out.write(encode({**head, "database": settings.database, "runs": settings.collection}))

    def keep(name: str, document: bytes) -> None:
        counts[name] += 1
        out.write(encode({"collection": name}))
        out.write(document)

    await database.back_up(keep)
    out.write(encode({"end": dict(counts)}))
    out.flush()
    raw: Any = out.fileobj
    raw.flush()
    os.fsync(raw.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@command("caxev restore /var/backups/caxev.bak", "caxev restore caxev.bak --force")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace what the ledger holds now.")
def restore(*, file: Path, force: bool) -> None:
    """Write a back-up's ledger, requests, manifests and history to the database.

    Stop all listeners first. Their next start scans all runs, which may be newer or older than
    the back-up: reactions go by the runs as they are, so nothing is deleted for what the
    restored ledger remembers. Needs an administrator's login.
    """
    for _ in _documents(file):  # all of it, before anything is written
        pass
    counts = options().with_database(_restore, file, force=force)
    show(Table(_COLUMNS, _rows(counts)))


async def _restore(database: Database, file: Path, *, force: bool) -> dict[str, int]:
    return await database.restore(_documents(file), force=force)


def _documents(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return a back-up's documents with their collections. Raises `ConfigError` if it is none."""
    try:
        with gzip.open(file) as data:
            yield from _read(data)
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise ConfigError(f"{file} is no complete back-up of caxev: {error}") from error


def _read(data: gzip.GzipFile) -> Iterator[tuple[str, dict[str, Any]]]:
    from bson import CodecOptions, decode
    from bson.errors import BSONError

    from caxev.database.backup import split
    from caxev.database.setup import OWN

    aware: CodecOptions[dict[str, Any]] = CodecOptions(tz_aware=True)
    try:
        rows = (decode(one, aware) for one in split(data.read))
        head = next(rows, {})
        if head.get("caxev") != FORMAT:
            raise ValueError(f"its format is {head.get('caxev')}, and this version reads {FORMAT}")
        counts: Counter[str] = Counter()
        for row in rows:
            if "end" in row:
                if row["end"] != dict(counts):
                    raise ValueError("documents are missing")
                if data.read(1):  # to the end, where the checksum is
                    raise ValueError("it goes on after its end")
                return
            if (name := row["collection"]) not in OWN:
                raise ValueError(f"it has a collection {name!r}")
            counts[name] += 1
            yield name, next(rows)
    except (BSONError, StopIteration) as error:
        raise ValueError("it is damaged") from error
    raise ValueError("its end is missing")


def _rows(counts: dict[str, int] | Counter[str]) -> list[dict[str, Any]]:
    return [{"collection": name, "documents": number} for name, number in counts.items()]
