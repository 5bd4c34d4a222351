"""Erase a copy or move it to the quarantine, and never touch anything else.

Runs in a worker process. Each function can be called again if it was killed at any point.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from caxev import failpoints
from caxev.core.errors import GiveUp
from caxev.files.errors import Replaced, meaning
from caxev.files.identity import identity, is_same, remove_marked
from caxev.files.manifest import Manifest
from caxev.files.paths import RESERVED, confine_own, inside, is_held, own_name, printable
from caxev.files.publishing import DIR_MODE, rename_new
from caxev.files.reading import Report
from caxev.files.resolved import mkdir, remove, sync
from caxev.files.tree import scan

GONE_PREFIX: Final = f"{RESERVED}gone-"
"""The prefix of a copy that is being erased: no program takes it for a copy."""
MOVED_PREFIX: Final = f"{RESERVED}moved-"
"""The prefix of old files that ``caxev mv`` has copied and will remove."""
NOTHING: Final = "nothing"
"""The mark of an empty place: whatever appears there later is something else."""
QUARANTINE: Final = f"{RESERVED}quarantine"
"""The directory, below a site's root, for files on whose content no majority of copies agrees."""


def standing(location: str, roots: Sequence[str], shape: Manifest | None, *, report: Report) -> str:
    """Return the `identity` of what is at `location`, or `NOTHING`.

    Raises `GiveUp` for a path that leads out of the roots, or if it does not have the `shape`
    (None: any); `Retry` if the disk fails.
    """
    path = _own(location, roots)
    mark = _identity(path)
    if mark is not None and shape is not None and (differ := shape.differences(scan(path))):
        what = f"{differ[0]} ({len(differ)} in all)"
        raise GiveUp(f"{_shown(path)} is not what its manifest lists: {what}")
    report(1, 1)
    return mark or NOTHING


def erase(location: str, roots: Sequence[str], mark: str | None, *, report: Report) -> None:
    """Erase the copy at `location`, a directory or a file strictly inside one of `roots`.

    It must be what `standing` found there, by its `mark`. A link is erased and not followed. If
    nothing is there, that is no error. Raises `GiveUp` for a path that leads out of the roots,
    `Retry` if the disk fails, `Replaced` if something else is there: it stays, and the copy itself
    is gone.
    """
    # A rename first, which is atomic: readers see the whole copy or none. Removing the bytes may
    # take long and may be interrupted, and what is left under the hidden name is no copy.
    path = _own(location, roots)
    directory, name = os.path.split(path)
    gone = os.path.join(directory, GONE_PREFIX + name)
    try:
        is_replaced = os.path.lexists(path) and not _take_name(path, gone, mark)
        if mark not in (None, NOTHING) and not remove_marked(gone, mark):
            # An earlier call renamed something else by mistake, and was killed before it could undo
            # that. If the name is taken by now, `caxev stray` will report the hidden one.
            is_replaced = True
            if not os.path.lexists(path):
                rename_new(gone, path)
        if os.path.isdir(directory):
            sync(directory)
        failpoints.point("files.erase.done")
    except OSError as error:
        raise meaning(error, f"cannot erase {_shown(path)}") from error
    if is_replaced:
        raise Replaced(f"{_shown(path)} is not erased: something else stands there by now")
    report(1, 1)


def _take_name(path: str, gone: str, mark: str | None) -> bool:
    """Rename to `gone` what is at `path`, if it has the `mark`; return whether it had."""
    # A rename goes by name, and another process may put something else there after our check. So
    # check again what was renamed, and undo the rename if it was not meant.
    left = identity(gone)
    if not is_same(identity(path), mark):
        return False
    if left is not None:  # left by an earlier copy of that name, as ours still has its own
        remove_marked(gone, left)
    failpoints.point("files.erase.rename")
    rename_new(path, gone)
    if not is_same(identity(gone), mark):
        rename_new(gone, path)
        return False
    sync(os.path.dirname(path))
    failpoints.point("files.erase.rename")
    return True


def _identity(path: str) -> str | None:
    try:
        return identity(path)
    except OSError as error:
        raise meaning(error, f"cannot look at {_shown(path)}") from error


def distinct(
    location: str, roots: Sequence[str], others: Sequence[str], *, report: Report
) -> list[int]:
    """Number the copies at `others` so that copies which share files have the same number.

    They share them by another name of a directory or by hard links. 0 means: with the copy at
    `location`. A copy that cannot be read gets a number of its own.
    """
    report(0, 1)
    groups: list[set[tuple[int, int]]] = [_inodes(_own(location, roots))]
    numbers = []
    for other in others:
        found = _inodes(os.path.realpath(other))
        number = next((n for n, group in enumerate(groups) if group & found), len(groups))
        if number == len(groups):
            groups.append(set())
        groups[number] |= found
        numbers.append(number)
    report(1, 1)
    return numbers


