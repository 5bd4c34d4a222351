"""Steps for a run's data on tape, in a worker process: back up, compare, restore.

`caxev.handlers.tape` calls these by ``job.work``, and the command line calls them directly. Errors
are returned in an `Outcome` and not raised, so that the client's output comes with them.
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
from caxev.core.errors import Damaged, Denied, GiveUp, Retry
from caxev.files import (
    FILE_MODE,
    Confined,
    Manifest,
    Report,
    bring_in,
    check_expected,
    confine,
    confine_own,
    digest_tree,
    forget_lock,
    join,
    local,
    look,
    make_parents,
    make_private,
    not_private,
    parent,
    printable,
    safe_name,
    steady,
    to_nobody,
    writing,
)
from caxev.files.resolved import chmod, rename
from caxev.files.roots import check_root
from caxev.files.staging import lacking_space
from caxev.tape.base import Archive, Reach, Stored, Transcript, archive
from caxev.tape.staging import clear, fit_for_tape, name_off_tape, name_on_tape, on_tape, stage

T = TypeVar("T")
P = ParamSpec("P")
NAMED: Final = 5
_SCRATCH: Final = ".caxev-restored"
_RECALLED: Final = ".recalled-"
_WHOLE: Final = ".whole-"
"""Prefixes of a run's directory in scratch: with the tape's file names, and complete with ours."""


@frozen
class Outcome(Generic[T]):
    """The outcome of a step: its result or error, and all output of the client."""

    transcript: str
    result: T | None = None
    failed: Retry | GiveUp | None = None

    def get(self) -> T:
        """Return the result. Raises the step's `Retry` or `GiveUp` if it failed."""
        if self.failed is not None:
            raise self.failed
        assert self.result is not None
        return self.result


@frozen
class Data:
    """A run's data: its folder on tape, and what it must be, as far as that is known.

    `name` is the run's directory. `digest` is that of the manifest, which is `expected` if the
    database still has it, and `checksum` is cax's.
    """

    name: str
    folder: str
    expected: Manifest | None = field(default=None, repr=False)
    checksum: str | None = None
    digest: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether there is anything to compare the data with."""
        return any(one is not None for one in (self.expected, self.digest, self.checksum))


def with_outcome(
    function: Callable[Concatenate[Archive, P], T],
) -> Callable[Concatenate[Reach, P], Outcome[T]]:
    """Make a step take a `Reach`, and ``report`` if that is wanted, and return an `Outcome`."""

    def step(reach: Reach, /, *args: P.args, **kwargs: P.kwargs) -> Outcome[T]:
        report: Report = kwargs.pop("report", to_nobody)  # type: ignore[assignment]  # of `job.work`
        transcript = Transcript(report)
        try:
            with steady():
                result = function(archive(reach, transcript), *args, **kwargs)
        except (Retry, GiveUp) as error:
            return Outcome(transcript.text, failed=error)
        return Outcome(transcript.text, result)

    return update_wrapper(step, function)


# -- steps ----------------------------------------------------------------------------------------


@with_outcome
def back_up(place: Archive, source: str, data: Data, again: bool) -> Manifest:
    """Bring the copy at `source` to tape; returns its manifest. Nothing is compared yet.

    Raises `GiveUp` if it is not fit for tape, is not what it must be, or the folder holds other
    files: nothing on tape is ever replaced.
    """
    reach, transcript = place.reach, place.transcript
    path = confine(source, reach.here.roots)
    manifest = _source(path, data, transcript)
    if (why := fit_for_tape(manifest)) is not None:
        raise GiveUp(f"{printable(path)} does not go to tape: {why}")
    files = on_tape(data.name, manifest)
    # Before anything is sent: files of another copy in the folder could be taken for ours later.
    _check_free_of_others(place.listed(data.folder), files, data.folder)
    staged = _staged(reach, data.name)
    make_parents(staged, [os.fsdecode(parent(staged))])
    pairs = zip(files, manifest.files, strict=True)
    transcript.total = manifest.total_bytes
    stage(path, staged, {new.name: os.fsdecode(item.path) for new, item in pairs}, transcript)
    transcript.done = 0
    failpoints.point("tape.put")
    place.put(os.fsdecode(staged), data.folder, files, again=again)
    failpoints.point("tape.put")
    # The client's success is not enough: the archive's own list must have all files.
    _check_listed(place.listed(data.folder), files, data.folder)
    return manifest


def _source(path: Confined, data: Data, transcript: Transcript) -> Manifest:
    """Return the source's manifest, the known one or read from disk."""
    # With a known manifest only names, sizes and times are checked: `compare` reads every byte.
    if data.expected is not None:
        check_expected(look(path), data.expected, printable(path))
        return data.expected
    manifest = digest_tree(path, sha512=True, report=transcript.report)
    if (why := difference(data, manifest)) is not None:
        raise Damaged(f"{printable(path)} is not what it was: {why}")
    return manifest


