"""What jobs keep on a disk that this site and its nodes see.

It is a private directory (`caxev.files.private`): what stands in it is executed. Still it is read
as data, following no link, since a job writes there too.

::

    HOME/names/JOB           the group that the job was filed in, and its place there
    HOME/groups/GROUP/       the jobs that are sent at once
        job.sh, watch.sh     what a batch system starts: it does as its arguments say
        sent                 the id that the batch system gave
        0.json               a job: `JobSpec`
        0.log                what it says
        0.ended              how it ended, as it saw that itself
        0.reported           there once the database knows
    HOME/work/JOB/           where a job runs; below it input/ and output/
    HOME/watches.log         what watches had to say
    HOME/logs/JOB.log        the log of a job that has been taken stock of

A job is filed before it is sent, so one that was sent without its id being noted is known by its
name. What is written is written whole: each file appears by a rename.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

from attrs import asdict, frozen

from caxev import failpoints
from caxev.batch.base import Ended, JobSpec
from caxev.core.errors import GiveUp
from caxev.core.model import CopyKey
from caxev.database import id_from, id_text
from caxev.files import make_private, read_file, root_rows, roots_from
from caxev.files.resolved import remove

JOB: Final = """\
#!/bin/sh
# Runs a job of caxev; its files are beside this one. What it is to do are its arguments.
exec "$@"
"""
WATCH: Final = """\
#!/bin/sh
# Reports the end of a caxev job that did not report it itself. $1 exists once it has, and $2 until
# the job is closed.
if [ -e "$1" ] || [ ! -e "$2" ]; then exit 0; fi
shift 2
exec "$@"
"""
INPUT: Final = "input"
OUTPUT: Final = "output"
"""The directories, in that in which a job runs, of what it reads and of what it writes."""
_NAME: Final = re.compile(r"[A-Za-z0-9+_-][A-Za-z0-9+_.-]*")
_MOST: Final = 16 << 20
"""Bytes of a file that are read: no job is described in more."""
_TAIL: Final = 4096
"""Bytes of the end of a log that are looked at."""
_SHOWN: Final = 400
"""Characters of the end of a log that are shown."""


@frozen
class Place:
    """Where a job's files are: its group, and its number there."""

    group: Path
    index: int

    def file(self, kind: str) -> Path:
        """One of its files: json, log, ended, reported."""
        return self.group / f"{self.index}.{kind}"

    def load(self) -> JobSpec:
        """The job. Raises FileNotFoundError where it has been taken stock of."""
        row = _row(self.file("json"))
        row |= {"run": id_from(row["run"]), "key": CopyKey(*row["key"])}
        roots = tuple(roots_from(row["roots"]))
        return JobSpec(**{**row, "argv": tuple(row["argv"]), "roots": roots})

    def note(self, ended: Ended) -> None:
        """Keep how it ended."""
        row = {**ended.as_row(), "at": None}
        _write(self.file("ended"), json.dumps(row))

    @property
    def ended(self) -> Ended | None:
        """How it ended, where it could say so itself."""
        with suppress(OSError, ValueError):
            return Ended.from_row(_row(self.file("ended")))
        return None

    def command(self, *words: str) -> list[str]:
        """The command line that has caxev do something about this job, at any node."""
        # -P: nothing is imported from the directory that it is started in.
        return [sys.executable, "-P", "-m", "caxev", "batch", *words]


