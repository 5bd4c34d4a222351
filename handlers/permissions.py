"""Mode, group and ACL of copies, as the site configures them for their type of data.

`set_permission` reacts to a copy that became good at this site, and applies ``permissions`` of
sites.json to it. The run is not changed.

Safe to repeat: it sets the same values again. It neither follows nor changes links, and never
leaves the site's directories. The umask of this process has no effect.
"""

from __future__ import annotations

import errno
import grp
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from caxev import (
    HERE,
    TRANSFERRED,
    Copy,
    Denied,
    GiveUp,
    Job,
    Result,
    Retry,
    Skip,
    copy,
    on,
    skip_of,
)
from caxev.config import Permission, Site
from caxev.files import Confined, confine, opened, printable
from caxev.program import Program, run

KEPT = 0o2000
"""The set-group-ID bit, which gives new files in a directory its group; never cleared."""
# Others may put a link or a FIFO in a file's place after it was listed.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MANY = 200
"""Maximum number of files held open for one call of setfacl."""


@on(
    copy(TRANSFERRED, host=HERE),
    lane="disk",
    aliases=("SetPermission",),
    needs=("permissions",),
    decide=lambda job: skip_of(plan_permission(job.copy, job.site)),
)
async def set_permission(job: Job) -> Result:
    """Set the mode, group and ACL of a new copy as ``permissions`` configures them."""
    plan = plan_permission(job.copy, job.site)
    if isinstance(plan, Skip):
        return plan
    assert job.copy is not None
    await job.work(apply, job.copy.location, job.site.roots, plan)
    return None


def plan_permission(seen: Copy | None, site: Site) -> Permission | Skip:
    """Decide which permissions a copy gets at this site. Pure."""
    if seen is None or seen.status != TRANSFERRED:
        return Skip("the copy is gone" if seen is None else f"it is {seen.status} now")
    permission: Permission | None = site.permissions.get(seen.type)
    if permission is None:
        return Skip(f"permissions of {site.name} do not cover {seen.type} data")
    if seen.location is None:
        return Skip(f"{seen.key} has no location")
    return permission


def apply(location: str, roots: tuple[str, ...], permission: Permission) -> None:
    """Apply a permission to all of the copy at `location`; in a worker process.

    Raises `GiveUp` if that is not permitted, or the group or ``setfacl`` is missing.
    """
    path = confine(location, roots)
    group = -1 if permission.group is None else _group(permission.group)
    with _translated(path):
        for descriptor, status in _walk(path):
            # Group before mode: chown clears the set-group-ID bit of a file.
            if group not in (-1, status.st_gid):
                os.fchown(descriptor, -1, group)
            if (mode := _mode(permission, status)) is not None:
                os.fchmod(descriptor, mode)
        if permission.acl is not None:
            _set_acl(path, permission.acl)


def _group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise Denied(f"there is no group {name!r} here: see permissions in sites.json") from None


def _mode(permission: Permission, status: os.stat_result) -> int | None:
    if permission.mode is None or not stat.S_ISDIR(status.st_mode):
        return permission.file_mode
    return permission.mode | status.st_mode & KEPT


def _walk(path: Confined) -> Iterator[tuple[int, os.stat_result]]:
    """Open each file and directory of a copy in turn, never following a link."""
    with opened(path, os.O_RDONLY) as top:
        yield from _from(top)


def _from(descriptor: int) -> Iterator[tuple[int, os.stat_result]]:
    status = os.fstat(descriptor)
    yield descriptor, status
    for name in os.listdir(descriptor) if stat.S_ISDIR(status.st_mode) else ():
        mode = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            inner = os.open(name, _FLAGS, dir_fd=descriptor)
            try:
                yield from _from(inner)
            finally:
                os.close(inner)


@contextmanager
def _translated(path: bytes) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise Denied(
            f"not permitted to set permissions in {printable(path)}: the listener's user must own "
            "the files and be in the group"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise Retry(f"{printable(path)} changed while its permissions were set") from error
        why = f"cannot set permissions in {printable(path)}: {error.strerror}"
        raise Retry(why) from error


def _set_acl(path: Confined, acl: str) -> None:
    if shutil.which("setfacl") is None:
        raise Denied("permissions in sites.json need setfacl: install it (Debian: acl)")
    # setfacl takes paths. We pass /proc/PID/fd/N of open files, which lead nowhere else even if
    # somebody swaps a file for a link meanwhile.
    entries = acl.split(",")
    # setfacl refuses default entries for files: only directories have them.
    of_files = [one for one in entries if not one.startswith(("d:", "default:"))]
    for wanted, is_directory in ((entries, True), (of_files, False)):
        if wanted:
            command = ["setfacl", "--modify", ",".join(wanted), "--"]
            _set_each(command, path, is_directory=is_directory)


def _set_each(command: list[str], path: Confined, *, is_directory: bool) -> None:
    """Call setfacl for each directory of a copy, or for each file."""
    held: list[int] = []
    try:
        for descriptor, status in _walk(path):
            if stat.S_ISDIR(status.st_mode) == is_directory:
                held.append(os.dup(descriptor))
            if len(held) == _MANY:
                _call(command, held, path)
        _call(command, held, path)
    finally:
        for descriptor in held:
            os.close(descriptor)


def _call(command: list[str], held: list[int], path: bytes) -> None:
    """Call setfacl for the files held open, and close them."""
    if not held:
        return
    names = [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in held]
    done = run(Program([*command, *names], "acl"))
    while held:
        os.close(held.pop())
    if done.status:
        raise GiveUp(f"setfacl fails at {printable(path)}: {done.last}")
