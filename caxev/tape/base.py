"""What a tape archive is: the interface that each kind of archive implements."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from attrs import define, field, frozen

from caxev.config import ArchiveOptions, Site, archive_between
from caxev.files import Report


def folder_of(location: str) -> str:
    """A location on tape, as the archive lists it: cax wrote slashes twice, and at the end."""
    return "/" + "/".join(part for part in location.split("/") if part)


@frozen
class Stored:
    """A file as the archive lists it: its name, bytes, and when it came there, as that says it."""

    name: str
    size: int
    time: str = ""


@frozen
class Reach:
    """An archive as it is reached from one site: `here` runs its client, `there` is the archive."""

    here: Site
    there: Site

    @property
    def options(self) -> ArchiveOptions:
        """How its client is run."""
        return archive_between(self.here, self.there)


@define(eq=False)
class Talk:
    """What is told while an archive is at work: how far it is, and all that its client writes."""

    report: Report
    total: int = 0
    done: int = 0
    said: list[str] = field(factory=list)

    def at(self, done: int) -> None:
        """So many bytes are done; saying the same again is a sign of life."""
        self.done = done
        self.report(done, self.total)

    @property
    def text(self) -> str:
        return "\n".join(self.said)


class Archive(Protocol):
    """A kind of archive. All methods run in a worker process, and may take hours.

    A folder is the archive's name for one run's data, an absolute path; the files in it have no
    directories. Methods raise `GiveUp` for what will not change by itself, and `Retry` for all
    that may pass; both name what the archive itself said. Nothing in an archive is ever deleted.
    Killed anywhere, each can be called again, and no program that it started lives on.
    """

    def folder(self, reach: Reach, name: str) -> str | None:
        """Where data of that name goes, which stands as ``location`` in the run; None: nowhere."""
        ...

    def put(
        self,
        reach: Reach,
        staged: str,
        folder: str,
        files: Sequence[Stored],
        *,
        again: bool,
        talk: Talk,
    ) -> None:
        """Bring `files` of the directory `staged` into `folder`.

        With `again` what is there already is known to be bad and is not taken for done.
        """
        ...

    def get(
        self, reach: Reach, folder: str, files: Sequence[Stored], target: str, talk: Talk
    ) -> None:
        """Bring these files of `folder` into the directory `target`, where none of them is."""
        ...

    def listed(self, reach: Reach, folder: str, talk: Talk) -> Sequence[Stored]:
        """List what `folder` holds; empty where there is no such folder."""
        ...

    def folders(
        self, reach: Reach, above: Collection[str], talk: Talk
    ) -> Mapping[str, Sequence[Stored]]:
        """List all folders below the directories `above`, with what they hold."""
        ...

    def check(self, reach: Reach, talk: Talk) -> str:
        """Reach the archive and say, in a line, what answered."""
        ...
