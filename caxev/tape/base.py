"""The interface of tape archives, and how one is found by its method."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from attrs import define, field, frozen

from caxev.config import ArchiveOptions, Site, archive_between
from caxev.config.archive import ARCHIVES
from caxev.config.plugins import found, installed
from caxev.core.errors import GiveUp
from caxev.files import Report, to_nobody

_OURS: Final = {"tsm": "caxev.tape.tsm:Tsm", "directory": "caxev.tape.directory:Directory"}


def folder_of(location: str) -> str:
    """Return a location on tape as the archive lists it."""
    # cax wrote double and trailing slashes into the database.
    return "/" + "/".join(part for part in location.split("/") if part)


@frozen
class Stored:
    """A file as the archive lists it: name, size in bytes, and time in the archive's format."""

    name: str
    size: int
    time: str = ""


@frozen
class Reach:
    """An archive as reached from one site: `here` runs its client, `there` is the archive."""

    here: Site
    there: Site

    @property
    def options(self) -> ArchiveOptions:
        """The options of its client."""
        return archive_between(self.here, self.there)


@define(eq=False)
class Transcript:
    """The progress of an operation in an archive, and all output of its client."""

    report: Report
    total: int = 0
    done: int = 0
    lines: list[str] = field(factory=list)

    def at(self, done: int) -> None:
        """Report the number of bytes done; repeating the same number is a sign of life."""
        self.done = done
        self.report(done, self.total)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@define(eq=False)
class Archive:
    """A kind of archive, as reached from one site. All methods run in a worker process for hours.

    A folder is the archive's name for one run's data, an absolute path; it has no subdirectories.
    Methods raise `GiveUp` for permanent errors and `Retry` for others, both with the archive's own
    message, and report to `transcript`. Nothing in an archive is ever deleted. Methods are
    idempotent, even after a kill, and no program that they start outlives this process.
    """

    reach: Reach
    transcript: Transcript

    def folder(self, name: str) -> str | None:
        """Return the folder for data of that name, the entry's ``location``; None: no directory.

        Runs anywhere, and does not wait.
        """
        raise NotImplementedError

    def put(self, staged: str, folder: str, files: Sequence[Stored], *, again: bool) -> None:
        """Bring `files` of the directory `staged` into `folder`.

        With `again` the files that the archive already has are known to be bad, and are sent again.
        """
        raise NotImplementedError

    def get(self, folder: str, files: Sequence[Stored], target: str) -> None:
        """Bring these files of `folder` into the directory `target`, which has none of them."""
        raise NotImplementedError

    def listed(self, folder: str) -> Sequence[Stored]:
        """List the files in `folder`; empty if there is no such folder."""
        raise NotImplementedError

    def folders(self, above: Collection[str]) -> Mapping[str, Sequence[Stored]]:
        """List all folders below the directories `above`, with their files."""
        raise NotImplementedError

    def check(self) -> str:
        """Contact the archive, and return a line that describes the server."""
        raise NotImplementedError


def methods() -> frozenset[str]:
    """Return the methods of archives, including third parties'."""
    return frozenset(_OURS) | installed(ARCHIVES)


def archive(reach: Reach, transcript: Transcript | None = None) -> Archive:
    """Return the archive of that site's method. Raises `GiveUp` if there is none."""
    method = reach.there.method
    kind: type[Archive] | None = found(method, _OURS, ARCHIVES)
    if kind is None:
        raise GiveUp(f"no archive is reached by {method!r} (known: {', '.join(sorted(methods()))})")
    return kind(reach, transcript or Transcript(to_nobody))
