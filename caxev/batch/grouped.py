"""The base of batch systems that are reached by programs: groups, and watches.

Jobs of the same needs are filed in a group (`caxev.batch.folder`), which is sent and given a number
by the batch system. A subclass sends, asks and cancels; here is what makes a crash in between
harmless.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final

from attrs import define, field

from caxev import failpoints
from caxev.batch.base import End, JobEnd, JobSpec
from caxev.batch.folder import Folder, Place
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.program import call

PASSWORD: Final = "MONGO_PASSWORD"  # noqa: S105  # a variable's name
_PASSED: Final = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "PYTHONPATH", "SSL_CERT_FILE"),
    *("CAXEV_MONGO_URI", "CAXEV_MONGO_USER", "CAXEV_DATABASE", "CAXEV_COLLECTION"),
    "MONGO_PASSWORD_FILE",
)
_WITH_PASSWORD: Final = re.compile(r"://[^/@]*:[^/@]*@")


def passed() -> dict[str, str]:
    """Return our variables that a job gets, by their names; `PASSWORD` is not among them."""
    return {name: os.environ[name] for name in _PASSED if name in os.environ}


def shown_to_all(batch: str) -> dict[str, str]:
    """Return the variables for a system that shows them to other users. Raises `Denied`."""
    found = passed()
    if _WITH_PASSWORD.search(found.get("CAXEV_MONGO_URI", "")):
        raise Denied(
            f"CAXEV_MONGO_URI contains a password, which {batch} would show to its users: take it "
            "out, and name a file by MONGO_PASSWORD_FILE that the nodes can read"
        )
    return found


def submitted(
    command: Sequence[str],
    *,
    package: str,
    number: str,
    hopeless: re.Pattern[str],
    refused: re.Pattern[str] | None = None,
) -> str:
    """Send jobs by a batch system's program; return their number, found in its answer.

    `number`, a regular expression, is what the answer must begin with. Raises `GiveUp` or `Denied`
    if the program fails with a message that is `hopeless` or by which the jobs were `refused`.
    """
    try:
        answer = call(command, package=package).strip()
    except Retry as error:
        if refused is not None and refused.search(error.why):
            raise Denied(error.why) from error
        if hopeless.search(error.why):
            raise GiveUp(error.why) from error
        raise
    if (found := re.match(number, answer)) is None:
        raise Retry(f"{command[0]} gave no job's id but {answer[:80]!r}")
    return found[0]


@define
class Grouped(ABC):
    """A batch system that gives a number to each group of jobs. See `BatchSystem`."""

    name: ClassVar[str]
    most: ClassVar[int] = 1
    """Maximum number of jobs in a group."""

    home: str
    folder: Folder = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.folder = Folder.opened(self.home)
        self.home = str(self.folder.home)

    def submit(self, jobs: Sequence[JobSpec]) -> list[str]:
        """Send jobs, in as few groups as possible. See `BatchSystem.submit`."""
        ids: list[str] = []
        for start in range(0, len(jobs), self.most):
            together = jobs[start : start + self.most]
            group = self.folder.file(together)
            try:
                number = self.send(group, together)
            except GiveUp as error:
                if ids:  # some were sent, and must be found again before the rest is given up
                    raise Retry(error.why) from error
                raise
            failpoints.point("batch.sent")
            self.note_sent(group, number)
            ids += [self.id_of(number, index) for index in range(len(together))]
        return ids

    def find(self, names: Sequence[str]) -> dict[str, str]:
        """Find jobs by the groups that they were filed in. See `BatchSystem.find`."""
        places = {name: place for name in names if (place := self.folder.place(name)) is not None}
        groups = {place.group: self.folder.sent(place.group) for place in places.values()}
        # The reply was lost in a crash. A group's name is unique, so it finds the number.
        unheard = [group for group, number in groups.items() if number is None]
        for group, number in (self.numbers_of(unheard) if unheard else {}).items():
            groups[group] = number
            self.note_sent(group, number)
        return {
            name: self.id_of(sent, place.index)
            for name, place in places.items()
            if (sent := groups[place.group]) is not None
        }

    def note_sent(self, group: Path, number: str) -> None:
        """Record that a group was sent. It may be repeated."""
        self.folder.note_sent(group, number)

    @abstractmethod
    def send(self, group: Path, jobs: Sequence[JobSpec]) -> str:
        """Send a group that is filed; returns its number. Raises `GiveUp`, `Retry`."""

    @abstractmethod
    def numbers_of(self, groups: Collection[Path]) -> Mapping[Path, str]:
        """Return the numbers of those groups that were sent. Raises `Retry`."""

    @staticmethod
    @abstractmethod
    def id_of(number: str, index: int) -> str:
        """Return the id of a job of a group. Pure."""


@define
class WatchedJob(Grouped):
    """A batch system on which a tiny second job, the watch, waits for the end of each job.

    If the job did not report its end, because it was killed or its node could not reach the
    database, the watch reports it.
    """

    WATCH: ClassVar[str] = (
        "# Reports the end of a caxev job that did not report it itself. $1 exists once it has,\n"
        "# and $2 until the job is closed.\n"
        'if [ -e "$1" ] || [ ! -e "$2" ]; then exit 0; fi\nshift 2\nexec "$@"\n'
    )

    def note_sent(self, group: Path, number: str) -> None:
        """Give each job of a sent group its watch; then record that the group was sent."""
        # In this order: after a crash in between, `find` finds the group by its name and calls this
        # again. A second watch does no harm.
        for file in group.glob("[0-9]*.json"):
            place = Place(group, int(file.stem))
            with suppress(FileNotFoundError):  # the job was closed meanwhile
                self._watch(place.load(), place, self.id_of(number, place.index))
        Grouped.note_sent(self, group, number)

    def _watch(self, spec: JobSpec, place: Place, job: str) -> None:
        """Send the watch of a job.

        If the system accepts no more jobs there is no watch, and the regular check finds the end.
        """
        marks = [str(place.file("reported")), str(place.file("json"))]
        command = place.command("watch", str(place.group), str(place.index), job, self.name)
        try:
            self.send_watch(spec, place.group, job, [*marks, *command])
        except (GiveUp, Retry) as error:
            with Path(self.home, "watches.log").open("a") as log:
                log.write(f"no watch for {spec.name}: {error}\n")

    def called(self, group: Path) -> str:
        """Return the unique name of a group's jobs in the batch system. Pure."""
        return group.name

    def unless_reused(self, ended: JobEnd | None, name: str, called: str | None) -> JobEnd | None:
        """Return `ended`, or that the job `name` is lost if the system showed another one.

        A system that has lost its state gives numbers again; what it shows is `called` so.
        """
        place = self.folder.place(name)
        if called is None or (place is not None and called == self.called(place.group)):
            return ended
        return JobEnd(End.LOST, why=f"its number is that of another job by now ({called})")

    @abstractmethod
    def send_watch(self, spec: JobSpec, group: Path, job: str, words: Sequence[str]) -> None:
        """Send a script of `WATCH` with these words, to run once a job has ended in any way."""
