"""Method ``tsm``: IBM's tape system (TSM, Spectrum Protect, Storage Protect), through ``dsmc``.

``dsmc incremental`` stores data under the path at which it was staged, ``<dir_tsm>/<run>``: the
folder. Since the staged files are removed afterwards, the server may consider a file inactive when
it is wanted: the latest version is taken, active or not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from caxev.config.archive import PATIENCE
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.program import Program
from caxev.tape.base import Archive, Stored
from caxev.tape.client import ClientWatch, run_client
from caxev.tape.output import (
    ClientRun,
    asks,
    backup_problem,
    bytes_sent,
    listing,
    restore_problem,
    session,
)

T = TypeVar("T")
# Dates, times and numbers in the one form that `output` reads, independent of the node's options.
_FORMATS: Final = ("-dateformat=3", "-timeformat=1", "-numberformat=1")
_RESTORE: Final = ("-preservepath=none", "-followsymbolic=yes", "-replace=no", "-latest")
_QUERY: Final = ("-filesonly", "-inactive")
_REFUSED: Final = frozenset(
    {
        "ANS1035S",  # the options file cannot be read
        "ANS1087E",  # access to the file is denied
        "ANS1217E",  # the server's name is not found in the options
        "ANS1025E",  # the user's name or password is refused
        "ANS1353E",  # the session is rejected: unknown node
    }
)
_HOPELESS: Final = frozenset(
    {
        "ANS1036S",  # an option is not valid
        "ANS1051I",
        "ANS1063E",  # the path is not valid
        "ANS1064E",
        "ANS1302E",  # no objects on server match query
        "ANS1345E",  # no objects on the server match
    }
)
"""Messages about permanent errors."""
_FORBIDDEN: Final = frozenset('*?[]{}"\n\r\0')


class Tsm(Archive):
    """Tape through ``dsmc``."""

    def folder(self, name: str) -> str | None:
        """Return ``<dir_tsm>/<name>`` of the site that runs the client, else of the archive."""
        base = self.reach.here.dir_tsm or self.reach.there.dir_tsm
        return None if base is None else f"{base.rstrip('/')}/{name}"

    def put(self, staged: str, folder: str, files: Sequence[Stored], *, again: bool) -> None:
        """Back up; with `again` even files that have not changed since their last backup."""
        # dsmc stores a file under the path that it has on disk: there is no other way to name it.
        if staged != folder:
            raise GiveUp(f"{staged} would be {staged} on tape, not {folder}")
        for name in (folder, *(one.name for one in files)):
            _plain(name)
        began = len(self.transcript.lines)
        run = self._run(
            ["incremental", f"{folder}/", *(["-absolute"] if again else [])],
            progress=lambda: bytes_sent(self.transcript.lines[began:]),
        )
        if (why := backup_problem(run, len(files))) is not None:
            raise _failed(run, why)

    def get(self, folder: str, files: Sequence[Stored], target: str) -> None:
        """Restore the files, by a list of their names, into `target`."""
        with tempfile.NamedTemporaryFile("w", prefix="caxev-", suffix=".files") as names:
            for one in files:
                names.write(f'"{_plain(f"{folder}/{one.name}")}"\n')
            names.flush()
            run = self._run(
                ["restore", f"-filelist={names.name}", f"{target}/", *_RESTORE],
                progress=lambda: _size(target),
            )
        if (why := restore_problem(run, len(files))) is not None:
            raise _failed(run, why)

    def listed(self, folder: str) -> list[Stored]:
        """Query the files of one folder."""
        found = self._query("backup", f"{_plain(folder)}/*", *_QUERY, parse=listing)
        return [stored for directory, stored in found if directory == folder]

    def folders(self, above: Collection[str]) -> Mapping[str, list[Stored]]:
        """Query everything below these directories."""
        folders: dict[str, list[Stored]] = {}
        for base in above:
            words = ("backup", f"{_plain(base)}/*", *_QUERY, "-subdir=yes")
            for directory, stored in self._query(*words, parse=listing):
                folders.setdefault(directory, []).append(stored)
        return folders

    def check(self) -> str:
        """Query the session's server."""
        return self._query("session", parse=session)

    def _query(self, *words: str, parse: Callable[[ClientRun], T]) -> T:
        run = self._run(["query", *words])
        try:
            return parse(run)
        except ValueError as exc:
            raise _failed(run, str(exc)) from exc

    def _run(self, words: Sequence[str], *, progress: Callable[[], int] | None = None) -> ClientRun:
        options = self.reach.options
        more = [*_FORMATS]
        if options.server is not None:
            more.append(f"-servername={options.server}")
        if options.optfile is not None:
            more.append(f"-optfile={options.optfile}")
        command, patience = options.command or ("dsmc",), options.patience or PATIENCE
        name = os.path.basename(command[0])
        watch = ClientWatch(name, self.transcript, patience, asks, progress)
        with tempfile.TemporaryDirectory(prefix="caxev-dsmc-") as directory:  # for its logs
            environment = {"DSM_LOG": directory, **options.environment}
            program = Program([*command, *words, *more], "util-linux", environment, directory)
            status, lines = run_client(program, watch)
        return ClientRun.of(status, lines)


def _plain(path: str) -> str:
    """Return the path. Raises `GiveUp` if the client would read it as a pattern."""
    if not path.isprintable() or _FORBIDDEN.intersection(path) or ".." in path.split("/"):
        raise GiveUp(f"dsmc cannot be given the name {path!a}")
    return path


def _failed(run: ClientRun, why: str) -> GiveUp | Retry:
    codes = {message.code for message in run.messages}
    if _HOPELESS & codes:
        return GiveUp(why)
    return Denied(why) if _REFUSED & codes else Retry(why)


def _size(directory: str) -> int:
    """Return the total size of a directory's files in bytes."""
    total = 0
    # Files come, and get their final names, while dsmc restores.
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
    return total
