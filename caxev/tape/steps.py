"""What is done for a run's data on tape, in a worker process: back up, compare, restore.

`caxev.handlers.tape` calls these by ``job.work``, and the command line calls them directly. What
goes wrong is not raised but told, so that what the client wrote comes along.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import update_wrapper
from typing import Concatenate, Final, Generic, ParamSpec, TypeVar

from attrs import evolve, field, frozen

from caxev import failpoints
from caxev.config import state_directory
from caxev.core.errors import Damaged, Denied, GiveUp, Retry, RootAway
from caxev.files import (
    FILE_MODE,
    MARGIN,
    Manifest,
    Report,
    bring_in,
    check_expected,
    confine,
    digest_tree,
    local,
    look,
    make_parents,
    make_private,
    not_private,
    safe_name,
    shown,
    to_nobody,
    writing,
)
from caxev.files.resolved import chmod, rename
from caxev.files.roots import check_root
from caxev.tape.base import Archive, Reach, Stored, Talk
from caxev.tape.find import archive
from caxev.tape.staging import clear, fit_for_tape, name_off_tape, name_on_tape, on_tape, stage

T = TypeVar("T")
P = ParamSpec("P")
NAMED: Final = 5
_SCRATCH: Final = ".caxev-restored"
_RECALLED: Final = ".recalled-"
_WHOLE: Final = ".whole-"
"""What stands before a run's name in scratch: under the tape's names, and whole, under its own."""


@frozen
class Told(Generic[T]):
    """What came of a step: its result or why it failed, and all that the client wrote."""

    said: str
    result: T | None = None
    failed: Retry | GiveUp | None = None

    def get(self) -> T:
        """The result. Raises `Retry` or `GiveUp` where the step failed."""
        if self.failed is not None:
            raise self.failed
        assert self.result is not None
        return self.result


@frozen
class Data:
    """A run's data: where it is on tape, and what it must be, as far as that is known.

    `name` is the run's directory. `expected` is known, or `checksum`, or neither.
    """

    name: str
    folder: str
    expected: Manifest | None = field(default=None, repr=False)
    checksum: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether there is anything to compare it with."""
        return self.expected is not None or self.checksum is not None


@frozen
class Copied:
    """Data that is what it must be; `again`: bytes that the client had to move for that."""

    manifest: Manifest = field(repr=False)
    moved: int

    @property
    def bytes_total(self) -> int:
        return self.manifest.total_bytes


def told(
    function: Callable[Concatenate[Talk, Reach, P], T],
) -> Callable[Concatenate[Reach, P], Told[T]]:
    """Have a step tell how it ended; it then takes `report` instead of a `Talk`."""

    def step(reach: Reach, /, *args: P.args, **kwargs: P.kwargs) -> Told[T]:
        report: Report = kwargs.pop("report")  # type: ignore[assignment]  # whoever runs it adds that
        talk = Talk(report)
        try:
            result = function(talk, reach, *args, **kwargs)
        except (Retry, GiveUp) as error:
            return Told(talk.text, failed=_plain(error))
        return Told(talk.text, result)

    return update_wrapper(step, function)


def directly(step: Callable[..., Told[T]], *args: object) -> Told[T]:
    """Take a step in this process, telling nobody how far it is."""
    return step(*args, report=to_nobody)


def _plain(error: Retry | GiveUp) -> Retry | GiveUp:
    """The error, as it can be pickled inside of a result."""
    if isinstance(error, RootAway):
        return RootAway(error.why, root=error.root, host=error.host)
    if isinstance(error, Denied):
        return Denied(error.why)
    if isinstance(error, Retry):
        return Retry(error.why, after=error.after)
    return Damaged(error.why) if isinstance(error, Damaged) else GiveUp(error.why)


# -- steps ----------------------------------------------------------------------------------------


@told
def back_up(talk: Talk, reach: Reach, source: str, data: Data, again: bool) -> Manifest:
    """Bring the copy at `source` to tape; what it is. Nothing is compared yet.

    Raises `GiveUp` where it is not fit for tape, is not what it must be, or the folder holds
    something else already: what is on tape is never replaced.
    """
    place = archive(reach.there.method)
    path = confine(source, reach.here.roots)
    manifest = _source(path, data, talk)
    if (why := fit_for_tape(manifest)) is not None:
        raise GiveUp(f"{shown(path)} does not go to tape: {why}")
    files = on_tape(data.name, manifest)
    _check_free_of_others(place.listed(reach, data.folder, talk), files, data.folder)
    staged = _staged(reach, data.name)
    make_parents(staged, [os.path.dirname(staged)])
    pairs = zip(files, manifest.files, strict=True)
    talk.total = manifest.total_bytes
    stage(path, staged, {new.name: os.fsdecode(item.path) for new, item in pairs}, talk)
    talk.done = 0
    failpoints.point("tape.put")
    place.put(reach, staged, data.folder, files, again=again, talk=talk)
    failpoints.point("tape.put")
    _check_listed(place.listed(reach, data.folder, talk), files, data.folder)
    return manifest


