"""Make a copy on this machine, from its first byte to its final name.

`caxev.transfer.ssh` moves the bytes of a pull; ``caxev receive`` at the far end those of a push.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Final

from attrs import define, evolve, field

from caxev import failpoints
from caxev.core.errors import Damaged, Denied, GiveUp, Retry
from caxev.files.confined import Confined, join, parent
from caxev.files.digest import wrong_below
from caxev.files.errors import BUSY_AFTER, local
from caxev.files.manifest import PART, Item, Manifest, Range
from caxev.files.meter import Meter, Moved, Report, to_nobody
from caxev.files.paths import inside, origin_path, partial_path, printable, real_root
from caxev.files.plan import Plan, plan, to_the_second
from caxev.files.publishing import (
    DIR_MODE,
    FILE_MODE,
    end_rename,
    forget_lock,
    make_above,
    publish,
    withdraw,
    writing,
)
from caxev.files.resolved import mkdir, opened, read_file, remove, rmdir, symlink, unlink
from caxev.files.tree import Seen, check_paths, look, manifest_of

MARGIN: Final = 16 << 20
"""Bytes that a transfer always leaves free."""
LONGEST_ORIGIN: Final = 256
"""The longest note about the source of a partial, in bytes."""
_BLOCK: Final = 512  # bytes, as `stat` counts


@define
class StagedCopy:
    """A copy of `source` to be made at `final`, inside one of `roots`.

    `expected`: its manifest, if known; existing bytes are then kept exactly if they match.
    `min_free`: bytes that must stay free. `unsure`: bytes at the end of an interrupted file that
    may be incomplete. `again`: the copy exists, is known to be bad and must be repaired; files of
    unknown digests are then moved again. With `whole_files` a bad file is removed first, and so
    moved as a whole. `origin` names the content of the source; files of unknown digests are kept
    only if the partial has the same origin; None: the caller compares what is kept. `report` is
    called while existing data is read: bytes read, bytes to read. All methods raise `Retry` if the
    disk fails.

    Files that have other names elsewhere (hard links) are never written to.
    """

    # A file with known digests may be written in any order. Until `finish` it is one byte too
    # long, so that no later attempt takes its length for the amount of data in it.

    final: Confined
    roots: Sequence[str]
    source: Sequence[Seen]
    expected: Manifest | None = None
    min_free: int = 0
    unsure: int = field(default=0, kw_only=True)
    again: bool = field(default=False, kw_only=True)
    whole_files: bool = field(default=False, kw_only=True)
    origin: str | None = field(default=None, kw_only=True)
    report: Report = field(default=to_nobody, kw_only=True, repr=False)
    wrong: Mapping[bytes, Sequence[Range]] = field(init=False, factory=dict)
    _had: Sequence[Seen] = field(init=False, factory=list)
    _wanted: Mapping[bytes, Seen] = field(init=False)
    _items: Mapping[bytes, Item] = field(init=False)

    def __attrs_post_init__(self) -> None:
        check_paths(self.source)  # the machine that listed them must not choose where we write
        self._wanted = {seen.path: seen for seen in self.source if seen.kind == "file"}
        self._items = known_items(self.expected)

    @cached_property
    def partial(self) -> Confined:
        """Return the path to which the copy is written until it is complete."""
        return partial_path(self.final)

    @property
    def _note(self) -> Confined:
        return origin_path(self.final)

    @property
    def is_file(self) -> bool:
        """Return whether the copy is a single file."""
        return is_file(self.source)

    def stands(self) -> bool:
        """Return whether an attempt that was killed after its rename has left the complete copy.

        By names, kinds, sizes and times; its content is verified later, as any copy's. Always False
        for a repair. Raises `GiveUp` if something else has the name.
        """
        if not os.path.lexists(self.final):
            return False
        with local(self.partial, "remove"):
            end_rename(self.partial, self.final)
        if self.again:
            return False
        # Our rename leaves no partial: with one, something else has taken the name.
        found = None if os.path.lexists(self.partial) else look(self.final, check=False)
        check_standing(self.source, found, printable(self.final))
        with local(self._note, "remove"):
            remove(self._note)
            forget_lock(self.partial)
        return True

    def made(
        self, meter: Meter, fill: Callable[[Plan], object], check: Callable[[], object]
    ) -> Moved:
        """Make the whole copy, unless it exists already, and return the summary.

        `fill` moves what the plan lists. `check` raises an error if the source has changed since it
        was listed, or if what was written is bad.
        """
        meter.guard = self.check_space
        if not self.stands():
            with self.opened() as todo:
                failpoints.point("files.prepare")
                meter.left(todo)
                fill(todo)
                self.finish(todo)
                check()  # before the rename, or a mixture would be published
                self.publish()
        return meter.moved(self.source)

    @contextmanager
    def opened(self) -> Iterator[Plan]:
        """Hold the exclusive right to make this copy, and yield the plan of what is left to do.

        Foreign entries are removed and directories are made before. A copy to repair
        is renamed to its partial.
        """
        self.withdraw()
        with ExitStack() as held:
            self._lock(held)
            self._had = self._look()
            self._keep_same_origin()
            self.wrong = self._wrong()
            if self.again and self.whole_files:
                self._drop_wrong()
            todo = plan(self.source, self._had, unsure=self.unsure, wrong=self.wrong)
            enough_space(todo, self._on_disk(), self.free(), self.min_free, printable(self.final))
            self._prepare(todo)
            yield todo

    def withdraw(self) -> None:
        """Make the directories above the copy; rename one to repair to its partial."""
        make_parents(self.final, self.roots)
        if self.again and os.path.lexists(self.final):
            with local(self.final, "withdraw"):
                # The bad copy takes the place of a partial of another attempt.
                if os.path.lexists(self.partial):
                    with writing(self.partial, directory=os.path.isdir(self.partial)):
                        remove(self.partial)
                withdraw(self.final, self.partial)

    def _lock(self, held: ExitStack) -> None:
        partial = self.partial
        with local(partial, "write"):
            held.enter_context(writing(partial, directory=not self.is_file))
            # Checked again under the lock: another process may have published it before we had it.
            if os.path.lexists(self.final):
                with suppress(OSError):  # if we have just made it, it would block the next attempt
                    rmdir(partial)
                raise Retry(f"{printable(self.final)} has just appeared", after=BUSY_AFTER)
            # A partial with another name, as a hard-linked copy that is repaired: start a new one.
            if self.is_file and os.lstat(partial).st_nlink > 1:
                unlink(partial)
                held.enter_context(writing(partial, directory=False))

    def _look(self) -> list[Seen]:
        """List the partial, after unlinking files that have other names elsewhere."""
        had = look(self.partial, check=False)
        if self.is_file:
            return had
        with local(self.partial, "prepare"):
            files = [seen.path for seen in had if seen.kind == "file"]
            shared = {one for one in files if os.lstat(join(self.partial, one)).st_nlink > 1}
            for path in shared:
                unlink(join(self.partial, path))
        return [seen for seen in had if seen.path not in shared]

    def _keep_same_origin(self) -> None:
        """Empty the files of unknown digests if they may come from a source of other content."""
        # Size and time do not show that: a repaired source keeps both. A partial that is repaired,
        # or compared by the caller, gets no note, so that no later attempt trusts it.
        origin = None if self.again else self.origin
        with local(self._note, "read"):
            if origin is not None and _noted(self._note) == origin:
                return
            if origin is not None:
                for seen in self._had:
                    if seen.kind == "file" and seen.path not in self._items:
                        _resize(join(self.partial, seen.path), 0)
                self._had = self._look()
            # The new note comes last: killed before it, the next attempt empties the files again.
            remove(self._note)
            if origin is not None:
                _write_note(self._note, origin)

    def _wrong(self) -> dict[bytes, Sequence[Range]]:
        """Return the bad ranges of existing files: by their digests, or all in a repair."""
        had = [seen for seen in self._had if seen.kind == "file" and seen.path in self._wanted]
        known = [seen for seen in had if seen.path in self._items]
        wrong: dict[bytes, Sequence[Range]] = {}
        if self.again:
            wrong |= {seen.path: [(0, self._wanted[seen.path].size)] for seen in had}
        return wrong | wrong_below(self.partial, known, self._items, self.report)

    def _drop_wrong(self) -> None:
        if self.is_file:  # it is our lock
            whole = [(0, seen.size) for seen in self.source]
            self.wrong = {path: whole if ranges else () for path, ranges in self.wrong.items()}
            return
        dropped = {path for path, ranges in self.wrong.items() if ranges}
        with local(self.partial, "remove"):
            for path in dropped:
                unlink(join(self.partial, path))
        self._had = [seen for seen in self._had if seen.path not in dropped]
        self.wrong = dict.fromkeys(self.wrong.keys() - dropped, ())

    def free(self) -> int:
        """Return the bytes that are available to us on the copy's disk."""
        with local(self.partial, "look at"):
            status = os.statvfs(parent(self.partial))
        return status.f_bavail * status.f_frsize

    def check_space(self) -> None:
        """Raise `Retry` if fewer than `min_free` bytes are free by now: others write, too."""
        if self.min_free and (free := self.free()) < self.min_free:
            raise Retry(filling_up(printable(self.final), free, self.min_free))

    def _on_disk(self) -> list[Seen]:
        """List the partial; files that are too long count by their blocks, as they have holes."""
        found = []
        with local(self.partial, "look at"):
            for seen in self._had:
                wanted, size = self._wanted.get(seen.path), seen.size
                if wanted is not None and size > wanted.size:
                    size = min(size, os.lstat(join(self.partial, seen.path)).st_blocks * _BLOCK)
                found.append(evolve(seen, size=size))
        return found

    def _prepare(self, todo: Plan) -> None:
        with local(self.partial, "prepare"):
            for seen in todo.remove:
                (rmdir if seen.kind == "dir" else unlink)(join(self.partial, seen.path))
            for seen in todo.directories:
                mkdir(join(self.partial, seen.path), DIR_MODE)
            had = {seen.path: seen.size for seen in self._had if seen.kind == "file"}
            for path, length in self._lengths(todo, had).items():
                if had.get(path) != length:
                    _resize(join(self.partial, path), length)

    def _lengths(self, todo: Plan, had: Mapping[bytes, int]) -> dict[bytes, int]:
        """Return the lengths, in bytes, that files must have before anything is moved."""
        lengths = {path: self._wanted[path].size for path in self.wrong}
        for piece in todo.pieces:
            path, size = piece.file.path, piece.file.size
            if size and (path in self.wrong or (path in self._items and size >= PART)):
                # By its length no later attempt takes it for whole; `finish` cuts the byte off.
                lengths[path] = size + 1
            elif path in had:
                lengths[path] = piece.start  # what follows may be incomplete
        return lengths

    def finish(self, todo: Plan) -> None:
        """Make links, set lengths, modes and times, and check that nothing is missing."""
        touched = {piece.file.path for piece in todo.pieces} | self.wrong.keys()
        with local(self.partial, "finish"):
            for seen in todo.links:
                symlink(seen.target, join(self.partial, seen.path))
            for path in touched:
                _finish(join(self.partial, path), self._wanted[path])
        # Listed with all checks now: others may write here as well, and what they added must not be
        # published.
        if to_the_second(self.source) != to_the_second(look(self.partial)):
            raise Retry(f"{printable(self.partial)} is not what was written to it")

    def publish(self) -> None:
        """Bring the copy to the disk and rename it. Raises `GiveUp` if its name is taken."""
        with local(self.final, "publish"):
            try:
                publish(self.partial, self.final)
            except FileExistsError as exc:
                raise GiveUp(f"{printable(self.final)} exists already and is not replaced") from exc
            remove(self._note)  # last: if we are killed before, `stands` removes it


