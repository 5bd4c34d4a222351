"""Run ``caxev backup`` and ``restore``: what only caxev has, in one file."""

from __future__ import annotations

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from caxev import __version__
from caxev.cli.command import command
from caxev.cli.options import options
from caxev.cli.output import columns, show
from caxev.config import ConfigError
from caxev.core.clock import utcnow
from caxev.files import process_lock

if TYPE_CHECKING:
    from caxev.database import Database

FORMAT: Final = 1
_COLUMNS = columns("collection", "documents")


@command("caxev backup /var/backups/caxev.bak")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def backup(*, file: Path) -> None:
    """Write the ledger, requests, manifests and history to FILE, as at one point in time.

    Listeners may run meanwhile. FILE holds names of runs and output of programs, and is
    readable for its owner only. It is replaced when the new one is complete. Back up the runs
    collection by MongoDB's own means.
    """
    place = file.resolve()
    if place.exists():
        _sure_regular(place)  # the new file would take the place of /dev/null
    with process_lock(b"backup " + os.fsencode(place), f"another backup is writing {file}"):
        counts = _written(place)
    show(_COLUMNS, _rows(counts))


def _sure_regular(file: Path) -> None:
    if not file.is_file():
        raise click.UsageError(f"{file} is no regular file")


def _written(file: Path) -> Counter[str]:
    """Write the file; return how many documents of each collection it has."""
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
    return counts


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
    _sure_regular(file)  # it is read twice
    head = _checked(file)  # all of it, before anything is written
    counts = options().with_database(_restore, file, head, force=force)
    show(_COLUMNS, _rows(counts))


def _checked(file: Path) -> dict[str, Any]:
    """Read all of a back-up; return its head. Raises `WrongSchema` if it is of a newer caxev."""
    from caxev.database.client import WrongSchema
    from caxev.database.schema import KEY, SCHEMA

    head: dict[str, Any] = {}
    for name, document in _documents(file, head):
        number = document.get("number")
        is_schema = name == "ledger" and document.get("_id") == KEY
        if is_schema and not (isinstance(number, int) and number <= SCHEMA):
            raise WrongSchema(
                f"{file} has schema {number!r}, and this caxev knows {SCHEMA}: restore it with the "
                f"version that wrote it, {head.get('version')}"
            )
    return head


async def _restore(
    database: Database, file: Path, head: Mapping[str, Any], *, force: bool
) -> dict[str, int]:
    settings = database.settings
    source = f"{head.get('database')}.{head.get('runs')}"
    here = f"{settings.database}.{settings.collection}"
    # It would replace reactions to other runs.
    if force and source != here:
        raise ConfigError(
            f"{file} is of {source}, and would replace the ledger of {here}: choose another by "
            f"--database and --collection, or drop the collections {settings.prefix}* first"
        )
    return await database.restore(_documents(file), force=force)


def _documents(
    file: Path, head: dict[str, Any] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return a back-up's documents with their collections; `head` gets the line before them.

    Raises `ConfigError` if it is none.
    """
    try:
        with gzip.open(file) as data:
            yield from _read(data, {} if head is None else head)
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise ConfigError(f"{file} is no complete back-up of caxev: {error}") from error


def _read(data: gzip.GzipFile, head: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    from bson import CodecOptions, decode
    from bson.errors import BSONError

    from caxev.database.backup import split
    from caxev.database.setup import OWN

    aware: CodecOptions[dict[str, Any]] = CodecOptions(tz_aware=True)
    try:
        rows = (decode(one, aware) for one in split(data.read))
        head.update(next(rows, {}))
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