def _source(path: str, data: Data, talk: Talk) -> Manifest:
    """What the source is: as it is known, or else read."""
    if data.expected is not None:
        check_expected(look(path), data.expected, shown(path))
        return data.expected
    manifest = digest_tree(path, sha512=True, report=talk.report)
    if data.checksum is not None and manifest.cax_checksum() != data.checksum:
        raise Damaged(f"{shown(path)} is not what it was: its checksum differs")
    return manifest


def _staged(reach: Reach, name: str) -> str:
    base = _staging(reach)
    if base is None:
        raise GiveUp(f"neither {reach.here.name} nor {reach.there.name} has a dir_tsm")
    if (why := not_private(base)) is not None:
        raise Denied(f"nothing is staged there: {why}")
    return os.path.join(base, safe_name(name))


def _staging(reach: Reach) -> str | None:
    """The directory that data for tape is staged in. Raises `RootAway` if its disk is not there."""
    for site in (reach.here, reach.there):
        for root in site.marked:
            if root == site.dir_tsm:
                check_root(root)
                return root
    return None


def _check_free_of_others(there: Sequence[Stored], files: Sequence[Stored], folder: str) -> None:
    sizes = {one.name: one.size for one in files}
    for one in there:
        if sizes.get(one.name) != one.size:
            raise GiveUp(
                f"{folder} on tape holds {one.name} of {one.size:,} bytes, which is not of this"
                " copy: nothing on tape is replaced"
            )


def _check_listed(there: Sequence[Stored], files: Sequence[Stored], folder: str) -> None:
    sizes = {one.name: one.size for one in there}
    missing = [one.name for one in files if sizes.get(one.name) != one.size]
    if missing:
        raise Retry(f"{folder} on tape lacks {missing[0]} ({len(missing)} files of {len(files)})")


@told
def unstage(talk: Talk, reach: Reach, name: str) -> bool:
    """Take away what is staged of data that does not go on; a later backup stages it anew."""
    del talk
    clear(_staged(reach, name))
    return True


@told
def compare(talk: Talk, reach: Reach, data: Data) -> tuple[str | None, Copied]:
    """Restore data to scratch and compare it; what differs (None: nothing), and what came.

    Scratch is empty again afterwards, and where nothing differs staging is removed.
    """
    scratch = _scratch(reach)
    folder = os.path.join(scratch, data.name)
    with _filling(folder):
        copied = _restored(talk, reach, data, folder)
    why = difference(data, copied.manifest)
    clear(folder)
    if why is None:
        with suppress(GiveUp):  # an archive that needs no staging
            clear(_staged(reach, data.name))
    return why, copied


def _scratch(reach: Reach) -> str:
    """The private directory that data is restored to. Raises `Denied` if others may write there."""
    if reach.options.scratch is not None:
        return make_private(reach.options.scratch)
    base = _staging(reach)
    return make_private(
        f"{state_directory(reach.here)}/restored" if base is None else f"{base}/{_SCRATCH}"
    )


@told
def recall(talk: Talk, reach: Reach, data: Data, target: str, roots: Sequence[str]) -> Copied:
    """Restore data to `target`, strictly inside one of `roots`, and compare it before it is named.

    The archive's client writes to scratch, where nobody else may. Killed anywhere, the next call
    keeps what was restored rightly. Raises `GiveUp` where something else has the name, `Retry`
    where the tape gives something else.
    """
    final = confine(target, roots)
    scratch = _scratch(reach)
    folder, whole = (os.path.join(scratch, prefix + data.name) for prefix in (_RECALLED, _WHOLE))
    if os.path.lexists(final) and not os.path.lexists(whole):
        return _standing(data, final, folder, talk)
    with local(os.fsencode(folder), "restore to"), _filling(folder):
        _rename_back(data.name, whole, folder)
        copied = _restored(talk, reach, data, folder)
        if (why := difference(data, copied.manifest)) is not None:
            clear(folder)
            raise Retry(f"what {data.folder} on tape gives is not what it must be: {why}")
        with writing(whole, directory=True):
            for item in copied.manifest.files:
                name = os.path.join(whole, os.fsdecode(item.path))
                failpoints.point("tape.rename")
                rename(os.path.join(folder, name_on_tape(data.name, item.path)), name)
                failpoints.point("tape.rename")
                chmod(name, FILE_MODE)
            failpoints.point("tape.renamed")
            bring_in(
                whole,
                final,
                roots,
                expected=copied.manifest,
                min_free=reach.here.min_free,
                report=talk.report,
            )
        failpoints.point("tape.recalled")
    return copied


