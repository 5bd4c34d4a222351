"""A copy that is being made on this machine, from its first byte to its name.

`caxev.transfer.ssh` moves the bytes of a pull; ``caxev receive`` at the far end those of a push.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Final

from attrs import define, evolve, field

from caxev.core.errors import Damaged, Denied, GiveUp, Retry
from caxev.files.digest import to_nobody, wrong_below
from caxev.files.errors import local
from caxev.files.manifest import PART, Item, Manifest, Range
from caxev.files.paths import inside, origin_path, partial_path
from caxev.files.plan import Plan, plan, to_the_second
from caxev.files.publishing import DIR_MODE, FILE_MODE, end_rename, publish, withdraw, writing
from caxev.files.reading import Report
from caxev.files.resolved import (
    mkdir,
    open_resolved,
    read_file,
    remove,
    rmdir,
    symlink,
    unlink,
)
from caxev.files.tree import Seen, check_paths, look, manifest_of, shown

MARGIN: Final = 16 << 20
"""Bytes that a transfer leaves free in any case."""
_BUSY_AFTER: Final = 5.0  # seconds
LONGEST_ORIGIN: Final = 256
"""Bytes of the note that names what a partial is made from."""
_BLOCK: Final = 512  # bytes, as `stat` counts


@define
class StagedCopy:
    """A copy that is to stand at `final`, inside one of `roots`, and to be what `source` lists.

    `expected`: its digests, where they are known; then what is there already is kept where
    it is right, and only there. `min_free`: bytes that must stay free. `unsure`: bytes at the
    end of a file that was cut off which may not all be there. `again`: what has the name
    is known to be bad and is to be repaired; a file of unknown digests is then moved anew. With
    `whole_files` a file that is to be repaired is removed first, and so moved whole. `origin`: see
    `origin_of`; a file of unknown digests is kept only if the partial was made from the same; None:
    the caller compares what is kept. `report` is called while what is there is read: bytes read,
    bytes to read. All methods raise `Retry` for what the disk refuses.

    A file that is not written from its beginning to its end, as one of known digests may be, is
    longer than it will be until `finish`: then no later attempt takes its length for how much of
    it is there. What has other names elsewhere (hard links) is never written to.
    """

    final: str
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
        check_paths(self.source)  # whoever listed them is not to choose where we write
        self._wanted = {seen.path: seen for seen in self.source if seen.kind == "file"}
        self._items = known_items(self.expected)

    @cached_property
    def partial(self) -> bytes:
        """Where it is written until it is whole."""
        return os.fsencode(partial_path(self.final))

    @property
    def _note(self) -> bytes:
        return os.fsencode(origin_path(self.final))

    @property
    def is_file(self) -> bool:
        """Whether the copy is a single file."""
        return is_file(self.source)

    def stands(self) -> bool:
        """Whether an attempt that was killed after its rename has left the copy whole.

        By names, kinds, sizes and times; its content is verified afterwards like any copy's.
        Never where it is to be repaired. Raises `GiveUp` where something else has the name.
        """
        if not os.path.lexists(self.final):
            return False
        with local(self.partial, "remove"):
            end_rename(os.fsdecode(self.partial), self.final)
        if self.again:
            return False
        found = None if os.path.lexists(self.partial) else look(self.final, check=False)
        check_standing(self.source, found, shown(self.final))
        with local(self._note, "remove"):
            remove(self._note)
        return True

    @contextmanager
    def opened(self) -> Iterator[Plan]:
        """Hold the only right to make this copy, and say what is left to do of it.

        What must go is gone by then, and the directories are there. A copy that is to be repaired
        has lost its name.
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
            enough_space(todo, self._on_disk(), self.free(), self.min_free, shown(self.final))
            self._prepare(todo)
            yield todo

    def withdraw(self) -> None:
        """Make the directories above the copy; take the name from one that is to be repaired."""
        make_parents(self.final, self.roots)
        if self.again and os.path.lexists(self.final):
            with local(os.fsencode(self.final), "withdraw"):
                self._drop_partial()
                withdraw(self.final, os.fsdecode(self.partial))

    def _drop_partial(self) -> None:
        """Remove a partial of another attempt: what has the name takes its place."""
        if os.path.lexists(self.partial):
            with writing(os.fsdecode(self.partial), directory=os.path.isdir(self.partial)):
                remove(self.partial)

    def _lock(self, held: ExitStack) -> None:
        partial = os.fsdecode(self.partial)
        with local(self.partial, "write"):
            held.enter_context(writing(partial, directory=not self.is_file))
            if os.path.lexists(self.final):
                with suppress(OSError):  # ours, and empty: it would be in the way of the copy
                    rmdir(partial)
                raise Retry(f"{shown(self.final)} has just appeared", after=_BUSY_AFTER)
            if self.is_file and os.lstat(partial).st_nlink > 1:
                unlink(partial)
                held.enter_context(writing(partial, directory=False))

    def _look(self) -> list[Seen]:
        """What is there, when the names of files that have others elsewhere are taken out."""
        had = look(os.fsdecode(self.partial), check=False)
        if self.is_file:
            return had
        with local(self.partial, "prepare"):
            shared = {seen.path for seen in had if seen.kind == "file" and self._is_shared(seen)}
            for path in shared:
                unlink(join(self.partial, path))
        return [seen for seen in had if seen.path not in shared]

    def _keep_same_origin(self) -> None:
        """Empty the files of unknown digests if they may come from a source of other content.

        Size and time do not show that: a source that is repaired keeps both. A partial that is
        repaired, or compared by the caller, has no note, so no later attempt trusts it.
        """
        origin = None if self.again else self.origin
        with local(self._note, "read"):
            if origin is not None and _noted(self._note) == origin:
                return
            if origin is not None:
                for seen in self._had:
                    if seen.kind == "file" and seen.path not in self._items:
                        _resize(join(self.partial, seen.path), 0)
                self._had = self._look()
            remove(self._note)
            if origin is not None:
                _write_note(self._note, origin)

    def _is_shared(self, seen: Seen) -> bool:
        return os.lstat(join(self.partial, seen.path)).st_nlink > 1

    def _wrong(self) -> dict[bytes, Sequence[Range]]:
        """What is wrong with each file that is there: where digests are known, or all of it."""
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
        """Bytes that are free for us where the copy goes."""
        with local(self.partial, "look at"):
            status = os.statvfs(os.path.dirname(self.partial))
        return status.f_bavail * status.f_frsize

    def check_space(self) -> None:
        """Raise `Retry` where fewer than `min_free` bytes are free by now: others write, too."""
        if self.min_free and (free := self.free()) < self.min_free:
            raise Retry(filling_up(shown(self.final), free, self.min_free))

    def _on_disk(self) -> list[Seen]:
        """What is there; a file that is kept longer counts as what it takes of the disk."""
        with local(self.partial, "look at"):
            return [
                evolve(seen, size=min(seen.size, self._blocks(seen)))
                if self._is_long(seen)
                else seen
                for seen in self._had
            ]

    def _is_long(self, seen: Seen) -> bool:
        return seen.path in self._wanted and seen.size > self._wanted[seen.path].size

    def _blocks(self, seen: Seen) -> int:
        return os.lstat(join(self.partial, seen.path)).st_blocks * _BLOCK

    def _prepare(self, todo: Plan) -> None:
        with local(self.partial, "prepare"):
            for seen in todo.remove:
                path = join(self.partial, seen.path)
                rmdir(path) if seen.kind == "dir" else unlink(path)
            for seen in todo.directories:
                mkdir(join(self.partial, seen.path), DIR_MODE)
            had = {seen.path: seen.size for seen in self._had if seen.kind == "file"}
            for path, length in self._lengths(todo, had).items():
                if had.get(path) != length:
                    _resize(join(self.partial, path), length)

    def _lengths(self, todo: Plan, had: Mapping[bytes, int]) -> dict[bytes, int]:
        """How long files must be before anything is moved, in bytes."""
        lengths = {path: self._wanted[path].size for path in self.wrong}
        for piece in todo.pieces:
            path, size = piece.file.path, piece.file.size
            if size and (path in self.wrong or (path in self._items and size >= PART)):
                lengths[path] = size + 1
            elif path in had:
                lengths[path] = piece.start  # what lies behind is of no use
        return lengths

    def finish(self, todo: Plan) -> None:
        """Make links, set lengths, modes and times, and see that nothing is missing.

        A file that has other names by now was linked, not written, and keeps what it has.
        """
        touched = {piece.file.path for piece in todo.pieces} | self.wrong.keys()
        with local(self.partial, "finish"):
            for seen in todo.links:
                symlink(seen.target, join(self.partial, seen.path))
            for path in touched:
                _finish(join(self.partial, path), self._wanted[path])
        if to_the_second(self.source) != to_the_second(look(os.fsdecode(self.partial))):
            raise Retry(f"{shown(os.fsdecode(self.partial))} is not what was written to it")

    def publish(self) -> None:
        """Bring it to the disk and give it its name. Raises `GiveUp` where that is taken."""
        with local(os.fsencode(self.final), "publish"):
            try:
                publish(os.fsdecode(self.partial), self.final)
            except FileExistsError as exc:
                raise GiveUp(f"{shown(self.final)} exists already and is not replaced") from exc
            remove(self._note)


