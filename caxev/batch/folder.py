"""The jobs' files, on a disk that this site and its nodes share.

They are in a private directory (`caxev.files.private`), since its files are executed. They are
still read without following links, as jobs write there too.

::

    HOME/names/JOB           the group that the job was filed in, and its place there
    HOME/groups/GROUP/       the jobs that are sent at once
        job.sh, watch.sh     the scripts that a batch system starts
        sent                 the id that the batch system gave
        0.json               a job: `JobSpec`
        0.log                its output
        0.ended              how it ended, by its own note
        0.reported           exists once its end is in the database
    HOME/work/JOB/           a job's working directory; below it input/ and output/
    HOME/watches.log         the output of watches
    HOME/events/GROUP        the batch system's own log of the jobs, if it writes one
    HOME/logs/JOB.log        the log of a job that was closed

A job is filed before it is sent, so that a job whose id was lost is found by its name. Each file
appears complete, by a rename.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

from attrs import asdict, fields, frozen

from caxev import failpoints
from caxev.batch.base import JobEnd, JobSpec
from caxev.core.errors import GiveUp
from caxev.core.model import CopyKey
from caxev.database.ids import id_from, id_text
from caxev.files import Confined, confine_entry, make_private, root_rows, roots_from
from caxev.files.resolved import read_file, remove

INPUT: Final = "input"
OUTPUT: Final = "output"
"""Subdirectories of a job's working directory, for its input and its output."""
_NAME: Final = re.compile(r"[A-Za-z0-9+_-][A-Za-z0-9+_.-]*")
_MOST: Final = 16 << 20
"""Maximum size of a file that is read, in bytes: no job's description is longer."""
_TAIL: Final = 4096
"""Bytes of the end of a log that are read."""
_SHOWN: Final = 400
"""Characters of the end of a log that are shown."""


@frozen
class Place:
    """The location of a job's files: its group, and its number there."""

    group: Path
    index: int

    def file(self, kind: str) -> Path:
        """Return the path of a file of the job: json, log, ended or reported."""
        return self.group / f"{self.index}.{kind}"

    def load(self) -> JobSpec:
        """Read the job. Raises FileNotFoundError if it was closed, `GiveUp` if it is malformed."""
        file = self.file("json")
        try:
            row = _row(file)
            row |= {"run": id_from(row["run"]), "key": CopyKey(*row["key"])}
            row |= {name: tuple(row[name]) for name in ("argv", "options")}
            row["roots"] = tuple(roots_from(row["roots"]))
            # Another version that filed it may have had more fields, or fewer.
            known = [one.name for one in fields(JobSpec) if one.name in row]
            return JobSpec(**{name: row[name] for name in known})
        except (ValueError, TypeError, KeyError) as error:
            raise GiveUp(f"{file} describes no job: {type(error).__name__}: {error}") from error

    def note(self, ended: JobEnd) -> None:
        """Record how the job ended."""
        row = {**ended.as_row(), "at": None}  # the database has the time
        _write(self.file("ended"), json.dumps(row))

    @property
    def ended(self) -> JobEnd | None:
        """How the job ended by its own note, or None."""
        # Without a note that can be read, the batch system is asked for the end.
        with suppress(OSError, ValueError):
            return JobEnd.from_row(_row(self.file("ended")))
        return None

    @property
    def tail(self) -> str:
        """The end of the job's log, on one line."""
        return _on_one_line(self.file("log"))

    def command(self, *words: str) -> list[str]:
        """Return the command line of ``caxev batch`` with these words, for any node."""
        # -P: without it Python would import modules from the directory that it is started in.
        return [sys.executable, "-P", "-m", "caxev", "batch", *words]


