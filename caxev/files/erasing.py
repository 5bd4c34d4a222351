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
from caxev.files.confined import Confined, beside, join, parent
from caxev.files.errors import Replaced, meaning
from caxev.files.identity import identity, is_same, remove_marked
from caxev.files.manifest import Manifest
from caxev.files.paths import RESERVED, confine_entry, confine_own, inside, printable, root_of
from caxev.files.publishing import make_above, rename_new
from caxev.files.resolved import remove, sync
from caxev.files.tree import scan

GONE_PREFIX: Final = f"{RESERVED}gone-"
"""The prefix of a copy that is being erased: no program takes it for a copy."""
MOVED_PREFIX: Final = f"{RESERVED}moved-"
"""The prefix of old files that ``caxev mv`` has copied and will remove."""
NOTHING: Final = "nothing"
"""The mark of an empty place: files that appear there later are not the copy's."""
QUARANTINE: Final = f"{RESERVED}quarantine"
"""The directory, below a site's root, for files on whose content no majority of copies agrees."""


def standing(location: str, roots: Sequence[str], shape: Manifest | None) -> str:
    """Return the `identity` of what is at `location`, or `NOTHING`.

    Raises `GiveUp` for a path that leads out of the roots, or if it does not have the `shape`
    (None: any); `Retry` if the disk fails.
    """
    path = confine_entry(location, roots)
    mark = _identity(path)
    if mark is not None and shape is not None and (differ := shape.differences(scan(path))):
        what = f"{differ[0]} ({len(differ)} in all)"
        raise GiveUp(f"{printable(path)} is not what its manifest lists: {what}")
    return mark or NOTHING


def erase(location: str, roots: Sequence[str], mark: str | None) -> None:
    """Erase the copy at `location`, a directory or a file strictly inside one of `roots`.

    It must be what `standing` found there, by its `mark`. A link is erased and not followed. If
    nothing is there, that is no error. Raises `GiveUp` for a path that leads out of the roots,
    `Retry` if the disk fails, `Replaced` if something else is there: it stays, and the copy itself
    is gone.
    """
    # A rename first, which is atomic: readers see the whole copy or none. Removing the bytes may
    # take long and may be interrupted, and what is left under the hidden name is no copy.
    path = confine_entry(location, roots)
    directory, gone = parent(path), beside(path, GONE_PREFIX)
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
        raise meaning(error, f"cannot erase {printable(path)}") from error
    if is_replaced:
        raise Replaced(f"{printable(path)} is not erased: something else stands there by now")


def _take_name(path: Confined, gone: Confined, mark: str | None) -> bool:
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
    sync(parent(path))
    failpoints.point("files.erase.rename")
    return True


def _identity(path: Confined) -> str | None:
    try:
        return identity(path)
    except OSError as error:
        raise meaning(error, f"cannot look at {printable(path)}") from error


def distinct(location: str, roots: Sequence[str], others: Sequence[str]) -> list[int]:
    """Number the copies at `others` so that copies which share files have the same number.

    They share them by another name of a directory or by hard links. 0 means: with the copy at
    `location`. A copy that cannot be read gets a number of its own. Raises `GiveUp` if `location`
    leads out of the `roots`.
    """
    groups: list[set[tuple[int, int]]] = [_inodes(confine_entry(location, roots))]
    numbers = []
    for other in others:
        # Not confined, as another site's: nothing of it is read but inode numbers.
        found = _inodes(os.fsencode(os.path.realpath(other)))
        number = next((n for n, group in enumerate(groups) if group & found), len(groups))
        if number == len(groups):
            groups.append(set())
        groups[number] |= found
        numbers.append(number)
    return numbers


def _inodes(path: bytes) -> set[tuple[int, int]]:
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
) -> str:
    """Move these files of the copy at `location` to the quarantine; return the path there.

    `paths` are relative to the copy (all of it: ``b""``), which must be what `standing` found
    there, by its `mark`; `when`: the time of that decision (UTC). Missing files, and those in the
    quarantine already, are skipped. Raises `GiveUp` for a path that leads out of the copy or of the
    roots, `Retry` if the disk fails, `Replaced` if another copy is there, which stays as it is.
    """
    path, target = confine_entry(location, roots), quarantine_of(location, roots, when)
    try:
        for one in paths:
            old, new = _within(path, one), _within(target, one or os.path.basename(path))
            if os.path.lexists(old) and not is_same(identity(path), mark):
                raise Replaced(f"{printable(path)} is not what was to be set aside: look again")
            _move(old, new)
    except OSError as error:
        raise meaning(error, f"cannot set {printable(path)} aside") from error
    return os.fsdecode(target)


def quarantine_of(location: str, roots: Sequence[str], when: datetime | None) -> Confined:
    """Return where `set_aside` puts the files of a copy. Raises `GiveUp` as it does."""
    # The time is part of the name, so that a late removal of an earlier one's files cannot hit
    # those of a later one.
    path = confine_entry(location, roots)
    root = root_of(path, roots)
    stamp = "" if when is None else f"@{when:%Y%m%dT%H%M%S%f}"
    flat = os.path.relpath(path, root).replace(b"/", b"%")
    return join(root, b"/".join((QUARANTINE.encode(), flat + stamp.encode())))


def empty_quarantine(place: str, roots: Sequence[str]) -> None:
    """Remove the files at `place`, a path that `set_aside` returned.

    Raises `GiveUp` if that is in no quarantine of these roots, `Retry` if the disk fails.
    """
    path = confine_own(place, roots)
    homes = [os.fsencode(os.path.join(os.path.realpath(root), QUARANTINE)) for root in roots]
    if parent(path) not in homes:
        raise GiveUp(f"{printable(path)} is in no quarantine of this site")
    try:
        remove(path)
    except OSError as error:
        raise meaning(error, f"cannot remove {printable(path)}") from error


def _within(top: Confined, path: bytes) -> Confined:
    """Return a path below `top`, links above it resolved. Raises `GiveUp` if it leads out."""
    inner = join(top, path)
    above = os.path.realpath(parent(inner))
    if path.startswith(b"/") or (top not in (inner, above) and not inside(above, top)):
        raise GiveUp(f"{printable(path)} leads out of {printable(top)}")
    return inner


def _move(old: Confined, new: Confined) -> None:
    if not os.path.lexists(old) or os.path.lexists(new):
        return
    make_above(new)
    failpoints.point("files.aside.rename")
    rename_new(old, new)
    # The new name reaches the disk first: a power cut may leave both names, but never none.
    sync(parent(new))
    sync(parent(old))
    failpoints.point("files.aside.rename")