def origin_of(expected: Manifest | None, checksum: str | None) -> str:
    """Name the content of a source as the database has it; empty if nothing is known of it."""
    return expected.digest if expected is not None else checksum or ""


def _noted(path: bytes) -> str | None:
    """What a note names; None if there is none that can be read."""
    try:
        return read_file(path, LONGEST_ORIGIN).decode(errors="replace")
    except OSError:
        return None


def _write_note(path: bytes, origin: str) -> None:
    descriptor = open_resolved(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(origin.encode()[:LONGEST_ORIGIN])


def _resize(path: bytes, length: int) -> None:
    descriptor = open_resolved(path, os.O_WRONLY | os.O_CREAT, FILE_MODE)
    try:
        os.ftruncate(descriptor, length)
    finally:
        os.close(descriptor)


def _finish(path: bytes, seen: Seen) -> None:
    descriptor = open_resolved(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if status.st_nlink > 1:
            return
        if status.st_size > seen.size:
            _resize(path, seen.size)
        if stat.S_IMODE(status.st_mode) != FILE_MODE:
            os.fchmod(descriptor, FILE_MODE)
        os.utime(descriptor, ns=(seen.mtime_ns, seen.mtime_ns))
    finally:
        os.close(descriptor)


def known_items(expected: Manifest | None) -> Mapping[bytes, Item]:
    """The files of a manifest, if there is one, whose parts' digests are known, by path."""
    return {} if expected is None else expected.known_files


def check_expected(source: Iterable[Seen], expected: Manifest | None, where: str) -> None:
    """Raise `Damaged` where what is to be copied is not even of the shape that it must have."""
    if expected is None:
        return
    shape, found = expected.shape(), manifest_of(source)
    if shape != found:
        differ = shape.differences(found)
        raise Damaged(f"{where} is not what it was: {differ[0]} ({len(differ)} in all)")


def join(root: bytes, path: bytes) -> bytes:
    """A path inside a tree; ``b""`` is the root."""
    return root.rstrip(b"/") + b"/" + path if path else root


def is_file(source: Sequence[Seen]) -> bool:
    """Whether a tree is a single file."""
    return len(source) == 1 and source[0].path == b""


def check_standing(source: Iterable[Seen], found: Iterable[Seen] | None, where: str) -> None:
    """Raise `GiveUp` unless what has the final name is the copy; None: there is a partial too."""
    if found is None or to_the_second(found) != to_the_second(source):
        raise GiveUp(f"{where} exists already and is not replaced")


def enough_space(
    todo: Plan, present: Iterable[Seen], free: int | None, min_free: int, where: str
) -> None:
    """Raise `Denied` where what is to be added to a partial would not leave enough free."""
    changing = {s.path for s in (*todo.remove, *(piece.file for piece in todo.pieces))}
    had = sum(seen.size for seen in present if seen.path in changing)
    need = sum({piece.file.path: piece.file.size for piece in todo.pieces}.values()) - had
    spare = max(MARGIN, min_free)
    if need > 0 and free is not None and need + spare > free:
        raise Denied(
            f"not enough space for {where}: needs {need / 1e6:,.1f} MB and "
            f"{spare / 1e6:,.1f} MB to spare, has {free / 1e6:,.1f} MB free"
        )


def filling_up(where: str, free: int, min_free: int) -> str:
    """Why a copy that is under way is broken off."""
    return (
        f"not enough space for {where}: {free / 1e6:,.1f} MB free, "
        f"{min_free / 1e6:,.1f} MB must stay so"
    )


def make_parents(final: str, roots: Sequence[str]) -> None:
    """Make what is missing between a root, which must be there, and the copy."""
    if not any(os.path.isdir(root) and _above(root, final) for root in roots):
        raise Retry(f"no directory to hold {shown(final)}: {' or '.join(roots)} is not there")
    missing = []
    parent = os.path.dirname(final)
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    with local(os.fsencode(parent), "make a directory in"):
        for path in reversed(missing):
            mkdir(path, DIR_MODE)


def _above(root: str, path: str) -> bool:
    return inside(os.fsencode(path), os.fsencode(os.path.realpath(root)))