@frozen
class Folder:
    """The files of all jobs of one kind of one site."""

    home: Path

    @classmethod
    def opened(cls, home: str) -> Folder:
        """Open a directory, created if missing. Raises `Denied` if others may write there."""
        return cls(Path(os.fsdecode(make_private(home))))

    @property
    def _names(self) -> Path:
        return self.home / "names"

    def _logs(self) -> Path:
        logs = self.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return logs

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the jobs that are filed and not closed."""
        with suppress(FileNotFoundError):
            return sorted(
                name
                for name in os.listdir(self._names)
                if name.startswith(prefix) and name[0] != "."
            )
        return []

    def place(self, name: str) -> Place | None:
        """Return where a job is filed, or None. Raises `GiveUp` if no job can have that name."""
        with suppress(FileNotFoundError):
            group, _, index = _text(self._names / _plain(name)).partition("/")
            if index.isdigit():
                return Place(self.home / "groups" / _plain(group), int(index))
        return None

    def file(self, jobs: Sequence[JobSpec]) -> Path:
        """File jobs that are sent together; returns their group, whose name is unique.

        After an OSError nothing of them is left, so a retry files them again.
        """
        for job in jobs:
            _plain(job.name)
        group = self.home / "groups" / f"{jobs[0].name}.{token_hex(3)}"
        group.mkdir(parents=True)
        try:
            self._fill(group, jobs)
        except OSError:
            self._drop(group, jobs)
            raise
        failpoints.point("batch.filed")
        return group

    def _fill(self, group: Path, jobs: Sequence[JobSpec]) -> None:
        self._names.mkdir(exist_ok=True)
        for index, job in enumerate(jobs):
            row: dict[str, Any] = {**asdict(job), "run": id_text(job.run), "key": list(job.key)}
            row["roots"] = root_rows(job.roots)
            _write(group / f"{index}.json", json.dumps(row))
        # The names come last: a name that exists always leads to a complete job.
        for index, job in enumerate(jobs):
            _write(self._names / job.name, f"{group.name}/{index}")

    def _drop(self, group: Path, jobs: Sequence[JobSpec]) -> None:
        for job in jobs:
            place = self.place(job.name)
            # A name that was not written this time may still lead to the group of an earlier
            # attempt.
            if place is not None and place.group == group:
                (self._names / job.name).unlink()
        shutil.rmtree(group, ignore_errors=True)

    @property
    def events(self) -> Path:
        """The directory of the batch system's own logs, created if missing."""
        events = self.home / "events"
        events.mkdir(exist_ok=True)
        return events

    @staticmethod
    def script(group: Path, name: str, body: str, words: Sequence[str] = ()) -> str:
        """Write a shell script into a group; returns its path.

        It finds its arguments in ``$@``, or the given words if it will have none.
        """
        given = f"set -- {shlex.join(words)}\n" if words else ""
        _write(group / name, f"#!/bin/sh\n{given}{body}")
        return str(group / name)

    def note_sent(self, group: Path, job: str) -> None:
        """Record the id that the batch system gave to the group."""
        _write(group / "sent", job)

    def sent(self, group: Path) -> str | None:
        """Return the id that the batch system gave to the group, if it was recorded."""
        with suppress(FileNotFoundError):
            return _text(group / "sent").strip() or None
        return None

    def close(self, name: str) -> str:
        """Remove a job's files except its log; returns the log's path. Idempotent."""
        log = self._logs() / f"{_plain(name)}.log"
        place = self.place(name)
        if place is not None:
            with suppress(FileNotFoundError):
                os.replace(place.file("log"), log)
        log.touch()  # even without output: its existence means that the job was closed
        self.forget(name)
        return str(log)

    def closed(self, name: str) -> bool:
        """Return whether a job was closed; its name is never used again."""
        return (self._logs() / f"{_plain(name)}.log").exists()

    def work(self, name: str) -> Path:
        """Return a job's working directory."""
        return work_directory(self.home, name)

    def forget(self, name: str) -> None:
        """Remove all of a job's files, as if it had never been filed."""
        remove(_ours(self.work(name)))
        place = self.place(name)
        if place is not None:
            for kind in ("json", "ended", "reported"):
                place.file(kind).unlink(missing_ok=True)
            if not any(place.group.glob("*.json")):
                shutil.rmtree(place.group, ignore_errors=True)
            # Last: until then a repetition after a crash finds what is left.
            (self._names / name).unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        """Return the path of a job's log."""
        place = self.place(name)
        return self._logs() / f"{name}.log" if place is None else place.file("log")

    def tail(self, name: str) -> str:
        """Return the end of a job's log, on one line."""
        return _on_one_line(self.log(name))


def work_directory(home: str | Path, name: str) -> Path:
    """Return the working directory of a job whose files are below `home`."""
    return Path(home, "work", _plain(name))


def _plain(name: str) -> str:
    """Return a job's name. Raises `GiveUp` for any other text."""
    # Names come from the database and become part of paths.
    if not _NAME.fullmatch(name):
        raise GiveUp(f"{name!r} is no name of a job")
    return name


def _on_one_line(log: Path) -> str:
    return " | ".join(_last_lines(log))[-_SHOWN:]


def _last_lines(log: Path) -> Iterator[str]:
    try:
        # The log only adds to a message: without it the job's end must not get lost.
        text = read_file(_ours(log), _TAIL, end=True).decode(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        words = "".join(c if c.isprintable() else " " for c in line).split()
        if words:
            yield " ".join(words)


def _ours(path: Path) -> Confined:
    """Return a path below our home, which is private, as `caxev.files` takes it."""
    return confine_entry(str(path), [str(path.parent)])


def _text(path: Path) -> str:
    return read_file(_ours(path), _MOST).decode()


def _row(path: Path) -> dict[str, Any]:
    row = json.loads(_text(path))
    if not isinstance(row, dict):
        raise ValueError(f"{path} holds no object")  # noqa: TRY004  # as for what is no JSON
    return row


def _write(path: Path, text: str) -> None:
    """Write a file atomically and durably."""
    writing = path.with_name(f".{path.name}.{token_hex(3)}")
    # Synced before the rename: after a power failure the name must not lead to an empty file.
    try:
        with writing.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, path)
    except OSError:
        writing.unlink(missing_ok=True)
        raise
