"""Staging of data for tape: one flat directory, as an archive's client needs it.

Each file is named ``<run>_<file>``, as cax named it, so that a file on tape shows its run. The
files are hard links to the source or, if that is not possible, share its blocks, or are copies.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from caxev import failpoints
from caxev.core.errors import GiveUp, Retry
from caxev.files import (
    Confined,
    Item,
    Manifest,
    beside,
    forget_lock,
    join,
    local,
    open_resolved,
    parent,
    printable,
    writing,
)
from caxev.files.incoming import link_file
from caxev.files.ways import cloned, tried
from caxev.tape.base import Stored, Transcript

_UNFINISHED: Final = ".caxev-part-"


def name_on_tape(run: str, path: bytes) -> str:
    """Return the name of a run's file on tape. Raises `GiveUp` if a client cannot handle it."""
    try:
        name = path.decode()
    except UnicodeDecodeError:
        name = "\n"
    if not name.isprintable() or "/" in name or "/" in run:
        raise GiveUp(f"{printable(path)} has a name that no tape client takes")
    return f"{run}_{name}"


def name_off_tape(run: str, name: str) -> bytes:
    """Return the name of a file on disk. Raises `GiveUp` if it is not of that run."""
    prefix = f"{run}_"
    if not name.startswith(prefix) or name == prefix or "/" in name:
        raise GiveUp(f"the archive holds {printable(name.encode())}, which is not of {run}")
    return name.removeprefix(prefix).encode()


def fit_for_tape(manifest: Manifest) -> str | None:
    """Return why data cannot go to tape, or None: flat, not empty, no two equal files."""
    # Equal files are a sign of a broken run: the DAQ wrote one file twice.
    others = [item for item in manifest.items if item.kind != "file"]
    if others:
        return f"it is not flat: {printable(others[0].path)} is a {_KINDS[others[0].kind]}"
    if not manifest.items:
        return "it holds no file"
    if manifest.items[0].path == b"":
        return "it is a file, not a directory"
    alike = _alike(manifest.items)
    if alike:
        return f"{' and '.join(printable(path) for path in alike[:2])} are alike"
    return None


_KINDS: Final = {"dir": "directory", "link": "link"}


def _alike(items: Sequence[Item]) -> list[bytes]:
    digests = Counter((item.size, item.blake3) for item in items)
    twice = next((digest for digest, times in digests.items() if times > 1), None)
    return [item.path for item in items if (item.size, item.blake3) == twice]


def on_tape(run: str, manifest: Manifest) -> list[Stored]:
    """Return the files of a manifest by their names on tape."""
    return [Stored(name_on_tape(run, item.path), item.size) for item in manifest.files]


def stage(
    source: Confined, staged: Confined, names: Mapping[str, str], transcript: Transcript
) -> None:
    """Fill `staged` with the files of `source` under their new names (new: old), and no others.

    A staged file is kept if it is the same file, or a copy of the same size and time. The directory
    is locked meanwhile. Raises `Retry` for errors of the disk.
    """
    with local(staged, "stage"), writing(staged, directory=True):
        for name in set(map(os.fsdecode, os.listdir(staged))) - names.keys():
            _take_away(join(staged, os.fsencode(name)))
        done = 0
        for new, old in names.items():
            done += _place(join(source, os.fsencode(old)), join(staged, os.fsencode(new)))
            transcript.at(done)
        failpoints.point("tape.staged")


def _place(old: Confined, new: Confined) -> int:
    """Make `new` the same file as `old`, or a copy of it; returns its size in bytes."""
    status = os.stat(old, follow_symlinks=False)
    with suppress(FileNotFoundError):
        there = os.stat(new, follow_symlinks=False)
        same_time = (there.st_size, there.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
        # The time has nanoseconds, and a copy gets it only when it is complete.
        if os.path.samestat(there, status) or same_time:
            return status.st_size
        _take_away(new)
    if not tried(link_file, old, new):
        _copy(old, new, status)
    return status.st_size


def _copy(old: Confined, new: Confined, status: os.stat_result) -> None:
    unfinished = beside(new, _UNFINISHED)
    # Others may write to the source's directory: a link that replaces a file is not followed.
    descriptor = open_resolved(old, os.O_RDONLY)
    with os.fdopen(descriptor, "rb") as reading, open(unfinished, "wb") as writing_:
        if not cloned(reading.fileno(), writing_.fileno()):
            shutil.copyfileobj(reading, writing_, 8 << 20)
        writing_.flush()
        os.fsync(writing_.fileno())
        changed = os.fstat(descriptor).st_mtime_ns != status.st_mtime_ns
    if changed:
        raise Retry(f"{printable(old)} changed while it was staged")
    # The source's time marks a complete copy for the next attempt, so it is set last.
    os.utime(unfinished, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.rename(unfinished, new)


def _take_away(path: Confined) -> None:
    # We never make directories there: one is somebody else's, and is not removed.
    if os.path.isdir(path) and not os.path.islink(path):
        raise Retry(f"there is a directory in {printable(parent(path))}, which is for staging")
    os.unlink(path)


def clear(path: Confined) -> None:
    """Remove a directory that was filled for a client, if it exists. Idempotent."""
    with local(path, "remove"):
        with suppress(FileNotFoundError):
            for name in os.listdir(path):
                _take_away(join(path, name))
            os.rmdir(path)
        forget_lock(path)