def _inodes(path: str) -> set[tuple[int, int]]:
    found = set()
    for top, _, names in os.walk(path):
        for name in names:
            status = os.lstat(os.path.join(top, name))
            found.add((status.st_dev, status.st_ino))
    if not found and os.path.lexists(path):
        status = os.lstat(path)
        found.add((status.st_dev, status.st_ino))
    return found


def set_aside(
    location: str,
    roots: Sequence[str],
    paths: Sequence[bytes],
    when: datetime | None,
    mark: str | None,
    *,
    report: Report,
) -> str:
    """Move these files of the copy at `location` to the quarantine; return the path there.

    `paths` are relative to the copy (all of it: ``b""``), which must be what `standing` found
    there, by its `mark`; `when`: the time of that decision (UTC). Missing files, and those in the
    quarantine already, are skipped. Raises `GiveUp` for a path that leads out of the copy or of the
    roots, `Retry` if the disk fails, `Replaced` if another copy is there, which stays as it is.
    """
    path, target = _own(location, roots), quarantine_of(location, roots, when)
    try:
        for number, one in enumerate(paths):
            old = os.path.join(os.fsencode(path), one) if one else os.fsencode(path)
            new = os.path.join(os.fsencode(target), one or os.fsencode(os.path.basename(path)))
            _check_within(old, os.fsencode(path))
            _check_within(new, os.fsencode(target))
            if os.path.lexists(old) and not is_same(identity(path), mark):
                raise Replaced(f"{_shown(path)} is not what was to be set aside: look again")
            _move(os.fsdecode(old), os.fsdecode(new))
            report(number + 1, len(paths))
    except OSError as error:
        raise meaning(error, f"cannot set {_shown(path)} aside") from error
    return target


def quarantine_of(location: str, roots: Sequence[str], when: datetime | None) -> str:
    """Return where `set_aside` puts the files of a copy. Raises `GiveUp` as it does."""
    # The time is part of the name, so that a late removal of an earlier one's files cannot hit
    # those of a later one.
    path = _own(location, roots)
    stamp = "" if when is None else f"@{when:%Y%m%dT%H%M%S%f}"
    return os.path.join(_root_of(path, roots), QUARANTINE, _flat(path, roots) + stamp)


def empty_quarantine(place: str, roots: Sequence[str], *, report: Report) -> None:
    """Remove the files at `place`, a path that `set_aside` returned.

    Raises `GiveUp` if that is in no quarantine of these roots, `Retry` if the disk fails.
    """
    path = confine_own(place, roots)
    homes = [os.path.join(os.path.realpath(root), QUARANTINE) for root in roots]
    if not any(os.path.dirname(path) == home for home in homes):
        raise GiveUp(f"{_shown(path)} is in no quarantine of this site")
    try:
        remove(path)
    except OSError as error:
        raise meaning(error, f"cannot remove {_shown(path)}") from error
    report(1, 1)


def _own(location: str, roots: Sequence[str]) -> str:
    """Return a copy's path inside the roots: its directory resolved, its own name as it is."""
    # A copy that is a link is itself erased or moved, not what it points to.
    name = own_name(location)
    if not location.startswith("/") or "\0" in location:
        raise GiveUp(f"{_shown(location)} is not an absolute path")
    directory = os.path.realpath(os.path.dirname(location.rstrip("/")))
    path = os.path.join(directory, name)
    if not os.path.islink(path):
        return confine_own(path, roots)
    if not is_held(path, roots):
        raise GiveUp(f"{_shown(path)} is not inside any directory of this site")
    return path


def _root_of(path: str, roots: Sequence[str]) -> str:
    real = [os.path.realpath(root) for root in roots]
    holding = [root for root in real if inside(os.fsencode(path), os.fsencode(root))]
    return max(holding, key=len)


def _flat(path: str, roots: Sequence[str]) -> str:
    """Return a copy's path below its root as a single name."""
    return os.path.relpath(path, _root_of(path, roots)).replace("/", "%")


def _check_within(path: bytes, top: bytes) -> None:
    above = os.path.realpath(os.path.dirname(path))
    if top not in (path, above) and not inside(above, top):
        raise GiveUp(f"{printable(path)} leads out of {printable(top)}")


def _move(old: str, new: str) -> None:
    if not os.path.lexists(old) or os.path.lexists(new):
        return
    missing, above = [], os.path.dirname(new)
    while not os.path.isdir(above):
        missing.append(above)
        above = os.path.dirname(above)
    for directory in reversed(missing):
        mkdir(directory, DIR_MODE)
    failpoints.point("files.aside.rename")
    rename_new(old, new)
    # The new name reaches the disk first: a power cut may leave both names, but never none.
    sync(os.path.dirname(new))
    sync(os.path.dirname(old))
    failpoints.point("files.aside.rename")


def _shown(path: str) -> str:
    return printable(os.fsencode(path))