@frozen
class Folder:
    """The files of all jobs of one kind of one site."""

    home: Path

    @classmethod
    def opened(cls, home: str) -> Folder:
        """Open those in a directory, made if need be. Raises `Denied` if others may write there."""
        return cls(Path(make_private(home)))

    @property
    def _names(self) -> Path:
        return self.home / "names"

    def _logs(self) -> Path:
        logs = self.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return logs

    def names(self, prefix: str = "") -> list[str]:
        """The names of the jobs that are filed and have not been taken stock of."""
        with suppress(FileNotFoundError):
            return sorted(
                name
                for name in os.listdir(self._names)
                if name.startswith(prefix) and name[0] != "."
            )
        return []

    def place(self, name: str) -> Place | None:
        """Where a job is filed; None where it is not. Raises `GiveUp` for what is no job's name."""
        with suppress(FileNotFoundError):
            group, _, index = _text(self._names / _plain(name)).partition("/")
            if index.isdigit():
                return Place(self.home / "groups" / _plain(group), int(index))
        return None

    def file(self, jobs: Sequence[JobSpec]) -> Path:
        """File jobs that are to be sent at once; their group, which has a name of its own."""
        for job in jobs:
            _plain(job.name)
        group = self.home / "groups" / f"{jobs[0].name}.{token_hex(3)}"
        group.mkdir(parents=True)
        self._names.mkdir(exist_ok=True)
        _write(group / "job.sh", JOB)
        _write(group / "watch.sh", WATCH)
        for index, job in enumerate(jobs):
            row: dict[str, Any] = {**asdict(job), "run": id_text(job.run), "key": list(job.key)}
            row["roots"] = root_rows(job.roots)
            _write(group / f"{index}.json", json.dumps(row))
        for index, job in enumerate(jobs):
            _write(self._names / job.name, f"{group.name}/{index}")
        failpoints.point("batch.filed")
        return group

    def note_sent(self, group: Path, job: str) -> None:
        """Keep the id that the batch system gave to the group."""
        _write(group / "sent", job)

    def sent(self, group: Path) -> str | None:
        """The id that the batch system gave to the group, if it was heard."""
        with suppress(FileNotFoundError):
            return _text(group / "sent").strip() or None
        return None

    def close(self, name: str) -> str:
        """Take a job's files away but for its log; where that is. Repeatable."""
        log = self._logs() / f"{_plain(name)}.log"
        place = self.place(name)
        if place is not None:
            with suppress(FileNotFoundError):
                os.replace(place.file("log"), log)
        log.touch()
        failpoints.point("batch.closed")
        self.forget(name)
        return str(log)

    def closed(self, name: str) -> bool:
        """Whether a job of that name was closed: there is never another one of that name."""
        return (self._logs() / f"{_plain(name)}.log").exists()

    def work(self, name: str) -> Path:
        """Where a job runs, and what it writes is looked for."""
        return work_directory(self.home, name)

    def forget(self, name: str) -> None:
        """Take all of a job's files away, as if it had never been filed."""
        remove(str(self.work(name)))
        place = self.place(name)
        if place is not None:
            for kind in ("json", "ended", "reported"):
                place.file(kind).unlink(missing_ok=True)
            if not any(place.group.glob("*.json")):
                shutil.rmtree(place.group, ignore_errors=True)
            (self._names / name).unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        """Where a job's log is."""
        place = self.place(name)
        return self._logs() / f"{name}.log" if place is None else place.file("log")

    def tail(self, name: str) -> str:
        """The end of a job's log, on one line."""
        return " | ".join(_last_lines(self.log(name)))[-_SHOWN:]


def work_directory(home: str | Path, name: str) -> Path:
    """Where the job of that name runs, of those that keep their files at `home`."""
    return Path(home, "work", _plain(name))


def _plain(name: str) -> str:
    """A name, if it can be one of ours: it comes from a document, and names a file here."""
    if not _NAME.fullmatch(name):
        raise GiveUp(f"{name!r} is no name of a job")
    return name


def _last_lines(log: Path) -> Iterator[str]:
    try:
        text = read_file(str(log), _TAIL, end=True).decode(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        words = "".join(c if c.isprintable() else " " for c in line).split()
        if words:
            yield " ".join(words)


def _text(path: Path) -> str:
    return read_file(str(path), _MOST).decode()


def _row(path: Path) -> dict[str, Any]:
    row = json.loads(_text(path))
    if not isinstance(row, dict):
        raise ValueError(f"{path} holds no object")  # noqa: TRY004  # as for what is no JSON
    return row


def _write(path: Path, text: str) -> None:
    """Make a file appear with all that is in it."""
    writing = path.with_name(f".{path.name}.{token_hex(3)}")
    with writing.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(writing, path)
