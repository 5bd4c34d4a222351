"""The interface of tape archives, which each kind of archive implements."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from attrs import define, field, frozen

from caxev.config import ArchiveOptions, Site, archive_between
from caxev.files import Report


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


class Archive(Protocol):
    """A kind of archive. All methods run in a worker process, and may take hours.

    A folder is the archive's name for one run's data, an absolute path; it has no subdirectories.
    Methods raise `GiveUp` for permanent errors and `Retry` for others, both with the archive's own
    message. Nothing in an archive is ever deleted. Methods are idempotent, even after a kill, and
    no program that they start outlives this process.
    """

    def folder(self, reach: Reach, name: str) -> str | None:
        """Return the folder for data of that name, the entry's ``location``; None: no directory."""
        ...

    def put(
        self,
        reach: Reach,
        staged: str,
        folder: str,
        files: Sequence[Stored],
        *,
        again: bool,
        transcript: Transcript,
    ) -> None:
        """Bring `files` of the directory `staged` into `folder`.

        With `again` the files that the archive already has are known to be bad, and are sent again.
        """
        ...

    def get(
        self,
        reach: Reach,
        folder: str,
        files: Sequence[Stored],
        target: str,
        transcript: Transcript,
    ) -> None:
        """Bring these files of `folder` into the directory `target`, which has none of them."""
        ...

    def listed(self, reach: Reach, folder: str, transcript: Transcript) -> Sequence[Stored]:
        """List the files in `folder`; empty if there is no such folder."""
        ...

    def folders(
        self, reach: Reach, above: Collection[str], transcript: Transcript
    ) -> Mapping[str, Sequence[Stored]]:
        """List all folders below the directories `above`, with their files."""
        ...

    def check(self, reach: Reach, transcript: Transcript) -> str:
        """Contact the archive, and return a line that describes the server."""
        ...