@contextmanager
def _filling(folder: str) -> Iterator[None]:
    """Hold a directory that data is restored to; it goes where nothing has remained in it."""
    with writing(folder, directory=True):
        try:
            yield
        finally:
            with suppress(OSError):
                os.rmdir(folder)


def _standing(data: Data, final: str, folder: str, talk: Talk) -> Copied:
    """A copy that got its name before we were killed."""
    if not data.is_known:
        raise GiveUp(f"{shown(final)} exists already, and nothing tells whether it is this copy")
    found = digest_tree(final, sha512=data.expected is None, report=talk.report)
    if (why := difference(data, found)) is not None:
        raise GiveUp(f"{shown(final)} exists already and is not this copy: {why}")
    with suppress(FileNotFoundError):
        os.rmdir(folder)
    return Copied(found, 0)


def _rename_back(name: str, whole: str, folder: str) -> None:
    """Put what had its own name already with the rest, to be looked at again."""
    if os.path.isdir(whole):
        for one in os.listdir(whole):
            failpoints.point("tape.rename_back")
            rename(
                os.path.join(whole, one),
                os.path.join(folder, name_on_tape(name, os.fsencode(one))),
            )


def _restored(talk: Talk, reach: Reach, data: Data, folder: str) -> Copied:
    """Restore what is not in `folder` already; what is there then, under the run's own names.

    Without a manifest nothing is known to be right, and all is restored.
    """
    place = archive(reach.there.method)
    files = _files(place, reach, data, talk)
    right = _right(data, folder, talk)
    for name in set(os.listdir(folder)) - right:
        failpoints.point("tape.unlink")
        os.unlink(os.path.join(folder, name))
    missing = [one for one in files if one.name not in right]
    talk.total = sum(one.size for one in files)
    _check_free(reach, folder, sum(one.size for one in missing))
    if missing:
        failpoints.point("tape.get")
        place.get(reach, data.folder, missing, folder, talk)
        failpoints.point("tape.get")
    found = digest_tree(folder, sha512=data.expected is None, report=talk.report)
    return Copied(_renamed(data.name, found), sum(one.size for one in missing))


def _files(place: Archive, reach: Reach, data: Data, talk: Talk) -> list[Stored]:
    there = list(place.listed(reach, data.folder, talk))
    if not there:
        raise GiveUp(f"{data.folder} is not on tape")
    if data.expected is None:
        return there
    files = on_tape(data.name, data.expected)
    _check_listed(there, files, data.folder)
    return files


def _right(data: Data, folder: str, talk: Talk) -> set[str]:
    """The names of what an earlier call has restored rightly."""
    if data.expected is None or not os.listdir(folder):
        return set()
    wanted = {name_on_tape(data.name, item.path): item for item in data.expected.files}
    found = digest_tree(folder, sha512=False, report=talk.report)
    names = ((os.fsdecode(item.path), item) for item in found.files)
    return {
        name
        for name, item in names
        if name in wanted and evolve(item, path=wanted[name].path).same(wanted[name])
    }


def _check_free(reach: Reach, folder: str, need: int) -> None:
    with local(os.fsencode(folder), "look at"):
        status = os.statvfs(folder)
    free, spare = status.f_bavail * status.f_frsize, max(MARGIN, reach.here.min_free)
    if need and need + spare > free:
        raise Retry(
            f"not enough space to restore to {shown(folder)}: needs {need / 1e6:,.1f} MB and "
            f"{spare / 1e6:,.1f} MB to spare, has {free / 1e6:,.1f} MB free"
        )


def _renamed(name: str, found: Manifest) -> Manifest:
    """What was restored, under its own names."""
    return Manifest(
        evolve(item, path=name_off_tape(name, os.fsdecode(item.path))) for item in found.items
    )


def difference(data: Data, found: Manifest) -> str | None:
    """Say how data differs from what it must be; None where it does not, or nothing is known."""
    if data.expected is not None:
        differ = data.expected.differences(found)
        more = ", ..." if len(differ) > NAMED else ""
        names = ", ".join(map(str, differ[:NAMED]))
        return f"{len(differ)} files: {names}{more}" if differ else None
    if data.checksum is not None and found.cax_checksum() != data.checksum:
        return "its checksum differs"
    return None


@told
def check(talk: Talk, reach: Reach) -> str:
    """Reach the archive and say, in a line, what answered."""
    return archive(reach.there.method).check(reach, talk)


@told
def contents(talk: Talk, reach: Reach, folder: str) -> list[Stored]:
    """List what a folder holds."""
    return list(archive(reach.there.method).listed(reach, folder, talk))


@told
def holdings(talk: Talk, reach: Reach, above: Collection[str]) -> dict[str, list[Stored]]:
    """List all folders below these directories, with what they hold."""
    found = archive(reach.there.method).folders(reach, above, talk)
    return {folder: list(files) for folder, files in found.items()}