def _staged(reach: Reach, name: str) -> Confined:
    base = _staging(reach)
    if base is None:
        raise GiveUp(f"neither {reach.here.name} nor {reach.there.name} has a dir_tsm")
    if (why := not_private(base)) is not None:
        raise Denied(f"nothing is staged there: {why}")
    return confine_own(os.path.join(base, safe_name(name)), [base])


def _staging(reach: Reach) -> str | None:
    """Return the staging directory for tape. Raises `RootAway` if its disk is missing."""
    # By its marker: the mount point of an unmounted disk must not look like an empty directory.
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


@with_outcome
def unstage(place: Archive, name: str) -> bool:
    """Remove the staged files of a backup that does not continue; a later one stages them again."""
    clear(_staged(place.reach, name))
    return True


@with_outcome
def compare(place: Archive, data: Data) -> tuple[str | None, Manifest]:
    """Restore data to scratch and compare it; returns the difference, or None, and the data.

    Scratch is empty again afterwards. If there is no difference the staged files are removed.
    """
    folder = join(_scratch(place.reach), os.fsencode(data.name))
    with _filling(folder):
        found = _restored(place, data, folder)
        why = difference(data, found)
        clear(folder)  # still locked: another comparison of this run may wait to fill it
    if why is None:
        with suppress(GiveUp):  # this archive needs no staging
            clear(_staged(place.reach, data.name))
    return why, found


def _scratch(reach: Reach) -> Confined:
    """Return the private directory for restored data. Raises `Denied` if others may write there."""
    if reach.options.scratch is not None:
        return make_private(reach.options.scratch)
    base = _staging(reach)
    return make_private(
        f"{state_directory(reach.here)}/restored" if base is None else f"{base}/{_SCRATCH}"
    )


@with_outcome
def recall(place: Archive, data: Data, target: str, roots: Sequence[str]) -> Manifest:
    """Restore data to `target`, strictly inside one of `roots`; compare it before it gets the name.

    The archive's client writes to scratch, which is private. After a kill the next call reuses the
    files that were restored correctly. Raises `GiveUp` if other data has the name, `Damaged` after
    a checksum mismatch.
    """
    final, scratch = confine(target, roots), _scratch(place.reach)
    folder = join(scratch, os.fsencode(_RECALLED + data.name))
    whole = join(scratch, os.fsencode(_WHOLE + data.name))
    # With `whole` left, an earlier call was killed while it published: continue that.
    if os.path.lexists(final) and not os.path.lexists(whole):
        bring_in(whole, os.fsdecode(final), roots)  # if it was killed later, a rest of `whole` goes
        return _standing(data, final, folder, whole, place.transcript.report)
    with local(folder, "restore to"), _filling(folder):
        _rename_back(data.name, whole, folder)
        found = _restored(place, data, folder)
        if (why := difference(data, found)) is not None:
            clear(folder)
            raise Damaged(f"what {data.folder} on tape gives is not what it must be: {why}")
        with writing(whole, directory=True):
            for item in found.files:
                name = join(whole, item.path)
                rename(_taped(folder, data.name, item.path), name)
                chmod(name, FILE_MODE)
            bring_in(
                whole,
                os.fsdecode(final),
                roots,
                expected=lambda: found,
                min_free=place.reach.here.min_free,
                report=place.transcript.report,
            )
    return found


@contextmanager
def _filling(folder: Confined) -> Iterator[None]:
    """Lock a directory for restored data; it is removed at the end if it is empty."""
    with writing(folder, directory=True):
        try:
            yield
        finally:
            # Files that were restored stay for the next attempt; rmdir then fails.
            with suppress(OSError):
                os.rmdir(folder)