def _noted(path: Confined) -> str | None:
    """Return the origin in a note; None if there is none that can be read."""
    try:
        # Without a note the origin is unknown: then data is moved again, which is always right.
        noted = read_file(path, LONGEST_ORIGIN).decode(errors="replace")
        return noted.partition("\n")[0]  # behind it is which push over SFTP has written it
    except OSError:
        return None


def _write_note(path: Confined, origin: str) -> None:
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE) as descriptor:
        # Not synced: if a power cut loses the note, the next attempt only moves more than it must.
        os.write(descriptor, origin.encode()[:LONGEST_ORIGIN])


def _resize(path: Confined, length: int) -> None:
    with opened(path, os.O_WRONLY | os.O_CREAT, FILE_MODE) as descriptor:
        os.ftruncate(descriptor, length)


def _finish(path: Confined, seen: Seen) -> None:
    with opened(path, os.O_RDONLY) as descriptor:
        status = os.fstat(descriptor)
        if status.st_nlink > 1:  # linked by us, not written: its mode and time are the source's
            return
        if status.st_size > seen.size:
            _resize(path, seen.size)
        if stat.S_IMODE(status.st_mode) != FILE_MODE:
            os.fchmod(descriptor, FILE_MODE)
        os.utime(descriptor, ns=(seen.mtime_ns, seen.mtime_ns))