def _standing(
    data: Data, final: Confined, folder: Confined, whole: Confined, report: Report
) -> Manifest:
    """Verify a copy that is already at its final path, from a call that was killed."""
    if not data.is_known:
        raise GiveUp(
            f"{printable(final)} exists already, and it is not known whether it is this copy"
        )
    found = digest_tree(final, sha512=data.expected is None, report=report)
    if (why := difference(data, found)) is not None:
        raise GiveUp(f"{printable(final)} exists already and is not this copy: {why}")
    with suppress(FileNotFoundError):
        os.rmdir(folder)
    for one in (whole, folder):
        forget_lock(one)
    return found


def _rename_back(name: str, whole: Confined, folder: Confined) -> None:
    """Give files that have their own names the tape's names again, so that all are checked."""
    if os.path.isdir(whole):
        for one in os.listdir(whole):
            rename(join(whole, one), _taped(folder, name, one))


def _taped(folder: Confined, name: str, path: bytes) -> Confined:
    """Return where the file of that path in the run is in `folder`, under its name on tape."""
    return join(folder, os.fsencode(name_on_tape(name, path)))


def _restored(place: Archive, data: Data, folder: Confined) -> Manifest:
    """Restore the files missing in `folder`; returns its content, under the run's own names.

    Without a manifest no file is known to be right, and all are restored.
    """
    transcript = place.transcript
    files = _files(place, data)
    right = _right(data, folder, transcript.report)
    for name in set(map(os.fsdecode, os.listdir(folder))) - right:
        os.unlink(join(folder, os.fsencode(name)))
    # Files that are not right go first: the client does not replace existing ones.
    missing = [one for one in files if one.name not in right]
    transcript.total = sum(one.size for one in files)
    _check_free(place.reach, folder, sum(one.size for one in missing))
    if missing:
        failpoints.point("tape.get")
        place.get(data.folder, missing, os.fsdecode(folder))
        failpoints.point("tape.get")
    # The files of earlier attempts are read again, too: everything is compared at once, at the end.
    found = digest_tree(folder, sha512=data.expected is None, report=transcript.report)
    # The client names them as on tape.
    return Manifest(
        evolve(item, path=name_off_tape(data.name, os.fsdecode(item.path))) for item in found.items
    )


def _files(place: Archive, data: Data) -> list[Stored]:
    there = list(place.listed(data.folder))
    if not there:
        raise Damaged(f"{data.folder} is not on tape")
    if data.expected is None:
        return there
    files = on_tape(data.name, data.expected)
    _check_listed(there, files, data.folder)
    return files


def _right(data: Data, folder: Confined, report: Report) -> set[str]:
    """Return the names of the files that an earlier call restored correctly."""
    if data.expected is None or not os.listdir(folder):
        return set()
    wanted = {name_on_tape(data.name, item.path): item for item in data.expected.files}
    found = digest_tree(folder, sha512=False, report=report)
    names = ((os.fsdecode(item.path), item) for item in found.files)
    return {
        name
        for name, item in names
        if name in wanted and evolve(item, path=wanted[name].path).same(wanted[name])
    }


def _check_free(reach: Reach, folder: Confined, need: int) -> None:
    with local(folder, "look at"):
        status = os.statvfs(folder)
    free, what = status.f_bavail * status.f_frsize, f"to restore to {printable(folder)}"
    if why := lacking_space(need, free, reach.here.min_free, what):
        raise Retry(why)


def difference(data: Data, found: Manifest) -> str | None:
    """Return how data differs from what it must be; None if it does not, or nothing is known."""
    if data.expected is not None:
        differ = data.expected.differences(found)
        more = ", ..." if len(differ) > NAMED else ""
        names = ", ".join(map(str, differ[:NAMED]))
        return f"{len(differ)} files: {names}{more}" if differ else None
    if data.digest is not None:
        return None if found.digest == data.digest else "its manifest differs"
    if data.checksum is not None and found.cax_checksum() != data.checksum:
        return "its checksum differs"
    return None


@with_outcome
def check(place: Archive) -> str:
    """Contact the archive, and return a line that describes the server."""
    return place.check()


@with_outcome
def contents(place: Archive, folder: str) -> list[Stored]:
    """List the files in a folder."""
    return list(place.listed(folder))


@with_outcome
def holdings(place: Archive, above: Collection[str]) -> dict[str, list[Stored]]:
    """List all folders below these directories, with their files."""
    return {folder: list(files) for folder, files in place.folders(above).items()}