def known_items(expected: Manifest | None) -> Mapping[bytes, Item]:
    """Return the files of a manifest whose parts' digests are known, by path."""
    return {} if expected is None else expected.known_files


def check_expected(source: Iterable[Seen], expected: Manifest | None, where: str) -> None:
    """Raise `Damaged` if the listing of a source differs from the manifest."""
    if expected is None:
        return
    shape, found = expected.shape(), manifest_of(source)
    if shape != found:
        differ = shape.differences(found)
        raise Damaged(f"{where} is not what it was: {differ[0]} ({len(differ)} in all)")


def is_file(source: Sequence[Seen]) -> bool:
    """Return whether a tree is a single file."""
    return len(source) == 1 and source[0].path == b""


def check_standing(source: Iterable[Seen], found: Iterable[Seen] | None, where: str) -> None:
    """Raise `GiveUp` unless `found`, at the final name, is the copy; None: a partial exists too."""
    if found is None or to_the_second(found) != to_the_second(source):
        raise GiveUp(f"{where} exists already and is not replaced")


def enough_space(
    todo: Plan, present: Iterable[Seen], free: int | None, min_free: int, where: str
) -> None:
    """Raise `Denied` if the rest of a partial would not leave enough space free.

    `free` and `min_free` are bytes; `free` None: unknown, so that it fits. At least `MARGIN` bytes
    stay free in any case. `present` is the partial as it is, `where` the copy in the message.
    """
    changing = {s.path for s in (*todo.remove, *(piece.file for piece in todo.pieces))}
    had = sum(seen.size for seen in present if seen.path in changing)
    need = sum({piece.file.path: piece.file.size for piece in todo.pieces}.values()) - had
    if why := lacking_space(need, free, min_free, f"for {where}"):
        raise Denied(why)


def lacking_space(need: int, free: int | None, min_free: int, what: str) -> str | None:
    """Return why so many bytes do not fit, `what` they are for in words; None if they do."""
    spare = max(MARGIN, min_free)
    if need <= 0 or free is None or need + spare <= free:
        return None
    return (
        f"not enough space {what}: needs {need / 1e6:,.1f} MB and "
        f"{spare / 1e6:,.1f} MB to spare, has {free / 1e6:,.1f} MB free"
    )


def filling_up(where: str, free: int, min_free: int) -> str:
    """Return why a copy that is under way is stopped: `free` of `min_free` bytes are left."""
    return (
        f"not enough space for {where}: {free / 1e6:,.1f} MB free, "
        f"{min_free / 1e6:,.1f} MB must stay so"
    )


def make_parents(final: Confined, roots: Sequence[str]) -> None:
    """Make the missing directories between a root and the copy, and bring them to the disk.

    Raises `Retry` if none of the `roots` that would hold the copy exists.
    """
    if not any(os.path.isdir(root) and inside(final, real_root(root)) for root in roots):
        raise Retry(f"no directory to hold {printable(final)}: {' or '.join(roots)} is not there")
    # Never the root itself: without its disk, the copy would go to the mount point.
    make_above(final)
